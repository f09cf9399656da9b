"""Log-likelihoods of continuations of contexts that begin with the same tokens, such as the shots of a subject.

The shared tokens run through the model once. Their cache then serves all rows; a row is a context with a continuation
up to its last token. Continuations of one token each, the usual case, need one row per context.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from msn_jax import cache as caches
from msn_jax import llama, masks
from msn_jax.cache import KVCache
from msn_jax.config import LlamaConfig
from msn_jax.data.tokenizer import Tokenizer
from msn_jax.decode import batch, prefill
from msn_jax.decode.models import Model

_CHUNK = 256  # shared tokens per forward pass
_LENGTH_STEP = 64  # rows are padded to a multiple of it, so that few programs compile
_NO_TARGET = -1


@dataclasses.dataclass
class _Row:
    """Tokens to run, and the continuations that they predict."""

    context: int  # number of the context
    tokens: list[int]
    targets: dict[int, list[int]]  # continuation number -> its tokens, predicted by the last tokens of the row


def score(
    model: Model, contexts: Sequence[str], continuations: Sequence[str], batch_size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (number of the context, float32 [continuations] in nats) as batches finish, each context once.

    As in lm-evaluation-harness, the tokens of a continuation are those that encoding adds to those of the context, and
    what exceeds the model's context is cut on the left.

    Args:
      model: on one device.
      contexts: raw texts, of more tokens than any continuation.
      continuations: the same for every context.
      batch_size: rows run together.
    """
    rows = [row for number, text in enumerate(contexts) for row in _rows(model, number, text, continuations)]
    left = {number: np.full(len(continuations), np.nan, np.float32) for number in range(len(contexts))}
    longest = model.cfg.max_length
    # A row that is cut does not begin with the shared tokens.
    for group in (
        [row for row in rows if len(row.tokens) <= longest],
        [dataclasses.replace(row, tokens=row.tokens[-longest:]) for row in rows if len(row.tokens) > longest],
    ):
        for row, values in _score_rows(model, group, len(continuations), batch_size):
            result = left[row.context]
            result[list(row.targets)] = values[list(row.targets)]
            if not np.isnan(result).any():
                yield row.context, left.pop(row.context)


def _rows(model: Model, number: int, context: str, continuations: Sequence[str]) -> list[_Row]:
    start = len(_encode(model.tokenizer, context))
    rows: dict[tuple[int, ...], _Row] = {}
    for choice, continuation in enumerate(continuations):
        ids = _encode(model.tokenizer, context + continuation)
        row = rows.setdefault(tuple(ids[:-1]), _Row(number, ids[:-1], {}))
        row.targets[choice] = ids[start:]
    return list(rows.values())


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return [*tokenizer.start_ids, *tokenizer.encode(text)]


def _score_rows(
    model: Model, rows: Sequence[_Row], num_choices: int, batch_size: int
) -> Iterator[tuple[_Row, np.ndarray]]:
    """Yields every row with the log-likelihoods of its targets, float32 [choices]; the others are 0."""
    if not rows:
        return
    most = max(len(ids) for row in rows for ids in row.targets.values())
    shared = min(_shared_length([row.tokens for row in rows]), min(len(row.tokens) for row in rows) - most)
    cache = _prefix_cache(model, rows[0].tokens[:shared])
    ordered = sorted(rows, key=lambda row: len(row.tokens), reverse=True)
    for first in range(0, len(ordered), batch_size):
        chosen = ordered[first : first + batch_size]
        suffixes = [row.tokens[shared:] for row in chosen]
        length = -(-len(suffixes[0]) // _LENGTH_STEP) * _LENGTH_STEP
        tokens = np.zeros((batch_size, length), np.int32)
        lengths = np.full(batch_size, most, np.int32)
        targets = np.full((batch_size, num_choices, most), _NO_TARGET, np.int32)
        for i, (row, suffix) in enumerate(zip(chosen, suffixes, strict=True)):
            tokens[i, : len(suffix)] = suffix
            lengths[i] = len(suffix)
            for choice, ids in row.targets.items():
                targets[i, choice, most - len(ids) :] = ids
        values = np.asarray(_log_likelihoods(model.params, model.cfg, cache, tokens, lengths, targets))
        yield from zip(chosen, values, strict=False)


def _shared_length(rows: Sequence[Sequence[int]]) -> int:
    """The number of tokens with which all rows begin: where the first and the last in sorted order differ."""
    first, last = min(rows), max(rows)
    differs = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return next(differs, min(len(first), len(last)))


def _prefix_cache(model: Model, ids: Sequence[int]) -> KVCache:
    """A cache of one row with these tokens."""
    slots = batch.bucket_size(len(ids) + 1)
    tokens = np.zeros((1, slots), np.int32)
    tokens[0, : len(ids)] = ids
    lengths = np.array([len(ids) + 1], np.int32)  # `fill_cache` leaves out the last token
    return _fill(model.params, model.cfg, tokens, lengths, min(_CHUNK, slots))


@functools.partial(jax.jit, static_argnames=("cfg", "chunk"))
def _fill(params: dict, cfg: LlamaConfig, tokens: Array, lengths: Array, chunk: int) -> KVCache:
    cache = caches.create(cfg, 1, tokens.shape[1])
    return prefill.fill_cache(params, cfg, tokens, lengths, cache, chunk)


@functools.partial(jax.jit, static_argnames="cfg")
def _log_likelihoods(
    params: dict, cfg: LlamaConfig, prefix: KVCache, tokens: Array, lengths: Array, targets: Array
) -> Array:
    """float32 [B, C]: the log-likelihoods of the targets.

    Args:
      params: decoding layout.
      cfg: the model.
      prefix: one row, with which every row of `tokens` begins.
      tokens: int32 [B, T], padded on the right.
      lengths: int32 [B], at least M.
      targets: int32 [B, C, M], the tokens that the last M tokens of a row predict; `_NO_TARGET` counts as certain.
    """
    B, T = tokens.shape
    M = targets.shape[2]
    cache = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (B, *leaf.shape[1:])), prefix)
    positions = cache.lengths[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
    hidden = llama.forward(params, cfg, tokens, positions, masks.causal(T), cache).hidden
    last = lengths[:, None] - M + jnp.arange(M, dtype=jnp.int32)[None, :]
    logits = llama.unembed(params, cfg, jnp.take_along_axis(hidden, last[:, :, None], axis=1))
    wanted = targets.swapaxes(1, 2)  # [B, M, C]
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(wanted, 0), axis=2)
    return jnp.where(wanted == _NO_TARGET, 0.0, picked).sum(axis=1)
