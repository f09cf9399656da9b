"""Verification against a plain Python walk, and sampling against the softmax."""

import itertools

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


def walk(tree: trees.TokenTree, tokens: list[int], choices: list[int]) -> list[int]:
    """The longest path of right guesses, found by trying every node."""
    best = [0]
    for node in range(tree.width):
        path = [node]
        while path[0] != 0:
            path.insert(0, tree.parents[path[0]])
        right = all(tokens[child] == choices[parent] for parent, child in itertools.pairwise(path))
        if right and len(path) > len(best):
            best = path
    return best


def random_tree(rng: np.random.Generator, width: int) -> trees.TokenTree:
    return trees.build([(int(rng.integers(0, node)), JACOBI, 0) for node in range(1, width)])


def test_verify_is_the_walk():
    rng = np.random.default_rng(0)
    accepted = 0
    for _ in range(12):
        tree = random_tree(rng, int(rng.integers(1, 16)))
        tokens = rng.integers(0, 3, (64, tree.width)).astype(np.int32)  # three tokens only: many ties and repetitions
        choices = rng.integers(0, 3, (64, tree.width)).astype(np.int32)
        verified = jax.jit(verify, static_argnums=0)(tree, jnp.asarray(tokens), jnp.asarray(choices))
        verified = jax.tree.map(np.asarray, verified)
        for row in range(64):
            expected = walk(tree, tokens[row].tolist(), choices[row].tolist())
            count = int(verified.num_emitted[row])
            path = verified.path[row, :count].tolist()
            assert count == len(expected)
            assert path[-1] == int(verified.last_accepted[row])
            # another path of the same length may win a tie, but it says the same words
            assert tokens[row, path[1:]].tolist() == tokens[row, expected[1:]].tolist()
            assert verified.emitted[row, : count - 1].tolist() == tokens[row, path[1:]].tolist()
            assert int(verified.emitted[row, count - 1]) == choices[row, path[-1]]
            accepted += count - 1
    assert accepted > 500


def test_padding_is_never_compared():
    # The root's token equals the choice at its child: a path padded with the root would be accepted one too deep.
    tree = trees.build([(0, JACOBI, 0), (0, JACOBI, 1), (2, JACOBI, 0)])
    verified = verify(tree, jnp.array([[7, 7, 5, 1]], jnp.int32), jnp.array([[7, 7, 7, 7]], jnp.int32))
    assert int(verified.num_emitted[0]) == 2
    assert verified.emitted[0, :2].tolist() == [7, 7]


def test_cut_at_stop_and_at_the_limit():
    verified = Verified(
        path=jnp.zeros((4, 4), jnp.int32),
        last_accepted=jnp.zeros((4,), jnp.int32),
        emitted=jnp.zeros((4, 4), jnp.int32),
        num_emitted=jnp.array([4, 4, 2, 4], jnp.int32),
    )
    is_stop = jnp.array([[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], bool)
    assert truncate(verified, is_stop, jnp.array([9, 3, 9, 0], jnp.int32)).num_emitted.tolist() == [2, 3, 2, 0]


def choose(logits, positions, sampler) -> np.ndarray:
    """The model's choices, [B, W]."""
    return np.argmax(jax.jit(perturb_logits)(jnp.asarray(logits), jnp.asarray(positions), sampler), axis=-1)


def test_the_first_of_equally_good_tokens_is_the_best():
    rng = np.random.default_rng(0)
    many_ties = rng.integers(0, 3, (4, 5, 11)).astype(np.float32)
    many_ties[0, 0] = -np.inf
    np.testing.assert_array_equal(cpu.argmax(many_ties), np.argmax(many_ties, axis=-1))
    for bad in (np.full(7, np.nan), np.array([0.0, np.nan, 1.0]), np.array([0.0, np.inf])):
        assert int(cpu.argmax(bad.astype(np.float32))) == len(bad)  # no token


def test_temperature_zero_takes_the_best_whatever_the_filters_say():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 11))
    sampler = tiny.sampler(2, top_k=5, top_p=0.5, min_p=0.5)
    for temperature in (sampler.temperature, np.array([0, 1], np.float32)):
        found = perturb_logits(logits, jnp.zeros((2, 3), jnp.int32), sampler.replace(temperature=temperature))
        np.testing.assert_array_equal(found[0], logits[0])


@pytest.mark.parametrize("temperature", [1e-40, 1.2e-38, 5e-38, 1e-37, 1e-20])
@pytest.mark.parametrize("filters", [{}, {"min_p": 0.1}, {"top_k": 3, "top_p": 0.5}])
def test_a_temperature_next_to_zero_takes_the_best(temperature, filters):
    logits = 9 * jax.random.normal(jax.random.key(0), (1, 50, 11))
    choices = choose(logits, np.arange(50, dtype=np.int32)[None, :], tiny.sampler(1, temperature, **filters))
    np.testing.assert_array_equal(choices, jnp.argmax(logits, axis=-1))


