"""Prompts as every decoder gets them, and answers as it gives them: token ids."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from msn_jax.cli import InputError
from msn_jax.config import LlamaConfig
from msn_jax.decode.request import Prompt, encode_prompt
from msn_jax.decode.session import Model

_MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
_RANDOM_LENGTH = 64  # tokens


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt as both sides get it."""

    group: str
    ids: list[int]
    max_new_tokens: int


@dataclasses.dataclass(frozen=True)
class Answer:
    """New tokens, and the forward passes that they took, whichever gave the first one included."""

    tokens: list[int]
    forward_passes: int


Decoder = Callable[[Question], Answer]


def random(cfg: LlamaConfig, count: int, max_new_tokens: int) -> list[Question]:
    """Prompts of random tokens."""
    rows = np.random.default_rng(0).integers(0, cfg.vocab_size, (count, _RANDOM_LENGTH)).tolist()
    return [Question("random", ids[: _room(cfg, max_new_tokens)], max_new_tokens) for ids in rows]


def encode(model: Model, prompts: Sequence[tuple[str, Prompt]], max_new_tokens: int) -> list[Question]:
    """Questions of (group, prompt). One that leaves no room for the answer keeps its end, behind what every text starts
    with.
    """
    room, start = _room(model.cfg, max_new_tokens), list(model.tokenizer.start_ids)
    questions = []
    for number, (group, prompt) in enumerate(prompts):
        ids = encode_prompt(model.tokenizer, prompt, 1 << 30, f"prompt {number}")
        if len(ids) > room:
            head = start if ids[: len(start)] == start else []
            ids = head + ids[len(ids) - room + len(head) :]
        questions.append(Question(group, ids, max_new_tokens))
    return questions


def read_spec_bench(path: str, count: int) -> list[tuple[str, str]]:
    """(group, first turn) of Spec-Bench's questions, the first `count` of each group; 0 takes all."""
    try:
        lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
        found = [(line["category"], line["turns"][0]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"--spec_bench={path}: not the questions of Spec-Bench: {error}") from error
    found = [("mt_bench" if category in _MT_BENCH else category, turn) for category, turn in found]
    taken: dict[str, int] = {}
    kept = []
    for group, turn in found:
        taken[group] = taken.get(group, 0) + 1
        if not count or taken[group] <= count:
            kept.append((group, turn))
    return kept


def _room(cfg: LlamaConfig, max_new_tokens: int) -> int:
    """Tokens of a prompt that leaves room for its answer."""
    room = cfg.max_length - max_new_tokens
    if room < 2:
        raise InputError(f"--max_new_tokens={max_new_tokens}: too many for a context of {cfg.max_length}")
    return room
