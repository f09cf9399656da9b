"""Random models, trees, drafters, batches and settings: output always equals autoregressive decoding."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_loop
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from msn_jax import llama, masks
from msn_jax.config import LlamaConfig
from msn_jax.decode import draft_model, drafters, loop, tree, verify
from msn_jax.decode.tree import JACOBI, NOISE, RETRIEVAL, RETRIEVAL_OR_JACOBI, TokenTree
from msn_jax.decode.verify import Sampler

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS, CAPACITY, MAX_NEW = 48, 96, 40
CLOSE = 1e-5  # perturbed logits this close may be reordered by rounding
SHAPES = (
    tiny.config(n_layers=1),
    dataclasses.replace(tiny.config(vocab_size=40, n_kv_heads=4, n_layers=1), sliding_window=5, qk_norm=True),
)


def random_tree(rng: np.random.Generator, width: int) -> TokenTree:
    """All sources, any `min_match`; trees of less than 12 nodes get noise tails at two of them."""
    sources = [JACOBI, JACOBI, RETRIEVAL, NOISE, RETRIEVAL_OR_JACOBI]
    nodes = [(0, JACOBI, 0), *tiny.random_nodes(rng, width, sources, first=2)]
    drawn = tree.build(nodes, min_match=int(rng.integers(1, 4)))
    return tiny.with_noise_tails(drawn, rng.choice(width, 2, replace=False).tolist(), 1) if width < 12 else drawn


def random_drafters(cfg: LlamaConfig, seed: int) -> list[drafters.Drafter]:
    """All kinds. The draft model has the shape of the target model, so that both can have the same weights."""
    rng = np.random.default_rng(seed)
    return [
        drafters.get("jacobi" if seed else "prompt_lookup"),
        drafters.get("tr_jacobi"),
        *(drafters.self_drafter(f"tree of {width}", random_tree(rng, width)) for width in (5, 9, 14)),
        draft_model.drafter(random_tree(rng, 7), cfg),
    ]


PAIRS = [(cfg, drafter) for seed, cfg in enumerate(SHAPES) for drafter in random_drafters(cfg, seed)]


def random_sampler(rng: np.random.Generator) -> Sampler:
    """Greedy rows and sampled ones, with every filter on and off."""

    def column(values: list, dtype: type) -> np.ndarray:
        return rng.choice(np.array(values, dtype), ROWS)

    return Sampler(
        temperature=column([0, 0, 0.6, 1.0, 1.7], np.float32),
        top_k=column([0, 1, 4], np.int32),
        top_p=column([1, 0.9, 0.5], np.float32),
        min_p=column([0, 0.1], np.float32),
        keys=jax.random.split(jax.random.key(int(rng.integers(1 << 31))), ROWS),
    )


def decode(cfg, params, drafter, drafter_params, prompts, limits, sampler) -> loop.DecodeState:
    return run_loop.run(cfg, params, drafter, prompts, limits, sampler, drafter_params, CAPACITY)


def gap(cfg: LlamaConfig, params: dict, tokens: list[int], sampler: Sampler, row: int) -> float:
    """Difference of the two highest perturbed logits after `tokens`."""
    index = jnp.arange(len(tokens), dtype=jnp.int32)[None, :]
    hidden = llama.forward(params, cfg, jnp.array([tokens], jnp.int32), index, masks.causal(len(tokens))).hidden
    own = jax.tree.map(lambda column: column[row : row + 1], sampler)
    perturbed_logits = verify.perturb_logits(llama.unembed(params, cfg, hidden[:, -1:]), index[:, -1:], own)
    best, next_best = jax.lax.top_k(perturbed_logits[0, 0], 2)[0].tolist()
    return best - next_best


def test_every_drafter_equals_autoregressive_decoding():
    """60 batches of 48 sequences: 2,880."""
    count = collections.Counter()

    @settings(derandomize=True, deadline=None, max_examples=60, database=None)
    @given(st.sampled_from(PAIRS), st.integers(0, 2), st.integers(0, 2), st.integers(0, 1 << 31))
    def compare(pair, model_seed, draft_seed, seed):
        (cfg, drafter), rng = pair, np.random.default_rng(seed)
        params = tiny.params(cfg, model_seed)
        drafter_params = tiny.params(cfg, draft_seed) if drafter.cfg is not None else None
        limits = rng.integers(0, MAX_NEW + 1, ROWS).astype(np.int32)
        batch = tiny.prompts(rng, ROWS, cfg.vocab_size), limits, random_sampler(rng)
        expected = decode(cfg, params, drafters.get("autoregressive"), None, *batch)
        state = decode(cfg, params, drafter, drafter_params, *batch)
        for row, (ours, theirs) in enumerate(zip(run_loop.sequences(state), run_loop.sequences(expected), strict=True)):
            count["sequences"] += 1
            if ours != theirs:
                common = next(n for n, (a, b) in enumerate(zip([*ours, -1], [*theirs, -1], strict=False)) if a != b)
                assert gap(cfg, params, theirs[:common], batch[2], row) < CLOSE, (drafter.name, row, ours, theirs)
                count["excused"] += 1
        count["saved passes"] += int((expected.forward_passes - state.forward_passes).sum())
        new_tokens = np.asarray(state.lengths) - [len(prompt) for prompt in batch[0]]
        np.testing.assert_array_equal(state.accept_lengths.sum(axis=1), new_tokens)

    compare()
    assert count["sequences"] >= 2000
    assert count["excused"] == 0
    assert count["saved passes"] > count["sequences"]  # many drafts are accepted


@pytest.mark.parametrize("cfg", SHAPES, ids=["grouped", "windowed"])
def test_a_row_does_not_depend_on_its_batch(cfg):
    """Reordered, or among other rows: the same tokens in the same number of forward passes, greedy and sampled."""
    drafter = next(drafter for known, drafter in PAIRS if known is cfg and drafter.name == "tree of 9")
    params, rng = tiny.params(cfg, 1), np.random.default_rng(3)
    prompts, limits = tiny.prompts(rng, ROWS, cfg.vocab_size), rng.integers(1, MAX_NEW, ROWS).astype(np.int32)
    sampler = random_sampler(rng)
    expected = decode(cfg, params, drafter, None, prompts, limits, sampler)
    for rows in (np.arange(ROWS)[::-1], np.repeat(np.arange(3), ROWS // 3), np.full(ROWS, 7), rng.permutation(ROWS)):
        chosen = jax.tree.map(lambda column, rows=rows: column[rows], sampler)
        state = decode(cfg, params, drafter, None, [prompts[row] for row in rows], limits[rows], chosen)
        assert run_loop.sequences(state) == [run_loop.sequences(expected)[row] for row in rows]
        assert state.forward_passes.tolist() == expected.forward_passes[rows].tolist()
