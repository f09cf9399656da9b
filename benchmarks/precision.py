"""Exactness in low precision: decoding in bfloat16 compared with autoregressive decoding in bfloat16 and in float32.

In bfloat16, matrix products over different numbers of tokens round differently, so a near tie between the two largest
logits may be resolved either way. The report counts such differences and gives the logit gap at every first difference.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from msn_jax import llama, masks
from msn_jax.config import LlamaConfig
from msn_jax.decode.drafters import Drafter
from msn_jax.decode.models import Model
from msn_jax.decode.request import Request
from msn_jax.decode.session import DecodeSession


def compare(
    model: Model, decoders: Mapping[str, Drafter], prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[dict]:
    """A row per decoder and reference: the share of identical completions, and the logit gaps at first differences.

    Args:
      model: in the dtype to examine.
      decoders: name -> drafter, including 'autoregressive'.
      prompts: token ids, decoded as one batch.
      new_tokens: limit per prompt.
    """
    model_float32 = in_float32(model)
    completions = {name: greedy(model, drafter, prompts, new_tokens) for name, drafter in decoders.items()}
    references = {model.cfg.dtype: completions["autoregressive"]}
    if model.cfg.dtype != "float32":
        references["float32"] = greedy(model_float32, decoders["autoregressive"], prompts, new_tokens)
    rows = []
    for dtype, reference in references.items():
        for name, tokens in completions.items():
            if (name, dtype) == ("autoregressive", model.cfg.dtype):
                continue
            first = [first_difference(a, b) for a, b in zip(tokens, reference, strict=True)]
            positions = {prompt: position for prompt, position in enumerate(first) if position is not None}
            sequences = [[*prompts[prompt], *reference[prompt]] for prompt in positions]
            ends = [len(prompts[prompt]) + position for prompt, position in positions.items()]
            gaps, gaps_float32 = logit_gaps(model, sequences, ends), logit_gaps(model_float32, sequences, ends)
            differences = [
                {"prompt": prompt, "token": position, "gap": gap, "gap_float32": gap_float32}
                for (prompt, position), gap, gap_float32 in zip(positions.items(), gaps, gaps_float32, strict=True)
            ]
            rows.append(
                {
                    "decoder": name,
                    "dtype": model.cfg.dtype,
                    "reference": f"autoregressive {dtype}",
                    "prompts": len(prompts),
                    "exact_share": 1 - len(positions) / len(prompts),
                    "largest_gap": max(gaps, default=None),
                    "first_differences": differences,
                }
            )
    return rows


def in_float32(model: Model) -> Model:
    """The model with the same weights, cast to float32."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model.params)
    cfg = dataclasses.replace(model.cfg, dtype="float32", param_dtype="float32")
    return dataclasses.replace(model, params=params, cfg=cfg)


def greedy(model: Model, drafter: Drafter, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """The new tokens of every prompt, decoded greedily."""
    requests = [Request("", max_new_tokens=new_tokens)] * len(prompts)
    session = DecodeSession(model, drafter, prompts, requests, len(prompts))
    session.run()
    return [tokens for tokens, _ in session.output_tokens()]


def first_difference(tokens: Sequence[int], reference: Sequence[int]) -> int | None:
    """The first index at which two completions differ, or None."""
    for index, (token, expected) in enumerate(zip(tokens, reference, strict=False)):
        if token != expected:
            return index
    return None if len(tokens) == len(reference) else min(len(tokens), len(reference))


def logit_gaps(model: Model, sequences: Sequence[Sequence[int]], ends: Sequence[int]) -> list[float]:
    """The largest minus the second largest logit after the first `ends[i]` tokens of sequence i."""
    if not sequences:
        return []
    tokens = np.zeros((len(sequences), max(map(len, sequences))), np.int32)
    for row, ids in zip(tokens, sequences, strict=True):
        row[: len(ids)] = ids
    return np.asarray(_logit_gaps(model.params, model.cfg, tokens, np.array(ends, np.int32))).tolist()


@functools.partial(jax.jit, static_argnames="cfg")
def _logit_gaps(params: dict, cfg: LlamaConfig, tokens: Array, ends: Array) -> Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
    hidden = llama.forward(params, cfg, tokens, positions, masks.causal(tokens.shape[1])).hidden
    last = jnp.take_along_axis(hidden, ends[:, None, None] - 1, axis=1)[:, 0]
    largest = jax.lax.top_k(llama.unembed(params, cfg, last), 2)[0]
    return largest[:, 0] - largest[:, 1]
