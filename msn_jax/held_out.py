"""Prompts from the held-out records of a run's data: what a model completes after its training."""

import numpy as np

from msn_jax.cli import InputError
from msn_jax.config import DataConfig
from msn_jax.data import chat, corpora
from msn_jax.decode.models import Model
from msn_jax.decode.request import Prompt

_OPENING = 6  # words of a text that has no prompt


def prompts(model: Model, data: DataConfig, count: int | None, max_new_tokens: int) -> list[Prompt]:
    """The beginnings of held-out records that leave space for an output, in a fixed random order.

    A record's beginning is its prompt, its messages before the last reply, or the first words of its text.

    Args:
      model: its tokenizer and context decide what fits.
      data: of the run.
      count: at most so many; None takes all.
      max_new_tokens: space for each output, in tokens.

    Raises:
      InputError: none fits.
    """
    longest = model.cfg.max_length - max_new_tokens
    beginnings = (_beginning(record) for record in corpora.load(data, "validation"))
    fitting = [prompt for prompt in beginnings if prompt and len(chat.encode_prompt(model.tokenizer, prompt)) < longest]
    if not fitting:
        raise InputError(
            f"max_new_tokens={max_new_tokens}: leaves no space for a held-out prompt of {data.path or data.builder} in "
            f"{model.cfg.max_length} tokens"
        )
    order = np.random.default_rng(0).permutation(len(fitting))
    return [fitting[i] for i in order[:count]]


def _beginning(record: dict) -> Prompt | None:
    """None if the record has none."""
    if "prompt" in record:
        return record["prompt"]
    if "text" in record:
        return " ".join(record["text"].split()[:_OPENING])
    replies = [i for i, message in enumerate(record["messages"]) if message["role"] == "assistant"]
    return record["messages"][: replies[-1]] if replies else None
