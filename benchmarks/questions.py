"""The interface of the compared decoders: prompts and completions as token ids."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from msn_jax.cli import InputError
from msn_jax.config import LlamaConfig
from msn_jax.decode.models import Model
from msn_jax.decode.request import Prompt, Request, encode_prompt
from msn_jax.evals.conversations import MT_BENCH_CATEGORIES

_RANDOM_LENGTH = 64  # tokens


@dataclasses.dataclass(frozen=True)
class Question:
    """An encoded prompt, the same for every decoder."""

    group: str  # of Spec-Bench, or the source of the prompt
    ids: list[int]
    max_new_tokens: int


@dataclasses.dataclass(frozen=True)
class Completion:
    """The new tokens, and the number of forward passes that emitted them."""

    tokens: list[int]
    forward_passes: int  # a prefill counts if it emits the first token


Decoder = Callable[[Question], Completion]


class PassCounter:
    """Counts the forward passes of a peer's model."""

    def __init__(self):
        """Starts at 0."""
        self._count = 0

    def add(self, *_: object) -> None:
        """Counts one forward pass."""
        self._count += 1

    def take(self) -> int:
        """The forward passes since the last call of this method."""
        count, self._count = self._count, 0
        return count


def random(cfg: LlamaConfig, count: int, max_new_tokens: int) -> list[Question]:
    """Prompts of random tokens."""
    rows = np.random.default_rng(0).integers(0, cfg.vocab_size, (count, _RANDOM_LENGTH)).tolist()
    return [Question("random", ids[: _max_prompt_tokens(cfg, max_new_tokens)], max_new_tokens) for ids in rows]


def encode(model: Model, prompts: Sequence[tuple[str, Prompt]], max_new_tokens: int) -> list[Question]:
    """Encodes (group, prompt) pairs. Prompts that are too long lose tokens on the left, but keep BOS."""
    limit, start = _max_prompt_tokens(model.cfg, max_new_tokens), list(model.tokenizer.start_ids)
    questions = []
    for number, (group, prompt) in enumerate(prompts):
        ids = encode_prompt(model.tokenizer, Request(prompt), 1 << 30, f"prompt {number}")
        if len(ids) > limit:
            head = start if ids[: len(start)] == start else []
            ids = head + ids[len(ids) - limit + len(head) :]
        questions.append(Question(group, ids, max_new_tokens))
    return questions


def read_spec_bench(path: str, count: int) -> list[tuple[str, str]]:
    """Reads (group, first turn) of Spec-Bench's questions: the first `count` of each group, or all if `count` is 0."""
    try:
        lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        turns = [(line["category"], line["turns"][0]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"--spec_bench={path}: not Spec-Bench's question.jsonl: {error}") from error
    seen: dict[str, int] = {}
    selected = []
    for category, turn in turns:
        group = "mt_bench" if category in MT_BENCH_CATEGORIES else category
        seen[group] = seen.get(group, 0) + 1
        if not count or seen[group] <= count:
            selected.append((group, turn))
    return selected


def _max_prompt_tokens(cfg: LlamaConfig, max_new_tokens: int) -> int:
    """The longest prompt that leaves space for `max_new_tokens` in the context."""
    limit = cfg.max_length - max_new_tokens
    if limit < 2:
        raise InputError(
            f"--max_new_tokens={max_new_tokens}: leaves no space for a prompt in a context of {cfg.max_length} tokens; "
            f"use at most {cfg.max_length - 2}"
        )
    return limit
