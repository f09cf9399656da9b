"""Prompts of one batch, padded to arrays, and the programs with which its session begins."""

from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np

from msn_jax import cpu, llama, sharding
from msn_jax.cache import KVCache
from msn_jax.decode import loop
from msn_jax.decode.drafters import Drafter
from msn_jax.decode.models import Model, one_device, recall
from msn_jax.decode.request import Request, make_sampler

_SMALLEST_BUCKET = 64  # slots
_SMALLEST_CAPACITY = 256  # one program for all short prompts and outputs
_INITIAL_OUTPUT = 128  # output tokens that the first state has capacity for
_PREFILL_CHUNK = 512  # prompt tokens per forward pass: enough to keep an accelerator busy


def bucket_size(tokens: int) -> int:
    """The length that prompts of up to `tokens` tokens are padded to: a power of two, so that few programs compile."""
    return max(_SMALLEST_BUCKET, 1 << (tokens - 1).bit_length())


def state_capacity(tokens: int) -> int:
    """The capacity of a state for sequences of `tokens` tokens: a power of two, too."""
    return max(_SMALLEST_CAPACITY, bucket_size(tokens))


class PaddedBatch:
    """Prompts of different lengths as arrays [B, ...], and the arguments of the prefill."""

    def __init__(
        self,
        model: Model,
        drafter: Drafter,
        prompts: Sequence[Sequence[int]],
        requests: Sequence[Request],
        batch_size: int,
        reuses_prefix: bool = False,
    ):
        """Arguments as in `DecodeSession`."""
        self._model, self._drafter = model, drafter
        longest, most_new = max(map(len, prompts)), max(request.max_new_tokens for request in requests)
        self.slots = bucket_size(longest)
        self.capacity = state_capacity(longest + drafter.tree.max_depth + min(most_new, _INITIAL_OUTPUT))
        self.chunk = min(self._preferred_chunk(batch_size, reuses_prefix), self.slots)
        tokens = np.zeros((batch_size, self.slots), np.int32)
        lengths, limits = np.ones(batch_size, np.int32), np.ones(batch_size, np.int32)
        for row, (ids, request) in enumerate(zip(prompts, requests, strict=True)):
            tokens[row, : len(ids)] = ids
            lengths[row] = len(ids)
            limits[row] = min(len(ids) + request.max_new_tokens, model.cfg.max_length)
        idle = Request("", max_new_tokens=1)
        sampler = make_sampler([*requests, *[idle] * (batch_size - len(requests))])
        self._rows = (tokens, lengths, limits, sampler)
        if model.mesh is not None:
            self._rows = jax.device_put(self._rows, sharding.batch_sharding(model.mesh, batch_size))

    def _preferred_chunk(self, batch_size: int, reuses_prefix: bool) -> int:
        if not cpu.is_default_backend():
            return _PREFILL_CHUNK
        is_large = llama.decodes_from_rows(self._model.cfg, self._model.mesh)
        # A prefix is reused in whole chunks, so they must be small.
        return cpu.prefill_chunk(self.slots, batch_size, is_large and not reuses_prefix)

    def prefill_key(self, starts_empty: bool) -> Hashable:
        """Identifies the program of the prefill, see `Programs`."""
        return "prefill", self.slots, self.capacity, starts_empty

    def prefill_arguments(self, drafter_params: Any = None, cache: KVCache | None = None) -> tuple:
        """Arguments of `loop.prefill`."""
        model = self._model
        rest = (self.chunk, drafter_params, cache, model.mesh, self.capacity)
        return (model.params, model.cfg, self._drafter, *self._rows, *rest)


def compile_first(
    outline: Model,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    requests: Sequence[Request],
    batch_size: int,
) -> None:
    """Compiles the programs with which a session begins, while the model's weights are being read.

    Args:
      outline: the model with abstract parameters, on one device (`models.load`). It shares its experience with the
        loaded model, so that a session finds the compiled programs.
      drafter: as in `DecodeSession`, like the following arguments; without parameters of its own.
      prompts: token ids of the first batch.
      requests: one per prompt.
      batch_size: B.
    """
    batch = PaddedBatch(outline, drafter, prompts, requests, batch_size)
    programs = recall(outline, drafter, batch_size).programs
    prefill = loop.prefill.trace(*batch.prefill_arguments())
    programs.compile_in_background(batch.prefill_key(True), prefill.lower)
    placement = one_device()
    state = jax.tree.map(lambda leaf: leaf.update(sharding=placement), prefill.out_info)
    width_index = 0 if drafter.widths else None
    arguments = (outline.params, outline.cfg, drafter, stop_ids(outline), state, np.int32(0), None, None, width_index)
    lowered = loop.decode.lower(*arguments)
    programs.compile_in_background((width_index, batch.capacity), lambda: lowered)


def stop_ids(model: Model) -> np.ndarray:
    """int32 [E]: the tokens that end a row.

    Where logits contain NaN or +inf, `cpu.argmax` returns the vocabulary size; as a stop id, it ends the row.
    """
    return np.array([*model.tokenizer.stop_ids, model.cfg.vocab_size], np.int32)
