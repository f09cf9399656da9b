"""GSM8K (arXiv 2110.14168): grade-school mathematics, by the protocol of lm-evaluation-harness, `gsm8k` version 3.

The prompt is raw text: five questions with worked answers, then the question. As in the harness, the five are drawn
anew for every question, in the order of the file, by a `random.Random` with its default seed, 1234. Decoding is greedy.
`benchmarks/lm_eval_peer.py` compares the prompts.
"""

import random
import re
from pathlib import Path

from msn_jax.cli import InputError
from msn_jax.decode.request import Request
from msn_jax.evals import generations, questions, statistics
from msn_jax.evals.generations import Task
from msn_jax.evals.questions import Question
from msn_jax.evals.suite import Evaluation, Suite

_SHOTS = 5
_SHOTS_SEED = 1234
_STOP = ("Question:", "</s>", "<|im_end|>")
_FIELDS = {"question": str, "answer": str}
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def read(directory: str) -> list[Question]:
    """The questions of DIRECTORY/test.jsonl, with shots from DIRECTORY/train.jsonl; their ids count from 0.

    Raises:
      InputError: a file is missing or malformed, or has fewer questions than shots.
    """
    train, test = (
        questions.read_records(Path(directory) / f"{split}.jsonl", _FIELDS, f"GSM8K's {split}.jsonl")
        for split in ("train", "test")
    )
    if len(train) < _SHOTS:
        raise InputError(f"{Path(directory) / 'train.jsonl'}: has {len(train)} questions; {_SHOTS} shots need as many")
    drawn = random.Random(_SHOTS_SEED)
    result = []
    for number, (location, record) in enumerate(test):
        if _STRICT.search(record["answer"]) is None:
            raise InputError(f"{location}: the answer has no number after '####': expected GSM8K's test.jsonl")
        shots = [f"{_ask(shot)} {shot['answer']}\n\n" for _, shot in drawn.sample(train, _SHOTS)]
        reference = {"answer": strict_answer(record["answer"])}
        result.append(Question(number, "gsm8k", "".join(shots) + _ask(record), reference, location))
    return result


def strict_answer(text: str) -> str | None:
    """The first number after '####', normalized."""
    match = _STRICT.search(text)
    return None if match is None else _normalize(match[1])


def flexible_answer(text: str) -> str | None:
    """The last number, normalized."""
    numbers = _NUMBER.findall(text)
    return _normalize(numbers[-1]) if numbers else None


def score(question: Question, text: str) -> dict:
    """The two extracted answers and whether they are correct."""
    strict, flexible = strict_answer(text), flexible_answer(text)
    expected = question.reference["answer"]
    return {
        "strict_answer": strict,
        "flexible_answer": flexible,
        "strict_match": strict == expected,
        "flexible_match": flexible == expected,
    }


def run(evaluation: Evaluation) -> list[dict]:
    """A row per decoder."""
    limit = evaluation.settings.max_new_tokens
    tasks = [Task(q, Request(q.prompt, limit, stop=_STOP), {"sample": 0}) for q in evaluation.questions]
    rows = []
    for name, samples in generations.generate(evaluation, tasks, score).items():
        row = {"decoder": name, "questions": len(samples)}
        for match in ("strict_match", "flexible_match"):
            row |= statistics.with_error(match, statistics.mean([sample[match] for sample in samples]))
        tokens, passes = [len(s["tokens"]) for s in samples], [s["forward_passes"] for s in samples]
        row |= statistics.with_error("mean_accepted_tokens", statistics.ratio_of_means(tokens, passes))
        rows.append(row)
    return rows


def _ask(record: dict) -> str:
    return f"Question: {record['question']}\nAnswer:"


def _normalize(number: str) -> str:
    """Without thousands separators, `$` and a final point."""
    return number.replace(",", "").replace("$", "").removesuffix(".")


SUITE = Suite(read, run, max_new_tokens=256)
