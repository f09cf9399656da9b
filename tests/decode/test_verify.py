"""Verification against a plain Python walk, and sampling against the softmax."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from msn_jax.decode import tree as trees
from msn_jax.decode.tree import JACOBI
from msn_jax.decode.verify import Verified, cut, scores, verify


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
            count = int(verified.count[row])
            path = verified.path[row, :count].tolist()
            assert count == len(expected)
            assert path[-1] == int(verified.last[row])
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
    assert int(verified.count[0]) == 2
    assert verified.emitted[0, :2].tolist() == [7, 7]


def test_cut_at_stop_and_at_the_limit():
    verified = Verified(
        path=jnp.zeros((4, 4), jnp.int32),
        last=jnp.zeros((4,), jnp.int32),
        emitted=jnp.zeros((4, 4), jnp.int32),
        count=jnp.array([4, 4, 2, 4], jnp.int32),
    )
    is_stop = jnp.array([[0, 1, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], bool)
    assert cut(verified, is_stop, jnp.array([9, 3, 9, 0], jnp.int32)).count.tolist() == [2, 3, 2, 0]


def choose(logits, positions, sampler) -> np.ndarray:
    """The model's choices, [B, W]."""
    return np.argmax(jax.jit(scores)(jnp.asarray(logits), jnp.asarray(positions), sampler), axis=-1)


def test_temperature_zero_takes_the_best_whatever_the_filters_say():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 11))
    sampler = tiny.sampler(2, top_k=5, top_p=0.5, min_p=0.5)
    for temperature in (sampler.temperature, np.array([0, 1], np.float32)):
        found = scores(logits, jnp.zeros((2, 3), jnp.int32), sampler.replace(temperature=temperature))
        np.testing.assert_array_equal(found[0], logits[0])


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
