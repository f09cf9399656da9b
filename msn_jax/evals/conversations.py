"""Questions of several turns, and answer files in the format of FastChat, which Spec-Bench extends."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from msn_jax import outputs
from msn_jax.cli import InputError
from msn_jax.decode.models import Model
from msn_jax.decode.request import Request, encode_prompt
from msn_jax.evals import questions
from msn_jax.evals.questions import Question

MT_BENCH_CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")

_NO_LIMIT = 1 << 30  # tokens
_FIELDS = {"category": str, "turns": list[str]}


def read(path: str, name: str, categories: Sequence[str] | None, id_type: type = int) -> list[Question]:
    """The questions of a file; a question's group is its category.

    Args:
      path: the file.
      name: what the file should be, for error messages.
      categories: the known ones; None if any will do.
      id_type: of field 'question_id', int or str.

    Raises:
      InputError: the file is malformed or has an unknown category.
    """
    result = []
    for location, record in questions.read_records(Path(path), {"question_id": id_type, **_FIELDS}, name):
        category = record["category"]
        if categories is not None and category not in categories:
            raise InputError(
                f"{location}: category {category!r} is not one of {', '.join(categories)}: expected {name}"
            )
        reference = {"category": category}
        result.append(Question(record["question_id"], category, tuple(record["turns"]), reference, location))
    questions.check_unique(result)
    return result


def messages(turns: Sequence[str], answers: Sequence[str]) -> list[dict]:
    """The conversation up to the user's turn that follows the given answers."""
    result = []
    for turn, answer in zip(turns, answers, strict=False):
        result += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
    return [*result, {"role": "user", "content": turns[len(answers)]}]


def encode(model: Model, request: Request, location: str) -> list[int] | None:
    """The token ids of a conversation; None if it fills the model's context. InputError if it cannot be encoded."""
    ids = encode_prompt(model.tokenizer, request, _NO_LIMIT, location)
    return ids if len(ids) < model.cfg.max_length else None


def answer_id(model_id: str, question: Question, turns: Sequence[str]) -> str:
    """An id in FastChat's form; the same answer of the same model has the same one."""
    return hashlib.sha256("\0".join([model_id, str(question.id), *turns]).encode()).hexdigest()[:22]


def model_id(model: Model, decoder: str) -> str:
    """The name of a model with a decoder in an answer file."""
    return f"{Path(model.name).name}{'-adapter' if model.adapter is not None else ''}-{decoder}"


def write_answers(path: Path, answers: Sequence[dict]) -> None:
    """Writes an answer file, sorted by question."""
    path.parent.mkdir(exist_ok=True)
    ordered = sorted(answers, key=lambda answer: answer["question_id"])
    outputs.replace_text(path, "".join(json.dumps(answer) + "\n" for answer in ordered))
