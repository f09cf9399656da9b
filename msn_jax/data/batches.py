"""Samples to rows, rows to batches: packing, order, and an iterator that can be saved and restored.

A *sample* is (tokens int32 [n], response_mask bool [n]), as `chat.encode_record` makes it. Rows hold several samples
one behind another; what keeps them apart is `segment_ids` (1, 2, ... in a row, 0 behind the last) and `positions`
(0, 1, ... in every sample).

    tokens         p p r r . p r r r 0     p prompt, r response, . the end symbol
    segment_ids    1 1 1 1 1 2 2 2 2 0
    positions      0 1 2 3 4 0 1 2 3 0
    response_mask  0 0 1 1 1 0 1 1 1 0

Invariants: packing is a function of the samples; a sample is in one row and there once; the batch of step s is a
function of (rows, seed, batch size, s). Every process reads the whole of it: where the mesh axis 'tensor' spans hosts,
these need the same rows, and at four small integers a token the rest costs less than dealing it out by mesh would.
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

_FOREVER = 2**31  # steps


@dataclasses.dataclass(frozen=True)
class PackStats:
    """What became of the samples."""

    samples: int  # in the rows
    cut: int  # of these, shortened to a row's length
    dropped: int  # samples whose prompt alone fills a row
    fill: float  # share of the rows' places that hold a token


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
        """Changes with any token, sample boundary or response mask."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.segment_ids, self.response_mask):
            digest.update(str(array.shape).encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def take(self, indices: Sequence[int]) -> Batch:
        """The rows at `indices`, copied."""
        index = np.asarray(indices, np.int64)
        return Batch(self.tokens[index], self.positions[index], self.segment_ids[index], self.response_mask[index])


def pack(samples: Sequence[Sample], row_length: int, source: str) -> Rows:
    """Packs samples into rows of `row_length` tokens: longest first, each into the fullest row that has room.

    A sample that is response throughout (plain text) and too long becomes several pieces of a row's length. Any other
    is cut at its end; where that leaves no response, it is dropped. The rows come in a fixed random order, so that the
    first of them are a fair choice.

    Args:
      samples: (tokens int32 [n], response_mask bool [n]) each.
      row_length: T.
      source: the file or builder that the samples come from, for errors.

    Raises:
      InputError: nothing to pack.
    """
    if not samples:
        raise InputError(f"{source}: no records for this split: give more data")
    pieces, cut, dropped = _fit(samples, row_length)
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
            place = (row, slice(start, start + length))
            tokens[place], response_mask[place] = pieces[index]
            positions[place] = np.arange(length)
            segment_ids[place] = segment
            start += length
    stats = PackStats(len(samples) - dropped, cut, dropped, float(np.mean(segment_ids > 0)))
    return Rows(tokens, positions, segment_ids, response_mask, stats)


def _fit(samples: Sequence[Sample], row_length: int) -> tuple[list[Sample], int, int]:
    """Pieces no longer than a row, the number of samples cut and the number dropped."""
    pieces, cut, dropped = [], 0, 0
    for tokens, response_mask in samples:
        if response_mask[1:].all():
            for start in range(0, len(tokens), row_length):
                mask = response_mask[start : start + row_length].copy()
                mask[0] = False  # nothing before it predicts it
                pieces.append((tokens[start : start + row_length], mask))
        elif response_mask[:row_length].any():
            pieces.append((tokens[:row_length], response_mask[:row_length]))
            cut += len(tokens) > row_length
        else:
            dropped += 1
    return pieces, cut, dropped


def _best_fit_decreasing(lengths: list[int], row_length: int) -> list[list[int]]:
    """Indices of `lengths` by row. Linear but for the sorting: rows wait in stacks, one per number of free places."""
    rows: list[list[int]] = []
    waiting: list[list[int]] = [[] for _ in range(row_length + 1)]  # rows by free places
    free_sizes = 0  # bit f is set where waiting[f] is not empty
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        large_enough = free_sizes >> length
        if large_enough:
            free = length + (large_enough & -large_enough).bit_length() - 1
            row = waiting[free].pop()
            if not waiting[free]:
                free_sizes ^= 1 << free
        else:
            free, row = row_length, len(rows)
            rows.append([])
        rows[row].append(index)
        if free > length:
            waiting[free - length].append(row)
            free_sizes |= 1 << (free - length)
    return rows


class TrainBatches:
    """Every step's batch: `batches[step]` is a `Batch` [batch_size, T].

    The rows are shuffled anew in every epoch, and an epoch follows the one before without a gap: step s takes the
    places s * batch_size, ... of that endless order. Fewer rows than a batch holds repeat within it.
    """

    def __init__(self, rows: Rows, seed: int, batch_size: int):
        self._rows = rows
        self._order = _import_grain().MapDataset.source(range(len(rows))).seed(seed).shuffle().repeat()
        self._batch_size = batch_size

    def __len__(self) -> int:
        return _FOREVER

    def __getitem__(self, step: int) -> Batch:
        first = step * self._batch_size
        return self._rows.take([self._order[i] for i in range(first, first + self._batch_size)])


def train_iterator(rows: Rows, seed: int, batch_size: int) -> "grain.DatasetIterator[Batch]":
    """Endless iterator over `TrainBatches`, read ahead by a thread.

    Its whole state is the next step, `get_state() == {'next_index': step}`; `set_state` goes there at once, and
    `grain.checkpoint.CheckpointSave(iterator)` stores it.
    """
    grain = _import_grain()
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(grain.MapDataset.source(TrainBatches(rows, seed, batch_size)).to_iter_dataset(options))


def eval_batches(rows: Rows, batch_size: int, limit: int) -> list[Batch]:
    """The first rows in their order, as at most `limit` batches [batch_size, T]; all-zero rows fill up the last."""
    return list(_in_order(rows, batch_size, limit))


def _in_order(rows: Rows, batch_size: int, limit: int) -> Iterator[Batch]:
    for start in range(0, min(len(rows), limit * batch_size), batch_size):
        batch = rows.take(range(start, min(start + batch_size, len(rows))))
        missing = batch_size - batch.tokens.shape[0]
        yield jax.tree.map(functools.partial(_pad_rows, count=missing), batch)


def _pad_rows(array: np.ndarray, count: int) -> np.ndarray:
    return np.pad(array, ((0, count), (0, 0)))


def _import_grain():
    """Grain, which not every host has; the packing and the evaluation do without."""
    try:
        import grain
    except ImportError as error:
        raise InputError("training needs the package grain: pip install grain") from error
    return grain
