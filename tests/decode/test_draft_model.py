"""Drafts by a small model: how good they are. That they change no text, `test_properties.py` tests for all drafters."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_loop import FOREVER, start, texts

from msn_jax.cli import InputError
from msn_jax.decode import draft_model, drafters, loop, tree
from msn_jax.decode.engine import Decoder, Model
from msn_jax.decode.tree import JACOBI, NOISE, RETRIEVAL

pytestmark = pytest.mark.usefixtures("quick_compilation")

CFG = dataclasses.replace(tiny.config(), n_layers=1)
NO_STOP = jnp.array([-1], jnp.int32)
CHAIN = draft_model.drafter(tree.chain(JACOBI, 3), CFG)


def run(weights, temperature=0.0, drafter=CHAIN, capacity=128, passes=FOREVER):
    prompts = tiny.prompts(np.random.default_rng(1), 4, CFG.vocab_size)
    state = start(CFG, tiny.params(CFG, 0), drafter, prompts, [24] * 4, capacity, temperature, weights=weights)
    return loop.decode(tiny.params(CFG, 0), CFG, drafter, NO_STOP, state, passes, weights)


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_the_model_itself_is_always_right(temperature):
    """Under sampling as well: it guesses with the same random bits."""
    state = run(tiny.params(CFG, 0), temperature)
    assert state.accept_lengths[:, :6].tolist() == [[4] * 6] * 4
    assert state.forward_passes.tolist() == [6] * 4


def test_another_model_is_sometimes_right_and_changes_nothing():
    expected = run(None, drafter=drafters.get("autoregressive"))
    state = run(tiny.params(CFG, 2))
    assert texts(state) == texts(expected)
    assert 24 * 4 > int(state.forward_passes.sum()) > 6 * 4


def test_it_remembers_what_was_accepted():
    """After every pass, the small model's cache is what it would be of the text alone, its newest token left out."""
    weights = tiny.params(CFG, 2)
    state = run(weights, passes=jnp.int32(0))
    for _ in range(4):
        state = loop.decode(tiny.params(CFG, 0), CFG, CHAIN, NO_STOP, state, jnp.int32(1), weights)
        np.testing.assert_array_equal(state.draft.cache.lengths, state.lengths - 1)
    own = start(CFG, weights, drafters.get("autoregressive"), texts(state), [9] * 4)
    for (keys, _), (expected, _) in zip(state.draft.cache.layers, own.cache.layers, strict=True):
        for row, length in enumerate(state.draft.cache.lengths.tolist()):
            np.testing.assert_allclose(keys[row, :, :length], expected[row, :, :length], atol=1e-5)


def test_branches_hold_its_next_best_tokens():
    """A tree with the second and third guess at every depth is right more often than the chain."""
    branches = draft_model.drafter(tree.tr_jacobi_tree([(0, 0, 0), (0, 0, 1), (0, 1), (0, 2), (1,), (2,)], []), CFG)
    weights = tiny.params(CFG, 2)
    state = run(weights, drafter=branches)
    assert texts(state) == texts(run(weights))
    assert int(state.forward_passes.sum()) < int(run(weights).forward_passes.sum())


def test_it_grows_with_the_text():
    weights = tiny.params(CFG, 2)
    state, expected = run(weights, capacity=32), run(weights)
    assert not state.done.all()
    while not state.done.all():
        state = loop.grow(CHAIN, state, 2 * state.capacity)
        state = loop.decode(tiny.params(CFG, 0), CFG, CHAIN, NO_STOP, state, FOREVER, weights)
    assert texts(state) == texts(expected)
    assert state.forward_passes.tolist() == expected.forward_passes.tolist()


def test_what_does_not_fit_is_refused():
    model = tiny.model()
    other = Model(model.params, model.cfg, dataclasses.replace(model.tokenizer, vocab_size=300))
    for decoder, draft, said in [
        ("draft_model", None, "needs a draft model"),
        ("jacobi", model, "does not use a draft model"),
        ("draft_model", other, "its vocabulary differs from the model's"),
    ]:
        with pytest.raises(InputError, match=said):
            Decoder(model, decoder, draft=draft)
    for chain, said in [
        (tree.chain(RETRIEVAL, 2), "needs jacobi nodes"),
        (tree.chain(NOISE, 2), "needs jacobi nodes"),
        (tree.build([(0, JACOBI, 320)]), "the vocabulary has 320 tokens"),
    ]:
        with pytest.raises(InputError, match=said):
            Decoder(model, "draft_model", chain, model)
