"""MMLU (arXiv 2009.03300): multiple choice in 57 subjects, by the protocol of lm-evaluation-harness, `mmlu` version 2.

The prompt is raw text: five questions of the subject's dev split with answers, then the question. The prediction is the
most likely of the continuations " A" to " D". Nothing is generated, so decoders do not matter.
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from msn_jax import outputs
from msn_jax.cli import InputError
from msn_jax.evals import log_likelihoods, questions, statistics
from msn_jax.evals.questions import Question
from msn_jax.evals.suite import Evaluation, Suite

_SHOTS = 5
_LETTERS = "ABCD"
_HEADER = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]


def read(directory: str) -> list[Question]:
    """The questions of DIRECTORY/test/SUBJECT_test.csv, with shots from DIRECTORY/dev/SUBJECT_dev.csv.

    Raises:
      InputError: there are no such files, or one of them is missing or malformed.
    """
    files = sorted((Path(directory) / "test").glob("*_test.csv"))
    if not files:
        raise InputError(f"{directory}: has no test/SUBJECT_test.csv: expected a directory of MMLU with dev/ and test/")
    result = []
    for file in files:
        subject = file.name.removesuffix("_test.csv")
        dev = Path(directory) / "dev" / f"{subject}_dev.csv"
        shots = _read_csv(dev)[:_SHOTS]
        if len(shots) < _SHOTS:
            raise InputError(f"{dev}: has {len(shots)} questions, fewer than the {_SHOTS} shots")
        solved = [f"{_ask(row)} {_LETTERS[int(row[-1])]}\n\n" for _, row in shots]
        title = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        for number, (location, row) in enumerate(_read_csv(file)):
            prompt = title + "".join(solved) + _ask(row)
            result.append(Question(f"{subject}/{number}", subject, prompt, {"answer": row[-1]}, location))
    return result


def run(evaluation: Evaluation) -> list[dict]:
    """Logs the missing samples; a row per subject, and one over all questions."""
    selected, log = evaluation.questions, evaluation.log
    done = sum((question.id,) in log for question in selected)
    for sample in outputs.with_progress(_samples(evaluation), done, len(selected), "questions"):
        log.append(sample)
    samples = [log[(question.id,)] for question in selected]
    rows = []
    for group, chosen in statistics.by_group(samples).items():
        correct = [sample["correct"] for sample in chosen]
        row = {"subject": group, "questions": len(correct)}
        rows.append(row | statistics.with_error("accuracy", statistics.mean(correct)))
    return rows


def _samples(evaluation: Evaluation) -> Iterator[dict]:
    """The missing samples, subject by subject."""
    left: dict[str, list[Question]] = {}
    for question in evaluation.questions:
        if (question.id,) not in evaluation.log:
            left.setdefault(question.group, []).append(question)
    continuations = [f" {letter}" for letter in _LETTERS]
    for subject, subject_questions in left.items():
        contexts = [question.prompt for question in subject_questions]
        scores = log_likelihoods.score(evaluation.model, contexts, continuations, evaluation.settings.batch_size)
        for index, values in scores:
            question = subject_questions[index]
            prediction = int(np.argmax(values))
            yield {
                "question_id": question.id,
                "group": subject,
                "log_likelihoods": values.tolist(),
                "prediction": _LETTERS[prediction],
                "correct": str(prediction) == question.reference["answer"],
            }


def _ask(row: list[str]) -> str:
    question, *choices, _ = row
    lines = [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=True)]
    return "\n".join([question.strip(), *lines, "Answer:"])


def _read_csv(path: Path) -> list[tuple[str, list[str]]]:
    """(location, row) of every question: the text, four choices and the number of the right one, from 0."""
    name = f"MMLU's CSV with the header {','.join(_HEADER)}"
    lines = csv.reader(io.StringIO(questions.read_text(path, name), newline=""), strict=True)
    rows = []
    try:
        for row in lines:
            rows.append((f"{path}:{lines.line_num}", row))
    except csv.Error as error:
        raise InputError(f"{path}:{lines.line_num}: not CSV ({error}): expected {name}") from error
    if not rows or rows[0][1] != _HEADER:
        raise InputError(f"{path}:1: has no such header: expected {name}")
    for location, row in rows[1:]:
        if len(row) != len(_HEADER):
            raise InputError(f"{location}: has {len(row)} columns: expected {name}")
        if row[-1] not in ("0", "1", "2", "3"):
            raise InputError(f"{location}: the answer is {row[-1]!r}, not 0, 1, 2 or 3: expected {name}")
    if len(rows) == 1:
        raise InputError(f"{path}: has no questions: expected {name}")
    return rows[1:]


SUITE = Suite(
    read,
    run,
    max_new_tokens=1,
    decoders=("autoregressive",),
    key=("question_id",),
    flags=("batch_size",),
)
