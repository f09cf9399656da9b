"""MBPP (arXiv 2108.07732): Python tasks with three tests, by the protocol of lm-evaluation-harness, `mbpp` version 1.

The test split is tasks 11 to 510 of mbpp.jsonl. The prompt is raw text: tasks 2, 3 and 4 with their code, then the
task. The same prompts, with shots of their own, serve two later versions of the data: sanitized-mbpp.json (its test
split, tasks 11 to 510, has 257) and MBPP+ (arXiv 2305.01210, all its tasks, with many more tests).
"""

from pathlib import Path

from msn_jax.cli import InputError
from msn_jax.decode.request import Request
from msn_jax.evals import programs, questions
from msn_jax.evals.questions import Question
from msn_jax.evals.suite import Evaluation, Suite

_SHOTS = (2, 3, 4)
_TEST_SPLIT = range(11, 511)
_SHOWN_TESTS = 3
_FIELDS = {"task_id": int, "code": str, "test_list": list[str]}
_NAME = "mbpp.jsonl, sanitized-mbpp.json, or MBPP+ with its field 'test'"


def read(path: str) -> list[Question]:
    """The test split of mbpp.jsonl or sanitized-mbpp.json, or all tasks of MBPP+ (JSON lines or Parquet).

    Raises:
      InputError: the file is malformed, or lacks the shots or the test split.
    """
    lines = questions.read_records(Path(path), _FIELDS, _NAME)
    for location, record in lines:
        # The task is called 'text' in the first version of the data, and 'prompt' in the later ones.
        questions.check_fields(record, {"prompt" if "prompt" in record else "text": str}, location, _NAME)
    by_id = {record["task_id"]: record for _, record in lines}
    missing = [number for number in _SHOTS if number not in by_id]
    if missing:
        raise InputError(f"{path}: has no task {missing[0]}, one of the shots: expected {_NAME}")
    shots = "".join(f"{_ask(by_id[number])}{by_id[number]['code']}\n[DONE]\n\n" for number in _SHOTS)
    result = []
    for location, record in lines:
        if "test" in record or record["task_id"] in _TEST_SPLIT:
            tests = {"tests": _tests(record, location)}
            result.append(Question(record["task_id"], "mbpp", shots + _ask(record), tests, location))
    if not result:
        raise InputError(f"{path}: has no task from {_TEST_SPLIT[0]} to {_TEST_SPLIT[-1]}, the test split of {_NAME}")
    questions.check_unique(result)
    return result


def _tests(record: dict, location: str) -> list[str]:
    """Lines of Python that run the tests."""
    if "test" in record:
        questions.check_fields(record, {"test": str}, location, _NAME)
        return [record["test"]]
    if "test_imports" in record:  # sanitized: all tests, of which there may be more
        imports = record["test_imports"] or []
        if imports:
            questions.check_fields(record, {"test_imports": list[str]}, location, _NAME)
        return [*imports, *record["test_list"]]
    return record["test_list"][:_SHOWN_TESTS]


def run(evaluation: Evaluation) -> list[dict]:
    """A row per decoder."""
    limit = evaluation.settings.max_new_tokens
    return programs.run(evaluation, lambda q: Request(q.prompt, limit, stop=("[DONE]",)), to_program)


def to_program(question: Question, text: str) -> str:
    """The program with its tests."""
    return "\n".join([text, *question.reference["tests"], ""])


def _ask(record: dict) -> str:
    text = record["prompt"] if "prompt" in record else record["text"]
    task = f"You are an expert Python programmer, and here is your task: {text}"
    tests = "\n".join(record["test_list"][:_SHOWN_TESTS])
    return f"{task} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"


SUITE = Suite(read, run, max_new_tokens=256, flags=programs.FLAGS)
