"""Runs suites with tiny random models, and interrupts them."""

import json
from pathlib import Path

import pytest

from msn_jax import evaluate
from msn_jax.decode.models import Model
from msn_jax.evals.sample_log import SampleLog
from msn_jax.evals.suite import Settings


def write_lines(path: Path, records: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def line(number: int, category: str, turns: list[str]) -> dict:
    """A line of a question.jsonl of Spec-Bench or MT-bench."""
    return {"question_id": number, "category": category, "turns": turns}


def run(
    suite: str,
    data: str,
    model: Model,
    output: Path,
    decoders: tuple[str, ...] = ("autoregressive",),
    limit: int | None = None,
    shard: tuple[int, int] = (1, 1),
    **settings: object,
) -> list[dict]:
    """The rows of the report."""
    output.mkdir(exist_ok=True)
    questions = evaluate.load_suite(suite).read(data)
    values = Settings(**{"max_new_tokens": 8, "runs": 1, **settings})
    return evaluate.evaluate(suite, questions, limit, model, decoders, values, output, shard)["rows"]


def samples(output: Path, name: str = "samples.jsonl") -> list[dict]:
    _, *lines = (output / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def killed_after(count: int, monkeypatch: pytest.MonkeyPatch, call, *arguments, **settings) -> None:
    """Calls, and kills the run when it has logged `count` samples and half of another one."""
    append = SampleLog.append
    left = [count]

    def append_until_killed(log: SampleLog, sample: dict) -> None:
        if not left[0]:
            with log.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(sample)[:20])
            raise KeyboardInterrupt
        left[0] -= 1
        append(log, sample)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SampleLog, "append", append_until_killed)
        call(*arguments, **settings)
