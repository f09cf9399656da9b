"""Retrieval against a plain Python search through the sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msn_jax.decode import retrieval
from msn_jax.decode.retrieval import LONGEST_MATCH

pytestmark = pytest.mark.usefixtures("quick_compilation")
retrieve_batch = jax.jit(retrieval.retrieve_batch, static_argnums=(2, 3))
retrieve_row = jax.jit(retrieval.retrieve, static_argnums=(2, 3))


def retrieve(sequence: list[int], branches: int, depth: int) -> list[list[int]]:
    return retrieve_row(padded(sequence, 16), jnp.int32(len(sequence)), branches, depth)[0].tolist()


def search(sequence: list[int], branches: int, depth: int) -> tuple[list[list[int]], list[int]]:
    """Branches and their match lengths: longest suffix match first, then most recent; first tokens are distinct."""
    newest = len(sequence) - 1

    def matched(end: int) -> int:
        length = 0
        while length < LONGEST_MATCH and length <= end and sequence[end - length] == sequence[newest - length]:
            length += 1
        return length

    ends = sorted((e for e in range(newest) if matched(e)), key=lambda e: (matched(e), e), reverse=True)
    retrieved, match_lengths, firsts = [], [], set()
    for end in ends:
        if sequence[end + 1] not in firsts and len(retrieved) < branches:
            firsts.add(sequence[end + 1])
            longer = sequence[: newest + 1]
            for _ in range(depth):
                longer = [*longer, longer[end + 1 + len(longer) - newest - 1]]
            retrieved.append(longer[newest + 1 :])
            match_lengths.append(matched(end))
    missing = branches - len(retrieved)
    return retrieved + [[-1] * depth] * missing, match_lengths + [0] * missing


def padded(sequence: list[int], slots: int) -> np.ndarray:
    """Padding repeats the last token, so it would match if retrieval read it."""
    return np.array(sequence + [sequence[-1]] * (slots - len(sequence)), np.int32)


def test_retrieval_equals_the_search():
    rng = np.random.default_rng(0)
    for branches, depth in [(1, 1), (1, 6), (3, 2), (2, 5)]:
        sequences = [rng.integers(0, rng.integers(1, 6), rng.integers(1, 40)).tolist() for _ in range(100)]
        tokens = jnp.asarray(np.stack([padded(sequence, 48) for sequence in sequences]))
        lengths = jnp.array([len(sequence) for sequence in sequences], jnp.int32)
        retrieved, match_lengths = retrieve_batch(tokens, lengths, branches, depth)
        for sequence, *ours in zip(sequences, retrieved.tolist(), match_lengths.tolist(), strict=True):
            assert tuple(ours) == search(sequence, branches, depth), (sequence, branches, depth)


def test_the_longest_match_comes_before_the_most_recent():
    sequence = [1, 2, 3, 9, 4, 3, 8, 1, 2, 3]
    assert retrieve(sequence, 2, 2) == [[9, 4], [8, 1]]


def test_a_draft_may_run_past_the_end_of_the_sequence():
    assert retrieve([5, 7, 7, 7], 1, 5) == [[7] * 5]


def test_without_a_match_nothing_is_retrieved():
    assert retrieve([1, 2, 3], 1, 2) == [[-1, -1]]
    assert retrieve([1], 1, 2) == [[-1, -1]]


def test_a_row_does_not_depend_on_other_rows():
    sequences = [[1, 2, 3, 1, 2], [4, 4, 4, 4], [9]]
    tokens = jnp.asarray(np.stack([padded(sequence, 16) for sequence in sequences]))
    lengths = jnp.array([len(sequence) for sequence in sequences], jnp.int32)
    together, _ = retrieve_batch(tokens, lengths, 1, 3)
    for row, sequence in enumerate(sequences):
        assert together[row].tolist() == search(sequence, 1, 3)[0]
