"""Draft quality of the draft model. `test_properties.py` tests, for all drafters, that output does not change."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from run_loop import UNLIMITED, sequences, start

from msn_jax.cli import InputError
from msn_jax.decode import draft_model, drafters, loop, tree
from msn_jax.decode.engine import Decoder
from msn_jax.decode.models import Model
from msn_jax.decode.tree import JACOBI, NOISE, RETRIEVAL

pytestmark = pytest.mark.usefixtures("quick_compilation")

CFG = tiny.config(n_layers=1)
NO_STOP = jnp.array([-1], jnp.int32)
CHAIN = draft_model.drafter(tree.chain(JACOBI, 3), CFG)


def run(drafter_params, temperature=0.0, drafter=CHAIN, capacity=128, passes=UNLIMITED):
    prompts = tiny.prompts(np.random.default_rng(1), 4, CFG.vocab_size)
    sampler = tiny.sampler(4, temperature)
    state = start(
        CFG, tiny.params(CFG, 0), drafter, prompts, [24] * 4, capacity, sampler, drafter_params=drafter_params
    )
    return loop.decode(tiny.params(CFG, 0), CFG, drafter, NO_STOP, state, passes, drafter_params)


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_every_draft_is_accepted_when_the_draft_model_is_the_target_model(temperature):
    """Under sampling too: drafts are perturbed by the same random bits."""
    state = run(tiny.params(CFG, 0), temperature)
    assert state.accept_lengths[:, :6].tolist() == [[4] * 6] * 4
    assert state.forward_passes.tolist() == [6] * 4


def test_another_draft_model_is_sometimes_accepted_and_changes_no_output():
    expected = run(None, drafter=drafters.get("autoregressive"))
    state = run(tiny.params(CFG, 2))
    assert sequences(state) == sequences(expected)
    assert 24 * 4 > int(state.forward_passes.sum()) > 6 * 4


def test_the_draft_cache_holds_the_accepted_tokens():
    """After every forward pass, the draft model's cache equals a prefill of the sequence without its newest token."""
    weights = tiny.params(CFG, 2)
    state = run(weights, passes=jnp.int32(0))
    for _ in range(4):
        state = loop.decode(tiny.params(CFG, 0), CFG, CHAIN, NO_STOP, state, jnp.int32(1), weights)
        np.testing.assert_array_equal(state.draft.cache.lengths, state.lengths - 1)
    prefilled = start(CFG, weights, drafters.get("autoregressive"), sequences(state), [9] * 4)
    for (keys, _), (expected, _) in zip(state.draft.cache.layers, prefilled.cache.layers, strict=True):
        for row, length in enumerate(state.draft.cache.lengths.tolist()):
            np.testing.assert_allclose(keys[row, :, :length], expected[row, :, :length], atol=1e-5)


def test_branches_hold_the_next_most_probable_tokens():
    """A tree with the second and third ranks at every depth is accepted more often than the chain."""
    branches = draft_model.drafter(tree.tr_jacobi_tree([(0, 0, 0), (0, 0, 1), (0, 1), (0, 2), (1,), (2,)], []), CFG)
    weights = tiny.params(CFG, 2)
    state = run(weights, drafter=branches)
    assert sequences(state) == sequences(run(weights))
    assert int(state.forward_passes.sum()) < int(run(weights).forward_passes.sum())


def test_decoding_with_growth_equals_one_run():
    weights = tiny.params(CFG, 2)
    state, expected = run(weights, capacity=32), run(weights)
    assert not state.done.all()
    while not state.done.all():
        state = loop.grow(CHAIN, state, 2 * state.capacity)
        state = loop.decode(tiny.params(CFG, 0), CFG, CHAIN, NO_STOP, state, UNLIMITED, weights)
    assert sequences(state) == sequences(expected)
    assert state.forward_passes.tolist() == expected.forward_passes.tolist()


def test_incompatible_models_and_trees_are_refused():
    model = tiny.model()
    other = Model(model.params, model.cfg, dataclasses.replace(model.tokenizer, vocab_size=300))
    for decoder, draft, message in [
        ("draft_model", None, "needs a draft model"),
        ("jacobi", model, "does not use a draft model"),
        ("draft_model", other, "its vocabulary differs from the model's"),
    ]:
        with pytest.raises(InputError, match=message):
            Decoder(model, decoder, draft=draft)
    for chain, message in [
        (tree.chain(RETRIEVAL, 2), "needs jacobi nodes"),
        (tree.chain(NOISE, 2), "needs jacobi nodes"),
        (tree.build([(0, JACOBI, 320)]), "the vocabulary has 320 tokens"),
    ]:
        with pytest.raises(InputError, match=message):
            Decoder(model, "draft_model", chain, model)
