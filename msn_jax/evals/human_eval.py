"""HumanEval (arXiv 2107.03374): Python functions, by the protocol of lm-evaluation-harness, `humaneval` version 1.

A raw prompt is the beginning of the function. A chat model (`humaneval_instruct`) gets the problem as a message, and
its answer is begun with a fenced copy of the function; it ends at the first closing fence. The program is the prompt,
the completion, the problem's test and its call. HumanEval+ (arXiv 2305.01210) has the same problems with more tests.
"""

import dataclasses
from pathlib import Path

from msn_jax.decode.models import Model
from msn_jax.decode.request import Request
from msn_jax.evals import evalplus, programs, questions
from msn_jax.evals.questions import Question
from msn_jax.evals.suite import Evaluation, Suite

_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_FENCE = "```"
_FIELDS = {"task_id": str, "prompt": str, "entry_point": str}
_NAME = "HumanEval.jsonl.gz, or HumanEval+"


def read(path: str) -> list[Question]:
    """The problems of HumanEval.jsonl.gz or of HumanEval+ (HumanEvalPlus.jsonl.gz, or its Parquet file with a `test`).

    Raises:
      InputError: the file is malformed.
    """
    result = []
    for location, record in questions.read_records(Path(path), _FIELDS, _NAME):
        if evalplus.has_inputs(record):
            test = evalplus.to_test(record, location, _NAME)
        else:
            questions.check_fields(record, {"test": str}, location, _NAME)
            test = record["test"]
        reference = {"test": test, "entry_point": record["entry_point"]}
        result.append(Question(record["task_id"], "human_eval", record["prompt"], reference, location))
    questions.check_unique(result)
    return result


def run(evaluation: Evaluation) -> list[dict]:
    """A row per decoder."""
    chat = evaluation.settings.chat
    is_chat = is_chat_model(evaluation.model) if chat is None else chat
    make = chat_request if is_chat else raw_request
    limit = evaluation.settings.max_new_tokens
    rows = programs.run(evaluation, lambda q: dataclasses.replace(make(q), max_new_tokens=limit), to_program)
    return [row | {"prompt": "chat" if is_chat else "raw"} for row in rows]


def is_chat_model(model: Model) -> bool:
    """Whether the model has a chat template, or role symbols."""
    return model.tokenizer.template is not None or model.tokenizer.role_ids is not None


def raw_request(question: Question) -> Request:
    """The function to complete."""
    return Request(question.prompt, stop=_STOP)


def chat_request(question: Question) -> Request:
    """The problem as a message, and the beginning of the answer."""
    fenced = f"{_FENCE}python\n{question.prompt}\n"
    task = "Write a solution to the following problem and make sure that it passes the tests:"
    messages = [{"role": "user", "content": f"{task}\n{fenced}{_FENCE}\n"}]
    return Request(messages, stop=(_FENCE,), response_prefix=f"Here is the completed function:\n{fenced}")


def to_program(question: Question, text: str) -> str:
    """The program with its test."""
    reference = question.reference
    return f"{question.prompt}{text}\n{reference['test']}\ncheck({reference['entry_point']})\n"


SUITE = Suite(read, run, max_new_tokens=1024, flags=(*programs.FLAGS, "chat"), protocol=2)
