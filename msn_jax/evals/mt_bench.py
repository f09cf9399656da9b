"""MT-bench (arXiv 2306.05685): answers to 80 questions of two turns, in FastChat's format, for its judge.

Turn 2 follows the model's own answer to turn 1. The temperature depends on the category, as in FastChat. The score
needs a judge, so the report only has lengths; OUTPUT/answers/DECODER.jsonl is the judge's input.
"""

import dataclasses
from collections.abc import Sequence

from msn_jax.decode.request import Request
from msn_jax.evals import conversations, generations, statistics
from msn_jax.evals.conversations import MT_BENCH_CATEGORIES
from msn_jax.evals.generations import Task
from msn_jax.evals.questions import Question
from msn_jax.evals.suite import Evaluation, Suite

_TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}  # the others: greedy


def read(path: str) -> list[Question]:
    """The questions of MT-bench's question.jsonl. InputError if the file is malformed or has another category."""
    return conversations.read(path, "MT-bench's question.jsonl", MT_BENCH_CATEGORIES)


def run(evaluation: Evaluation) -> list[dict]:
    """Logs the missing answers and writes the answer files; a row per category and decoder, and rows over all."""
    rows = []
    for name, decoder in evaluation.decoders.items():
        own = dataclasses.replace(evaluation, decoders={name: decoder})
        samples = _answer(own, name)
        model_id = conversations.model_id(evaluation.model, name)
        lines = [_to_line(q, samples[q.id], model_id) for q in evaluation.questions]
        conversations.write_answers(evaluation.output / "answers" / f"{name}.jsonl", lines)
        rows += _rows(name, [sample for of_question in samples.values() for sample in of_question])
    return rows


def _answer(evaluation: Evaluation, decoder: str) -> dict[int | str, list[dict]]:
    """The samples of every question, one per turn; fewer where the answers fill the context before the last turn."""
    samples: dict[int | str, list[dict]] = {question.id: [] for question in evaluation.questions}
    for turn in range(max(len(question.prompt) for question in evaluation.questions)):
        tasks = []
        for question in evaluation.questions:
            answers = [sample["text"].strip() for sample in samples[question.id]]
            if len(answers) == turn < len(question.prompt):
                request = _request(evaluation, question, answers)
                if turn == 0 or conversations.encode(evaluation.model, request, question.location) is not None:
                    tasks.append(Task(question, request, {"turn": turn + 1}))
        for sample in generations.generate(evaluation, tasks, lambda *_: {})[decoder]:
            samples[sample["question_id"]].append(sample)
    return samples


def _request(evaluation: Evaluation, question: Question, answers: Sequence[str]) -> Request:
    settings = evaluation.settings
    return Request(
        conversations.messages(question.prompt, answers),
        settings.max_new_tokens,
        _TEMPERATURES.get(question.group, 0.0),
        seed=settings.seed,
        sample=question.id,
    )


def _to_line(question: Question, samples: Sequence[dict], model_id: str) -> dict:
    """A line of FastChat's answer file; turns without space in the context are empty."""
    texts = [sample["text"].strip() for sample in samples]
    turns = texts + [""] * (len(question.prompt) - len(texts))
    return {
        "question_id": question.id,
        "answer_id": conversations.answer_id(model_id, question, turns),
        "model_id": model_id,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": samples[-1]["time"],
    }


def _rows(decoder: str, samples: Sequence[dict]) -> list[dict]:
    rows = []
    for group, chosen in statistics.by_group(samples).items():
        tokens = [len(sample["tokens"]) for sample in chosen]
        passes = [sample["forward_passes"] for sample in chosen]
        row = {"category": group, "decoder": decoder, "turns": len(chosen)}
        row |= statistics.with_error("tokens_per_turn", statistics.mean(tokens))
        row |= statistics.with_error("mean_accepted_tokens", statistics.ratio_of_means(tokens, passes))
        rows.append(row)
    return rows


SUITE = Suite(
    read,
    run,
    max_new_tokens=1024,
    key=("question_id", "decoder", "turn"),
    flags=("decoders", "max_new_tokens", "batch_size", "seed"),
)