def test_rows_of_one_batch_may_differ_in_temperature():
    logits = np.broadcast_to(np.linspace(0, 0.1, 11, dtype=np.float32), (2, 200, 11))
    sampler = tiny.sampler(2).replace(temperature=np.array([0.0, 1.0], np.float32))
    greedy, sampled = choose(logits, np.tile(np.arange(200, dtype=np.int32), (2, 1)), sampler)
    assert (greedy == 10).all()
    assert len(set(sampled.tolist())) == 11


def test_a_sample_depends_on_request_and_position_alone():
    logits = jax.random.normal(jax.random.key(0), (1, 1, 50))
    sampler = tiny.sampler(1, 1.0)
    wide = choose(jnp.tile(logits, (1, 4, 1)), np.array([[5, 6, 7, 6]], np.int32), sampler)[0]
    alone = [int(choose(logits, np.array([[position]], np.int32), sampler)[0, 0]) for position in (5, 6, 7, 6)]
    assert wide.tolist() == alone
    assert wide[1] == wide[3]


def kept_by(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """bool [V]: what transformers' warpers leave, in their order; in NumPy and float64, by their definitions."""
    logits = logits.astype(np.float64) / temperature
    if top_k:
        logits = np.where(logits < np.sort(logits)[-min(top_k, len(logits))], -np.inf, logits)
    if top_p < 1:
        ascending = np.argsort(logits, kind="stable")
        probable = np.exp(logits[ascending] - logits.max())
        gone = np.cumsum(probable / probable.sum()) <= 1 - top_p
        gone[-1] = False
        logits[ascending[gone]] = -np.inf
    probable = np.exp(logits - logits.max())
    return (probable >= min_p) & np.isfinite(logits)


def softmax_of_kept(logits: np.ndarray, temperature: float, *filters: float) -> np.ndarray:
    weights = np.where(kept_by(logits, temperature, *filters), np.exp(logits.astype(np.float64) / temperature), 0)
    return weights / weights.sum()


def test_filters_keep_what_transformers_keeps():
    rng, count = np.random.default_rng(0), 2000
    logits = rng.normal(0, 2, (count, 1, 29)).astype(np.float32)
    sampler = tiny.sampler(count).replace(
        temperature=rng.uniform(0.3, 3, count).astype(np.float32),
        top_k=rng.choice(np.array([0, 1, 2, 5, 20, 29, 50], np.int32), count),
        top_p=rng.choice(np.array([1, 0.99, 0.9, 0.5, 0.1, 1e-6], np.float32), count),
        min_p=rng.choice(np.array([0, 0.01, 0.1, 0.5, 1], np.float32), count),
    )
    found = np.asarray(jax.jit(perturb_logits)(logits, np.zeros((count, 1), np.int32), sampler))[:, 0]
    off = sampler.replace(top_k=np.zeros_like(sampler.top_k), top_p=np.ones_like(sampler.top_p))
    off = off.replace(min_p=np.zeros_like(sampler.min_p))
    whole = np.asarray(jax.jit(perturb_logits)(logits, np.zeros((count, 1), np.int32), off))[:, 0]
    assert np.isfinite(whole).all()
    sizes = set()
    for row in range(count):
        settings = (column[row] for column in (sampler.temperature, sampler.top_k, sampler.top_p, sampler.min_p))
        kept = kept_by(logits[row, 0], *settings)
        np.testing.assert_array_equal(np.isfinite(found[row]), kept)
        np.testing.assert_array_equal(found[row, kept], whole[row, kept])
        sizes.add(int(kept.sum()))
    assert sizes >= set(range(1, 20))


def test_the_best_token_always_stays():
    """Even where float32 rounds the shares to nothing."""
    sampler = tiny.sampler(1, 1.0, top_p=1e-60, min_p=1.0)
    logits = np.array([[[1.0, 3.0, 2.0]]], np.float32)
    assert np.isfinite(perturb_logits(logits, np.zeros((1, 1), np.int32), sampler)).tolist() == [[[False, True, False]]]


@pytest.mark.parametrize("name", ["autoregressive", "jacobi"])
@pytest.mark.parametrize("filters", [(0, 1.0, 0.0), (8, 0.9, 0.05)], ids=["plain", "filtered"])
def test_samples_follow_the_softmax(name, filters):
    """51,200 tokens through the whole loop, of a model whose logits do not depend on the text."""
    cfg, rows, length, temperature = tiny.config(vocab_size=11, n_kv_heads=4), 128, 400, 0.8
    params = dict(tiny.params(cfg, 0))
    params["embed"] = jnp.broadcast_to(params["embed"][:1], params["embed"].shape)  # all texts look the same
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
    assert chi_square(np.bincount(drawn.ravel(), minlength=11), expected) < 4.8
    pairs = drawn[:, 0::2] * 11 + drawn[:, 1::2]  # and a token does not depend on the one before it
    assert chi_square(np.bincount(pairs.ravel(), minlength=121), np.outer(expected, expected).ravel()) < 4.8


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """By how many standard deviations chi-square exceeds its mean; what cannot be must not have been drawn."""
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] * counts.sum()
    statistic, degrees = ((counts[possible] - expected) ** 2 / expected).sum(), possible.sum() - 1
    return (statistic - degrees) / np.sqrt(2 * degrees)
