"""Verification against a plain Python search, and sampling against the softmax."""

import itertools

import chi_square
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from msn_jax import cpu, llama, masks
from msn_jax.decode import drafters, loop
from msn_jax.decode import tree as trees
from msn_jax.decode.tree import JACOBI
from msn_jax.decode.verify import Verified, perturb_logits, truncate, verify

pytestmark = pytest.mark.usefixtures("quick_compilation")


def longest_accepted_path(tree: trees.TokenTree, tokens: list[int], targets: list[int]) -> list[int]:
    """The longest path of matching drafts, by trying every node."""
    best = [0]
    for node in range(tree.width):
        path = [node]
        while path[0] != 0:
            path.insert(0, tree.parents[path[0]])
        matches = all(tokens[child] == targets[parent] for parent, child in itertools.pairwise(path))
        if matches and len(path) > len(best):
            best = path
    return best


def test_verify_equals_a_search_over_all_paths():
    rng = np.random.default_rng(0)
    accepted = 0
    for _ in range(12):
        tree = trees.build(tiny.random_nodes(rng, int(rng.integers(1, 16)), [JACOBI]))
        tokens = rng.integers(0, 3, (64, tree.width)).astype(np.int32)  # only three tokens: many ties and repetitions
        targets = rng.integers(0, 3, (64, tree.width)).astype(np.int32)
        verified = jax.jit(verify, static_argnums=0)(tree, jnp.asarray(tokens), jnp.asarray(targets))
        verified = jax.tree.map(np.asarray, verified)
        for row in range(64):
            expected = longest_accepted_path(tree, tokens[row].tolist(), targets[row].tolist())
            count = int(verified.num_emitted[row])
            path = verified.path[row, :count].tolist()
            assert count == len(expected)
            assert path[-1] == int(verified.last_accepted[row])
            # another path of the same length may win a tie, but its tokens are the same
            assert tokens[row, path[1:]].tolist() == tokens[row, expected[1:]].tolist()
            assert verified.emitted[row, : count - 1].tolist() == tokens[row, path[1:]].tolist()
            assert int(verified.emitted[row, count - 1]) == targets[row, path[-1]]
            accepted += count - 1
    assert accepted > 500


def test_padding_of_paths_is_never_compared():
    # The root's token equals the target at its child: a path padded with the root would be accepted one node too deep.
    tree = trees.build([(0, JACOBI, 0), (0, JACOBI, 1), (2, JACOBI, 0)])
    verified = verify(tree, jnp.array([[7, 7, 5, 1]], jnp.int32), jnp.array([[7, 7, 7, 7]], jnp.int32))
    assert int(verified.num_emitted[0]) == 2
    assert verified.emitted[0, :2].tolist() == [7, 7]


def test_truncation_at_stop_tokens_and_at_the_limit():
    verified = Verified(
        path=jnp.zeros((4, 4), jnp.int32),
        last_accepted=jnp.zeros((4,), jnp.int32),
        emitted=jnp.zeros((4, 4), jnp.int32),
        num_emitted=jnp.array([4, 4, 2, 4], jnp.int32),
    )
    is_stop = jnp.array([[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], bool)
    assert truncate(verified, is_stop, jnp.array([9, 3, 9, 0], jnp.int32)).num_emitted.tolist() == [2, 3, 2, 0]


def target_tokens(logits, positions, sampler) -> np.ndarray:
    """int [B, W]."""
    return np.argmax(jax.jit(perturb_logits)(jnp.asarray(logits), jnp.asarray(positions), sampler), axis=-1)


def test_argmax_takes_the_first_of_tied_tokens():
    rng = np.random.default_rng(0)
    many_ties = rng.integers(0, 3, (4, 5, 11)).astype(np.float32)
    many_ties[0, 0] = -np.inf
    np.testing.assert_array_equal(cpu.argmax(many_ties), np.argmax(many_ties, axis=-1))
    for logits in (np.full(7, np.nan), np.array([0.0, np.nan, 1.0]), np.array([0.0, np.inf])):
        assert int(cpu.argmax(logits.astype(np.float32))) == len(logits)  # not a token


def test_temperature_zero_is_greedy_with_any_filters():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 11))
    sampler = tiny.sampler(2, top_k=5, top_p=0.5, min_p=0.5)
    for temperature in (sampler.temperature, np.array([0, 1], np.float32)):
        mixed = sampler.replace(temperature=temperature)
        perturbed_logits = perturb_logits(logits, jnp.zeros((2, 3), jnp.int32), mixed)
        np.testing.assert_array_equal(perturbed_logits[0], logits[0])


@pytest.mark.parametrize("temperature", [1e-40, 1.2e-38, 5e-38, 1e-37, 1e-20])
@pytest.mark.parametrize("filters", [{}, {"min_p": 0.1}, {"top_k": 3, "top_p": 0.5}])
def test_a_temperature_near_zero_is_greedy(temperature, filters):
    logits = 9 * jax.random.normal(jax.random.key(0), (1, 50, 11))
    targets = target_tokens(logits, np.arange(50, dtype=np.int32)[None, :], tiny.sampler(1, temperature, **filters))
    np.testing.assert_array_equal(targets, jnp.argmax(logits, axis=-1))


def test_rows_of_a_batch_may_differ_in_temperature():
    logits = np.broadcast_to(np.linspace(0, 0.1, 11, dtype=np.float32), (2, 200, 11))
    sampler = tiny.sampler(2).replace(temperature=np.array([0.0, 1.0], np.float32))
    greedy, sampled = target_tokens(logits, np.tile(np.arange(200, dtype=np.int32), (2, 1)), sampler)
    assert (greedy == 10).all()
    assert len(set(sampled.tolist())) == 11


