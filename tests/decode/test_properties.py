"""Random models, trees, drafters, batches and settings: every text is that of autoregressive decoding."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loop import FOREVER, STOP, texts

from msn_jax import llama, masks
from msn_jax.config import LlamaConfig
from msn_jax.decode import draft_model, drafters, loop, tree, verify
from msn_jax.decode.tree import JACOBI, NOISE, RETRIEVAL, RETRIEVAL_OR_JACOBI, TokenTree
from msn_jax.decode.verify import Sampler

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS, CAPACITY, LONGEST_ANSWER = 48, 96, 40
EXAMPLES = 60
CLOSE = 1e-5  # scores that rounding may reorder
SHAPES = (
    dataclasses.replace(tiny.config(), n_layers=1),
    dataclasses.replace(tiny.config(vocab_size=40, n_kv_heads=4), n_layers=1, sliding_window=5, qk_norm=True),
)


def random_tree(rng: np.random.Generator, width: int) -> TokenTree:
    """All sources, any suffix, and tails behind two of its nodes."""
    nodes = [(0, JACOBI, 0)]
    for node in range(2, width):
        source = int(rng.choice([JACOBI, JACOBI, RETRIEVAL, NOISE, RETRIEVAL_OR_JACOBI]))
        nodes.append((int(rng.integers(0, node)), source, 0 if source == NOISE else int(rng.integers(0, 3))))
    whole = tree.build(nodes, min_match=int(rng.integers(1, 4)))
    return tree.with_noise_tails(whole, rng.choice(width, 2, replace=False).tolist(), 1) if width < 12 else whole


def random_drafters(cfg: LlamaConfig, seed: int) -> list[drafters.Drafter]:
    """All kinds. The small model has the shape of the large one, so that it may be the same one."""
    rng = np.random.default_rng(seed)
    return [
        drafters.get("jacobi" if seed else "prompt_lookup"),
        drafters.get("tr_jacobi"),
        *(drafters.self_drafter(f"tree of {width}", random_tree(rng, width)) for width in (5, 9, 14)),
        draft_model.drafter(random_tree(rng, 7), cfg),
    ]


PAIRS = [(cfg, drafter) for seed, cfg in enumerate(SHAPES) for drafter in random_drafters(cfg, seed)]


def random_sampler(rng: np.random.Generator) -> Sampler:
    """Greedy rows and sampled ones, every filter on and off."""

    def column(values: list, dtype: type) -> np.ndarray:
        return rng.choice(np.array(values, dtype), ROWS)

    return Sampler(
        temperature=column([0, 0, 0.6, 1.0, 1.7], np.float32),
        top_k=column([0, 1, 4], np.int32),
        top_p=column([1, 0.9, 0.5], np.float32),
        min_p=column([0, 0.1], np.float32),
        keys=jax.random.split(jax.random.key(int(rng.integers(1 << 31))), ROWS),
    )


def decode(cfg, params, drafter, weights, prompts, limits, sampler) -> loop.DecodeState:
    tokens, lengths = np.zeros((ROWS, CAPACITY), np.int32), np.array([len(prompt) for prompt in prompts], np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    state = loop.prefill(params, cfg, drafter, tokens, lengths, lengths + limits, sampler, 16, weights)
    return loop.decode(params, cfg, drafter, STOP, state, FOREVER, weights)


def gap(cfg: LlamaConfig, params: dict, text: list[int], sampler: Sampler, row: int) -> float:
    """By how much the best score behind `text` is better than the next one."""
    index = jnp.arange(len(text), dtype=jnp.int32)[None, :]
    hidden = llama.forward(params, cfg, jnp.array([text], jnp.int32), index, masks.causal(len(text))).hidden
    own = jax.tree.map(lambda column: column[row : row + 1], sampler)
    scores = verify.perturb_logits(llama.unembed(params, cfg, hidden[:, -1:]), index[:, -1:], own)
    best, next_best = jax.lax.top_k(scores[0, 0], 2)[0].tolist()
    return best - next_best


def test_every_text_is_that_of_autoregressive_decoding():
    """60 batches of 48 texts: 2,880."""
    count = collections.Counter()

    @settings(derandomize=True, deadline=None, max_examples=EXAMPLES, database=None)
    @given(st.sampled_from(PAIRS), st.integers(0, 2), st.integers(0, 2), st.integers(0, 1 << 31))
    def compare(pair, model_seed, small_seed, seed):
        (cfg, drafter), rng = pair, np.random.default_rng(seed)
        params = tiny.params(cfg, model_seed)
        weights = tiny.params(cfg, small_seed) if drafter.cfg is not None else None
        limits = rng.integers(0, LONGEST_ANSWER + 1, ROWS).astype(np.int32)
        batch = tiny.prompts(rng, ROWS, cfg.vocab_size), limits, random_sampler(rng)
        expected = decode(cfg, params, drafters.get("autoregressive"), None, *batch)
        state = decode(cfg, params, drafter, weights, *batch)
        for row, (ours, theirs) in enumerate(zip(texts(state), texts(expected), strict=True)):
            count["sequences"] += 1
            if ours != theirs:
                same = next(n for n, (a, b) in enumerate(zip([*ours, -1], [*theirs, -1], strict=False)) if a != b)
                assert gap(cfg, params, theirs[:same], batch[2], row) < CLOSE, (drafter.name, row, ours, theirs)
                count["excused"] += 1
        count["saved passes"] += int((expected.forward_passes - state.forward_passes).sum())
        new_tokens = np.asarray(state.lengths) - [len(prompt) for prompt in batch[0]]
        np.testing.assert_array_equal(state.accept_lengths.sum(axis=1), new_tokens)

    compare()
    assert count["sequences"] >= 2000
    assert count["excused"] == 0
    assert count["saved passes"] > count["sequences"]  # many drafts were right


@pytest.mark.parametrize("cfg", SHAPES, ids=["grouped", "windowed"])
def test_a_row_does_not_depend_on_its_batch(cfg):
    """In another order, and among other rows: the same tokens in as many passes, greedy and sampled."""
    drafter = next(drafter for known, drafter in PAIRS if known is cfg and drafter.name == "tree of 9")
    params, rng = tiny.params(cfg, 1), np.random.default_rng(3)
    prompts, limits = tiny.prompts(rng, ROWS, cfg.vocab_size), rng.integers(1, LONGEST_ANSWER, ROWS).astype(np.int32)
    sampler = random_sampler(rng)
    expected = decode(cfg, params, drafter, None, prompts, limits, sampler)
    for rows in (np.arange(ROWS)[::-1], np.repeat(np.arange(3), ROWS // 3), np.full(ROWS, 7), rng.permutation(ROWS)):
        chosen = jax.tree.map(lambda column, rows=rows: column[rows], sampler)
        state = decode(cfg, params, drafter, None, [prompts[row] for row in rows], limits[rows], chosen)
        assert texts(state) == [texts(expected)[row] for row in rows]
        assert state.forward_passes.tolist() == expected.forward_passes[rows].tolist()
