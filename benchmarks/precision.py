"""Exactness where numbers are coarse: decoding in bfloat16 against autoregressive decoding in it and in float32.

In bfloat16 a wide and a narrow product round differently, so that a near tie between the two best tokens may fall
either way. What is reported is how often it does, and how near the tie was at every first difference.
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
from msn_jax.decode.request import Request
from msn_jax.decode.session import DecodeSession, Model


def compare(
    model: Model, decoders: Mapping[str, Drafter], prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[dict]:
    """A row per decoder and reference: the share of identical answers, and the gaps where the others part.

    Args:
      model: in the dtype in question.
      decoders: name -> drafter; 'autoregressive' is among them.
      prompts: token ids, decoded as one batch.
      new_tokens: limit of each answer.
    """
    exact = in_float32(model)
    answers = {name: greedy(model, drafter, prompts, new_tokens) for name, drafter in decoders.items()}
    references = {model.cfg.dtype: answers["autoregressive"]}
    if model.cfg.dtype != "float32":
        references["float32"] = greedy(exact, decoders["autoregressive"], prompts, new_tokens)
    rows = []
    for dtype, reference in references.items():
        for name, found in answers.items():
            if (name, dtype) == ("autoregressive", model.cfg.dtype):
                continue
            parted = [first_difference(a, b) for a, b in zip(found, reference, strict=True)]
            places = {number: place for number, place in enumerate(parted) if place is not None}
            texts = [[*prompts[number], *reference[number]] for number in places]
            ends = [len(prompts[number]) + place for number, place in places.items()]
            here, there = gaps(model, texts, ends), gaps(exact, texts, ends)
            differences = [
                {"text": number, "token": place, "gap": gap, "gap_float32": gap_float32}
                for (number, place), gap, gap_float32 in zip(places.items(), here, there, strict=True)
            ]
            rows.append(
                {
                    "decoder": name,
                    "dtype": model.cfg.dtype,
                    "against": f"autoregressive {dtype}",
                    "texts": len(prompts),
                    "exact_share": 1 - len(places) / len(prompts),
                    "largest_gap": max(here, default=None),
                    "first_differences": differences,
                }
            )
    return rows


def in_float32(model: Model) -> Model:
    """The same weights, multiplied in float32."""
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model.params)
    cfg = dataclasses.replace(model.cfg, dtype="float32", param_dtype="float32")
    return dataclasses.replace(model, params=params, cfg=cfg)


def greedy(model: Model, drafter: Drafter, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """The new tokens of every prompt."""
    asked = [Request("", max_new_tokens=new_tokens)] * len(prompts)
    session = DecodeSession(model, drafter, prompts, asked, len(prompts))
    session.run()
    return [tokens for tokens, _ in session.new_tokens()]


def first_difference(found: Sequence[int], reference: Sequence[int]) -> int | None:
    """The first place where two answers differ, or None."""
    for place, (ours, theirs) in enumerate(zip(found, reference, strict=False)):
        if ours != theirs:
            return place
    return None if len(found) == len(reference) else min(len(found), len(reference))


def gaps(model: Model, texts: Sequence[Sequence[int]], ends: Sequence[int]) -> list[float]:
    """By how much the best logit is above the second best after `ends[i]` tokens of text i."""
    if not texts:
        return []
    tokens = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, ids in zip(tokens, texts, strict=True):
        row[: len(ids)] = ids
    return np.asarray(_gaps(model.params, model.cfg, tokens, np.array(ends, np.int32))).tolist()


@functools.partial(jax.jit, static_argnames="cfg")
def _gaps(params: dict, cfg: LlamaConfig, tokens: Array, ends: Array) -> Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
    hidden = llama.forward(params, cfg, tokens, positions, masks.causal(tokens.shape[1])).hidden
    last = jnp.take_along_axis(hidden, ends[:, None, None] - 1, axis=1)[:, 0]
    best = jax.lax.top_k(llama.unembed(params, cfg, last), 2)[0]
    return best[:, 0] - best[:, 1]