def test_a_sample_depends_only_on_request_and_position():
    logits = jax.random.normal(jax.random.key(0), (1, 1, 50))
    sampler = tiny.sampler(1, 1.0)
    wide = target_tokens(jnp.tile(logits, (1, 4, 1)), np.array([[5, 6, 7, 6]], np.int32), sampler)[0]
    alone = [int(target_tokens(logits, np.array([[position]], np.int32), sampler)[0, 0]) for position in (5, 6, 7, 6)]
    assert wide.tolist() == alone
    assert wide[1] == wide[3]


def kept_by(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """bool [V]: tokens kept by the logits warpers of transformers, in their order, in NumPy and float64."""
    logits = logits.astype(np.float64) / temperature
    if top_k:
        logits = np.where(logits < np.sort(logits)[-min(top_k, len(logits))], -np.inf, logits)
    if top_p < 1:
        ascending = np.argsort(logits, kind="stable")
        probable = np.exp(logits[ascending] - logits.max())
        removed = np.cumsum(probable / probable.sum()) <= 1 - top_p
        removed[-1] = False
        logits[ascending[removed]] = -np.inf
    probable = np.exp(logits - logits.max())
    return (probable >= min_p) & np.isfinite(logits)


def softmax_of_kept(logits: np.ndarray, temperature: float, *filters: float) -> np.ndarray:
    weights = np.where(kept_by(logits, temperature, *filters), np.exp(logits.astype(np.float64) / temperature), 0)
    return weights / weights.sum()


def test_filters_keep_the_tokens_that_transformers_keeps():
    rng, count = np.random.default_rng(0), 2000
    logits = rng.normal(0, 2, (count, 1, 29)).astype(np.float32)
    sampler = tiny.sampler(count).replace(
        temperature=rng.uniform(0.3, 3, count).astype(np.float32),
        top_k=rng.choice(np.array([0, 1, 2, 5, 20, 29, 50], np.int32), count),
        top_p=rng.choice(np.array([1, 0.99, 0.9, 0.5, 0.1, 1e-6], np.float32), count),
        min_p=rng.choice(np.array([0, 0.01, 0.1, 0.5, 1], np.float32), count),
    )
    filtered = np.asarray(jax.jit(perturb_logits)(logits, np.zeros((count, 1), np.int32), sampler))[:, 0]
    off = sampler.replace(top_k=np.zeros_like(sampler.top_k), top_p=np.ones_like(sampler.top_p))
    off = off.replace(min_p=np.zeros_like(sampler.min_p))
    unfiltered = np.asarray(jax.jit(perturb_logits)(logits, np.zeros((count, 1), np.int32), off))[:, 0]
    assert np.isfinite(unfiltered).all()
    sizes = set()
    for row in range(count):
        settings = (column[row] for column in (sampler.temperature, sampler.top_k, sampler.top_p, sampler.min_p))
        kept = kept_by(logits[row, 0], *settings)
        np.testing.assert_array_equal(np.isfinite(filtered[row]), kept)
        np.testing.assert_array_equal(filtered[row, kept], unfiltered[row, kept])
        sizes.add(int(kept.sum()))
    assert sizes >= set(range(1, 20))


def test_the_most_probable_token_is_always_kept():
    """Even where float32 rounds top_p to 0."""
    sampler = tiny.sampler(1, 1.0, top_p=1e-60, min_p=1.0)
    logits = np.array([[[1.0, 3.0, 2.0]]], np.float32)
    assert np.isfinite(perturb_logits(logits, np.zeros((1, 1), np.int32), sampler)).tolist() == [[[False, True, False]]]


@pytest.mark.parametrize("name", ["autoregressive", "jacobi"])
@pytest.mark.parametrize("filters", [(0, 1.0, 0.0), (8, 0.9, 0.05)], ids=["plain", "filtered"])
def test_samples_follow_the_softmax(name, filters):
    """51,200 tokens through the whole loop, from a model whose logits do not depend on the context."""
    cfg, rows, length, temperature = tiny.config(vocab_size=11, n_kv_heads=4), 128, 400, 0.8
    params = dict(tiny.params(cfg, 0))
    params["embed"] = jnp.broadcast_to(params["embed"][:1], params["embed"].shape)  # all contexts look the same
    params["unembed"] = params["unembed"] * 2
    drafter, tokens = drafters.get(name), np.zeros((rows, 512), np.int32)
    ones = np.ones(rows, np.int32)
    state = loop.prefill(
        params, cfg, drafter, tokens, ones, ones + length, tiny.sampler(rows, temperature, *filters, seed=5), 64
    )
    state = loop.decode(params, cfg, drafter, np.array([-1]), state, np.int32(10_000))
    drawn = np.asarray(state.tokens)[:, 1 : length + 1]
    assert drawn.size == 51_200 and (state.lengths == length + 1).all()
    first = jnp.zeros((1, 1), jnp.int32)
    logits = llama.unembed(params, cfg, llama.forward(params, cfg, first, first, masks.causal(1)).hidden)[0, 0]
    expected = softmax_of_kept(np.asarray(logits), temperature, *filters)
    assert (expected > 0).sum() >= 5
    assert chi_square.z_score(np.bincount(drawn.ravel(), minlength=11), expected) < 4.8
    pairs = drawn[:, 0::2] * 11 + drawn[:, 1::2]  # a token is independent of the one before it
    assert chi_square.z_score(np.bincount(pairs.ravel(), minlength=121), np.outer(expected, expected).ravel()) < 4.8
