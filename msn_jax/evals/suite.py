"""The common shape of the suites. A module of a suite has one `Suite`, named SUITE."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from msn_jax.decode.engine import Decoder
from msn_jax.decode.models import Model
from msn_jax.evals.questions import Question
from msn_jax.evals.sample_log import SampleLog


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of an evaluation. A suite reads those that its protocol does not fix."""

    max_new_tokens: int  # limit of each answer, or of each turn
    seed: int = 0  # of sampled answers
    batch_size: int = 1  # prompts run together; samples do not depend on it


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a suite runs."""

    model: Model
    decoders: dict[str, Decoder]  # by name, in the order of the report
    questions: list[Question]  # the selected ones
    settings: Settings
    log: SampleLog  # samples of earlier, interrupted runs, and of this one
    output: Path  # directory of all files


@dataclasses.dataclass(frozen=True)
class Suite:
    """A suite: its data, its protocol and its scores."""

    read: Callable[[str], list[Question]]  # all questions of --data; InputError names a bad file or line
    run: Callable[[Evaluation], list[dict]]  # logs the samples that are missing; returns the rows of the report
    max_new_tokens: int  # default
    decoders: tuple[str, ...] = ("auto",)  # default
    key: tuple[str, ...] = ("question_id", "decoder", "sample")  # fields that identify a sample
    unused_flags: tuple[str, ...] = ()  # flags that would have no effect
    is_timed: bool = False  # seconds are part of the result: a run continues only on the same hardware
