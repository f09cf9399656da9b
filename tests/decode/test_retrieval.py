"""Retrieval against a plain search through the text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msn_jax.decode.retrieval import LONGEST_MATCH, retrieve, retrieve_batch

pytestmark = pytest.mark.usefixtures("quick_compilation")


def search(text: list[int], branches: int, depth: int) -> tuple[list[list[int]], list[int]]:
    """Longest suffix match first, then the most recent; branches differ in their first token; and match lengths."""
    newest = len(text) - 1

    def matched(end: int) -> int:
        length = 0
        while length < LONGEST_MATCH and length <= end and text[end - length] == text[newest - length]:
            length += 1
        return length

    ends = sorted((e for e in range(newest) if matched(e)), key=lambda e: (matched(e), e), reverse=True)
    found, agreement, firsts = [], [], set()
    for end in ends:
        if text[end + 1] not in firsts and len(found) < branches:
            firsts.add(text[end + 1])
            longer = text[: newest + 1]
            for _ in range(depth):
                longer = [*longer, longer[end + 1 + len(longer) - newest - 1]]
            found.append(longer[newest + 1 :])
            agreement.append(matched(end))
    missing = branches - len(found)
    return found + [[-1] * depth] * missing, agreement + [0] * missing


def padded(text: list[int], slots: int) -> np.ndarray:
    """Behind the text lies what would match if it were looked at: the text's own last token."""
    return np.array(text + [text[-1]] * (slots - len(text)), np.int32)


def test_equals_the_search():
    rng = np.random.default_rng(0)
    for branches, depth in [(1, 1), (1, 6), (3, 2), (2, 5)]:
        texts = [rng.integers(0, rng.integers(1, 6), rng.integers(1, 40)).tolist() for _ in range(100)]
        tokens = jnp.asarray(np.stack([padded(text, 48) for text in texts]))
        lengths = jnp.array([len(text) for text in texts], jnp.int32)
        found, agreement = jax.jit(retrieve_batch, static_argnums=(2, 3))(tokens, lengths, branches, depth)
        for text, *ours in zip(texts, found.tolist(), agreement.tolist(), strict=True):
            assert tuple(ours) == search(text, branches, depth), (text, branches, depth)


def test_longest_match_beats_the_most_recent():
    text = [1, 2, 3, 9, 4, 3, 8, 1, 2, 3]
    assert retrieve(jnp.asarray(padded(text, 16)), jnp.int32(len(text)), 2, 2)[0].tolist() == [[9, 4], [8, 1]]


def test_a_run_goes_on():
    text = [5, 7, 7, 7]
    assert retrieve(jnp.asarray(padded(text, 16)), jnp.int32(4), 1, 5)[0].tolist() == [[7] * 5]


def test_no_match():
    assert retrieve(jnp.asarray(padded([1, 2, 3], 8)), jnp.int32(3), 1, 2)[0].tolist() == [[-1, -1]]
    assert retrieve(jnp.asarray(padded([1], 8)), jnp.int32(1), 1, 2)[0].tolist() == [[-1, -1]]


def test_rows_are_independent():
    texts = [[1, 2, 3, 1, 2], [4, 4, 4, 4], [9]]
    tokens = jnp.asarray(np.stack([padded(text, 16) for text in texts]))
    lengths = jnp.array([len(text) for text in texts], jnp.int32)
    together, _ = retrieve_batch(tokens, lengths, 1, 3)
    for row, text in enumerate(texts):
        assert together[row].tolist() == search(text, 1, 3)[0]
