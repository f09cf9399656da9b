"""Suites of programming problems: generation, apart from it the execution of the programs, and pass@k."""

import dataclasses
import math
from collections.abc import Callable, Sequence

from msn_jax import outputs
from msn_jax.cli import InputError, warn_once
from msn_jax.decode.request import Request
from msn_jax.evals import code_execution, generations, statistics
from msn_jax.evals.generations import Task
from msn_jax.evals.questions import Question
from msn_jax.evals.sample_log import SampleLog
from msn_jax.evals.suite import SHARDS, Evaluation, Settings

FLAGS = (
    *("decoders", "max_new_tokens", "batch_size", "seed"),
    *("num_samples", "temperature", "top_p", "allow_code_execution", "program_seconds"),
)
_KS = (1, 10, 100)  # of pass@k, as far as there are samples
_MAX_QUESTIONS = 1 << 20
_IN_REACH = {  # fields of `Outcome.isolation`
    "root": "as root",
    "network": "with a network",
    "processes": "beside the other processes of their user, which they can signal",
    "files": "with the right to write wherever their user may",
}


def run(
    evaluation: Evaluation, to_request: Callable[[Question], Request], to_program: Callable[[Question, str], str]
) -> list[dict]:
    """Generates the missing samples, runs the programs if that is allowed, and returns a row per decoder.

    Args:
      evaluation: of the suite.
      to_request: the prompt, limit and stop strings of a question.
      to_program: the whole program of a question and a generated text, tests included.

    Raises:
      InputError: several samples are asked for, but the temperature is 0.
    """
    settings = evaluation.settings
    if settings.num_samples > 1 and not settings.temperature:
        raise InputError(f"--num_samples={settings.num_samples}: greedy samples are equal; set --temperature")
    tasks = []
    for question in evaluation.questions:
        request, number = to_request(question), evaluation.numbers[question.id]
        for sample in range(settings.num_samples):
            tasks.append(Task(question, _sampled(request, settings, number, sample), {"sample": sample}))
    samples = generations.generate(evaluation, tasks, lambda question, text: {"program": to_program(question, text)})
    if not settings.allow_code_execution:
        warn_once("the programs were not run; the same command with --allow_code_execution runs and scores them")
        return [{"decoder": name, "questions": len(evaluation.questions)} for name in samples]
    outcomes = _execute(evaluation, samples)
    return [_row(name, evaluation.questions, of_decoder) for name, of_decoder in outcomes.items()]


def pass_at_k(count: int, correct: int, k: int) -> float:
    """The chance that one of k samples is correct, unbiased (arXiv 2107.03374, equation 1).

    Args:
      count: samples of the question, at least k.
      correct: how many of them passed.
      k: samples drawn of them.
    """
    return 1.0 - math.comb(count - correct, k) / math.comb(count, k)


def _sampled(request: Request, settings: Settings, number: int, sample: int) -> Request:
    """The request for one sample, whose random bits depend on neither --limit nor --num_samples."""
    own = {"temperature": settings.temperature, "top_p": settings.top_p, "seed": settings.seed}
    return dataclasses.replace(request, sample=sample * _MAX_QUESTIONS + number, **own)


def _execute(evaluation: Evaluation, samples: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Runs the programs that have no outcome yet; the outcomes by decoder, also logged in OUTPUT/outcomes.jsonl."""
    seconds = evaluation.settings.program_seconds
    header = {"samples": evaluation.log.header, "seconds": seconds}
    with SampleLog(evaluation.output / "outcomes.jsonl", header, evaluation.log.key) as log:
        log.merge(sorted(evaluation.output.glob(f"{SHARDS}/outcomes.jsonl")))
        every = [sample for of_decoder in samples.values() for sample in of_decoder]
        left = [sample for sample in every if log.key_of(sample) not in log]
        for sample in outputs.with_progress(left, len(every) - len(left), len(every), "programs"):
            outcome = code_execution.run(sample["program"], seconds)
            key = {name: sample[name] for name in log.key}
            log.append({**key, "passed": outcome.passed, "reason": outcome.reason, "isolation": outcome.isolation})
        outcomes = {name: [log[log.key_of(sample)] for sample in of_decoder] for name, of_decoder in samples.items()}
    isolations = [outcome["isolation"] for of_decoder in outcomes.values() for outcome in of_decoder]
    for resource, words in _IN_REACH.items():
        if any(isolation.get(resource) for isolation in isolations):
            warn_once(f"programs ran {words}, because this system does not permit otherwise")
    return outcomes


def _row(decoder: str, questions: Sequence[Question], outcomes: Sequence[dict]) -> dict:
    count = len(outcomes) // len(questions)
    correct = [sum(o["passed"] for o in outcomes[i * count : (i + 1) * count]) for i in range(len(questions))]
    row = {"decoder": decoder, "questions": len(questions), "samples": count}
    for k in _KS:
        if k <= count:
            row |= statistics.with_error(f"pass@{k}", statistics.mean([pass_at_k(count, c, k) for c in correct]))
    row["timed_out"] = sum(outcome["reason"] == "timed out" for outcome in outcomes)
    return row
