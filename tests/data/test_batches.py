"""Packing, and the order of batches."""

import dataclasses
import subprocess
import sys

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msn_jax.cli import InputError
from msn_jax.data import batches

ROW_LENGTH = 16


def make_samples(shapes):
    """One sample per (prompt length, response length); every token of all samples is different and positive."""
    samples, first = [], 1
    for prompt, response in shapes:
        length = prompt + response
        samples.append((np.arange(first, first + length, dtype=np.int32), np.arange(length) >= prompt))
        first += length
    return samples


def segments(rows):
    """(tokens, response mask) of every segment of every row, after checking the row's structure."""
    parts = []
    for row in range(len(rows)):
        ids = rows.segment_ids[row]
        count = ids.max()
        used = int(np.sum(ids > 0))
        assert ids[:used].tolist() == sorted(ids[:used]) and set(ids[:used]) == set(range(1, count + 1))
        assert not rows.tokens[row, used:].any() and not rows.positions[row, used:].any()
        assert not ids[used:].any() and not rows.response_mask[row, used:].any()
        for segment in range(1, count + 1):
            span = ids == segment
            assert rows.positions[row, span].tolist() == list(range(span.sum()))
            parts.append((rows.tokens[row, span], rows.response_mask[row, span]))
    return parts


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(3)
    return batches.pack(make_samples(rng.integers(1, 6, (40, 2)).tolist()), ROW_LENGTH, "test")


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@settings(max_examples=100, deadline=None)
@given(shapes=st.lists(st.tuples(st.integers(2, 20), st.integers(1, 20)), min_size=1, max_size=40))
def test_every_sample_is_packed_exactly_once(shapes):
    samples = make_samples(shapes)
    fitting = [(t[:ROW_LENGTH], m[:ROW_LENGTH]) for t, m in samples if m[:ROW_LENGTH].any()]
    if not fitting:
        return
    rows = batches.pack(samples, ROW_LENGTH, "test")
    packed = {int(tokens[0]): (tokens, mask) for tokens, mask in segments(rows)}
    assert len(segments(rows)) == len(fitting)
    for tokens, mask in fitting:
        np.testing.assert_array_equal(packed[int(tokens[0])][0], tokens)
        np.testing.assert_array_equal(packed[int(tokens[0])][1], mask)
    assert rows.stats == batches.PackStats(
        samples=len(fitting),
        truncated=sum(len(t) > ROW_LENGTH for t, m in samples if m[:ROW_LENGTH].any()),
        dropped=len(samples) - len(fitting),
        fill=np.mean(rows.segment_ids > 0),
    )


def test_packing_of_an_example():
    rows = batches.pack(make_samples([(2, 3), (4, 5), (1, 1)]), 10, "test")
    # Longest first, 9 then 5; the short sample goes into the fullest row that has space for it.
    used = sorted((rows.segment_ids > 0).sum(axis=1).tolist())
    assert used == [7, 9]
    row = int(np.argmin((rows.segment_ids > 0).sum(axis=1)))
    assert rows.tokens[row].tolist() == [1, 2, 3, 4, 5, 15, 16, 0, 0, 0]
    assert rows.positions[row].tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 0, 0]
    assert rows.segment_ids[row].tolist() == [1, 1, 1, 1, 1, 2, 2, 0, 0, 0]
    assert rows.response_mask[row].tolist() == [x == 1 for x in (0, 0, 1, 1, 1, 0, 1, 0, 0, 0)]
    assert [a.dtype for a in (rows.tokens, rows.positions, rows.segment_ids)] == [np.int32] * 3
    assert rows.response_mask.dtype == np.bool_


def test_packing_fills_the_rows():
    shapes = np.random.default_rng(0).integers(1, 8, (20_000, 2)).tolist()
    rows = batches.pack(make_samples(shapes), ROW_LENGTH, "test")
    assert rows.stats.fill > 0.99
    fullest = batches.pack(make_samples([(1, 5), (1, 6), (1, 2)]), 10, "test")  # 3 fits after 6 and, better, after 7
    assert sorted((fullest.segment_ids > 0).sum(axis=1).tolist()) == [6, 10]


