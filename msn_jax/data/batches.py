"""Packs samples into rows, and serves rows as batches in an order that can be saved and restored.

A *sample* is (tokens int32 [n], response_mask bool [n]), as returned by `chat.encode_record`. A row holds several
samples, one after another, separated by `segment_ids` (1, 2, ... in each row, 0 for padding) and `positions`
(0, 1, ... in each sample).

    tokens         p p r r . p r r r 0     p prompt, r response, . the stop token
    segment_ids    1 1 1 1 1 2 2 2 2 0
    positions      0 1 2 3 4 0 1 2 3 0
    response_mask  0 0 1 1 1 0 1 1 1 0

Invariants: the rows depend only on the samples; each sample is in exactly one row, once; the batch of step s depends
only on (rows, seed, batch size, s). Every process reads the whole batch: where the mesh axis 'tensor' spans hosts, they
need the same rows, and with four small integers per token reading all rows is cheaper than distributing them by mesh.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np

from msn_jax.cli import InputError
from msn_jax.noise import Batch

if TYPE_CHECKING:
    import grain

Sample = tuple[np.ndarray, np.ndarray]

_ENDLESS = 2**31  # steps, more than any run has


@dataclasses.dataclass(frozen=True)
class PackStats:
    """Statistics of `pack`."""

    samples: int  # samples in the rows
    truncated: int  # of these, samples truncated to the length of a row
    dropped: int  # samples whose prompt alone fills a row
    fill: float  # fraction of the rows' positions that hold a token


@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed samples: NumPy arrays [R, T] as in `noise.Batch`."""

    tokens: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    response_mask: np.ndarray
    stats: PackStats

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def fingerprint(self) -> str:
        """A hash of all tokens, sample boundaries and response masks."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.segment_ids, self.response_mask):
            digest.update(str(array.shape).encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def take(self, indices: Sequence[int]) -> Batch:
        """A copy of the rows at `indices`."""
        index = np.asarray(indices, np.int64)
        return Batch(self.tokens[index], self.positions[index], self.segment_ids[index], self.response_mask[index])


def pack(samples: Sequence[Sample], row_length: int, source: str) -> Rows:
    """Packs samples into rows of `row_length` tokens: longest first, each into the fullest row with enough space.

    A long sample that is all response (plain text) is split into pieces of a row's length. Any other long sample is
    truncated, and dropped if no response remains. The rows are in a fixed random order, so that the first of them are
    a fair selection.

    Args:
      samples: (tokens int32 [n], response_mask bool [n]) each.
      row_length: T.
      source: name of the samples' file or builder, for errors.

    Raises:
      InputError: there is nothing to pack.
    """
    if not samples:
        raise InputError(f"{source}: no records in this split: give more data")
    pieces, truncated, dropped = _fit(samples, row_length)
    if not pieces:
        raise InputError(
            f"{source}: none of the {len(samples)} samples has a response within {row_length} tokens: "
            "raise --config.data.row_length"
        )
    groups = _best_fit_decreasing([len(tokens) for tokens, _ in pieces], row_length)
    groups = [groups[i] for i in np.random.default_rng(0).permutation(len(groups))]
    shape = (len(groups), row_length)
    tokens, positions, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
    response_mask = np.zeros(shape, bool)
    for row, group in enumerate(groups):
        start = 0
        for segment, index in enumerate(group, 1):
            length = len(pieces[index][0])
            span = (row, slice(start, start + length))
            tokens[span], response_mask[span] = pieces[index]
            positions[span] = np.arange(length)
            segment_ids[span] = segment
            start += length
    stats = PackStats(len(samples) - dropped, truncated, dropped, float(np.mean(segment_ids > 0)))
    return Rows(tokens, positions, segment_ids, response_mask, stats)


def _fit(samples: Sequence[Sample], row_length: int) -> tuple[list[Sample], int, int]:
    """Pieces no longer than a row, the number of truncated samples and the number of dropped ones."""
    pieces, truncated, dropped = [], 0, 0
    for tokens, response_mask in samples:
        if response_mask[1:].all():
            for start in range(0, len(tokens), row_length):
                mask = response_mask[start : start + row_length].copy()
                mask[0] = False  # no token of the piece predicts it
                pieces.append((tokens[start : start + row_length], mask))
        elif response_mask[:row_length].any():
            pieces.append((tokens[:row_length], response_mask[:row_length]))
            truncated += len(tokens) > row_length
        else:
            dropped += 1
    return pieces, truncated, dropped


def _best_fit_decreasing(lengths: list[int], row_length: int) -> list[list[int]]:
    """Indices of `lengths` by row, in linear time after sorting: open rows are in stacks, one per remaining space."""
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(row_length + 1)]  # by remaining space
    free_sizes = 0  # bit f is set where open_rows[f] is not empty
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        large_enough = free_sizes >> length
        if large_enough:
            free = length + (large_enough & -large_enough).bit_length() - 1
            row = open_rows[free].pop()
            if not open_rows[free]:
                free_sizes ^= 1 << free
        else:
            free, row = row_length, len(rows)
            rows.append([])
        rows[row].append(index)
        if free > length:
            open_rows[free - length].append(row)
            free_sizes |= 1 << (free - length)
    return rows


class TrainBatches:
    """The batches of all steps: `batches[step]` is a `Batch` [batch_size, T].

    Every epoch shuffles the rows again, and the epochs form one endless sequence, from which step s takes the positions
    s * batch_size, ..., (s + 1) * batch_size - 1. Where there are fewer rows than batch_size, a batch repeats them.
    """

    def __init__(self, rows: Rows, seed: int, batch_size: int):
        self._rows = rows
        self._order = _import_grain().MapDataset.source(range(len(rows))).seed(seed).shuffle().repeat()
        self._batch_size = batch_size

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, step: int) -> Batch:
        first = step * self._batch_size
        return self._rows.take([self._order[i] for i in range(first, first + self._batch_size)])


def train_iterator(rows: Rows, seed: int, batch_size: int) -> "grain.DatasetIterator[Batch]":
    """Endless iterator over `TrainBatches`; a thread prefetches.

    Its whole state is the next step, `get_state() == {'next_index': step}`. `set_state` continues from there without
    reading the earlier batches, and `grain.checkpoint.CheckpointSave(iterator)` stores it.
    """
    grain = _import_grain()
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(grain.MapDataset.source(TrainBatches(rows, seed, batch_size)).to_iter_dataset(options))


def eval_batches(rows: Rows, batch_size: int, limit: int) -> list[Batch]:
    """The first rows in order, as at most `limit` batches [batch_size, T]; all-zero rows pad the last one."""
    return list(_in_order(rows, batch_size, limit))


def _in_order(rows: Rows, batch_size: int, limit: int) -> Iterator[Batch]:
    for start in range(0, min(len(rows), limit * batch_size), batch_size):
        batch = rows.take(range(start, min(start + batch_size, len(rows))))
        missing = batch_size - batch.tokens.shape[0]
        yield jax.tree.map(functools.partial(_pad_rows, count=missing), batch)


def _pad_rows(array: np.ndarray, count: int) -> np.ndarray:
    return np.pad(array, ((0, count), (0, 0)))


def _import_grain():
    """Imports Grain, which not every host has; packing and evaluation do not need it."""
    try:
        import grain
    except ImportError as error:
        raise InputError("training needs the package grain: pip install grain") from error
    return grain
