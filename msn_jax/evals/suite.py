"""The common shape of the suites. A module of a suite has one `Suite`, named SUITE."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from msn_jax.decode.engine import Decoder
from msn_jax.decode.models import Model
from msn_jax.evals.questions import Question
from msn_jax.evals.sample_log import SampleLog

OPTIONAL_FLAGS = (
    *("decoders", "max_new_tokens", "batch_size", "seed"),
    *("runs", "num_samples", "temperature", "top_p", "chat", "allow_code_execution", "program_seconds"),
)
SHARDS = "shard-*-of-*"  # directories in the output, with the files of processes that share an evaluation


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of an evaluation. A suite reads those that its protocol does not fix."""

    max_new_tokens: int  # limit of each answer, or of each turn
    seed: int = 0  # of sampled answers
    batch_size: int = 1  # prompts run together; samples do not depend on it
    num_samples: int = 1  # answers per question
    runs: int = 3  # over all questions, where time is measured
    temperature: float = 0.0
    top_p: float = 1.0
    chat: bool | None = None  # whether to prompt a chat model with messages; None: if it has a chat template
    allow_code_execution: bool = False  # whether to run generated programs
    program_seconds: float = 3.0  # limit of each program

    def identity(self) -> dict:
        """The settings that a sample depends on."""
        other = ("batch_size", "num_samples", "runs", "allow_code_execution", "program_seconds")
        return {name: value for name, value in vars(self).items() if name not in other}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a suite runs."""

    model: Model
    decoders: dict[str, Decoder]  # by name, in the order of the report
    questions: list[Question]  # the selected ones
    settings: Settings
    log: SampleLog  # samples of earlier, interrupted runs, and of this one
    output: Path  # directory of all files
    numbers: dict[int | str, int]  # question id -> its number among the selected ones of all processes


@dataclasses.dataclass(frozen=True)
class Suite:
    """A suite: its data, its protocol and its scores."""

    read: Callable[[str], list[Question]]  # all questions of --data; InputError names a bad file or line
    run: Callable[[Evaluation], list[dict]]  # logs the samples that are missing; returns the rows of the report
    max_new_tokens: int  # default
    decoders: tuple[str, ...] = ("auto",)  # default
    key: tuple[str, ...] = ("question_id", "decoder", "sample")  # fields that identify a sample
    flags: tuple[str, ...] = ("decoders", "max_new_tokens", "batch_size")  # of `OPTIONAL_FLAGS`, those with an effect
    protocol: int = 1  # version of prompts and scores; one more whenever they change, so older samples do not count
    is_timed: bool = False  # seconds are part of the result: a run continues only on the same hardware