def test_long_text_is_split_into_consecutive_pieces():
    (sample,) = make_samples([(1, 38)])
    rows = batches.pack([sample], ROW_LENGTH, "test")
    pieces = sorted(segments(rows), key=lambda piece: piece[0][0])
    assert [len(tokens) for tokens, _ in pieces] == [16, 16, 7]
    np.testing.assert_array_equal(np.concatenate([tokens for tokens, _ in pieces]), sample[0])
    assert all(not mask[0] and mask[1:].all() for _, mask in pieces)
    assert rows.stats.samples == 1 and rows.stats.truncated == 0
    assert sample[1].tolist() == [False] + [True] * 38  # the caller's mask is unchanged


def test_nothing_to_pack_is_an_error():
    with pytest.raises(InputError) as caught:
        batches.pack([], ROW_LENGTH, "chat.jsonl")
    assert str(caught.value) == "chat.jsonl: no records in this split: give more data"
    with pytest.raises(InputError) as caught:
        batches.pack(make_samples([(20, 5), (16, 3)]), ROW_LENGTH, "chat.jsonl")
    assert str(caught.value) == (
        "chat.jsonl: none of the 2 samples has a response within 16 tokens: raise --config.data.row_length"
    )


def test_every_epoch_has_every_row_in_a_new_order(rows):
    def epochs(seed):
        source = batches.TrainBatches(rows, seed, batch_size=1)
        order = [tuple(source[step].tokens[0]) for step in range(2 * len(rows))]
        return order[: len(rows)], order[len(rows) :]

    first, second = epochs(seed=5)
    assert sorted(first) == sorted(second) == sorted(map(tuple, rows.tokens))
    assert first != second
    assert epochs(seed=5) == (first, second)
    assert epochs(seed=6)[0] != first


def test_a_batch_repeats_rows_where_there_are_too_few():
    rows = batches.pack(make_samples([(2, 9), (2, 10)]), ROW_LENGTH, "test")
    batch = batches.TrainBatches(rows, seed=0, batch_size=8)[0]
    assert sorted(batch.tokens[:, 0].tolist()) == [1] * 4 + [12] * 4


def test_the_fingerprint_changes_with_every_array(rows):
    changed = [rows]
    for name in ("tokens", "segment_ids", "response_mask"):
        array = getattr(rows, name).copy()
        array[1, 2] ^= 1
        changed.append(dataclasses.replace(rows, **{name: array}))
    assert len({other.fingerprint() for other in changed}) == 4
    assert dataclasses.replace(rows, tokens=rows.tokens.copy()).fingerprint() == rows.fingerprint()


def test_the_iterator_resumes_from_its_saved_state(rows, tmp_path):
    source = batches.TrainBatches(rows, seed=1, batch_size=4)
    iterator = batches.train_iterator(rows, seed=1, batch_size=4)
    for step in range(3):
        assert_same(next(iterator), source[step])
    assert iterator.get_state() == {"next_index": 3}
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        expected = [next(iterator) for _ in range(4)]
        resumed = batches.train_iterator(rows, seed=1, batch_size=4)
        manager.restore(3, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed)))
    later = batches.train_iterator(rows, seed=1, batch_size=4)
    later.set_state({"next_index": 3})
    for batch in expected:
        assert_same(next(resumed), batch)
        assert_same(next(later), batch)


def test_eval_batches_have_the_first_rows_in_order_and_zero_padding(rows):
    count = len(rows)
    full = batches.eval_batches(rows, batch_size=4, limit=1000)
    assert len(full) == -(-count // 4)
    tokens = np.concatenate([batch.tokens for batch in full])
    np.testing.assert_array_equal(tokens[:count], rows.tokens)
    for batch in full:
        assert batch.tokens.shape == batch.response_mask.shape == (4, ROW_LENGTH)
    padding = jax.tree.map(lambda *arrays: np.concatenate(arrays)[count:], *full)
    assert not any(array.any() for array in jax.tree.leaves(padding))
    first = batches.eval_batches(rows, batch_size=4, limit=1)
    assert len(first) == 1
    assert_same(first[0], full[0])


def test_imports_and_packs_without_grain_and_tfds():
    code = """
import sys
for name in ("grain", "tensorflow_datasets", "array_record", "tensorflow"):
    sys.modules[name] = None
import numpy as np
from msn_jax.cli import InputError
from msn_jax.data import batches, chat, corpora
rows = batches.pack([(np.arange(5, dtype=np.int32), np.arange(5) > 2)], 8, "test")
assert len(batches.eval_batches(rows, 2, 1)) == 1
try:
    batches.train_iterator(rows, 0, 1)
except InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "training needs the package grain: pip install grain\n"), done.stderr
