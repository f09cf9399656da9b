"""Spec-Bench (arXiv 2401.07851): speed of decoders over autoregressive decoding, in its protocol and file format.

480 questions in six groups; those of MT-bench have two turns, and turn 2 follows the decoder's own answer to turn 1.
Batch size 1, greedy. The decoders alternate on every question, in forward and reverse order, after three warm-up runs
each on the first question. The seconds of a turn include the prefill. A turn during which a program was compiled is
run again, because the benchmark is about decoding. OUTPUT/answers/DECODER.jsonl has the benchmark's own format.
"""

import time
from collections.abc import Sequence

from msn_jax import outputs
from msn_jax.cli import InputError
from msn_jax.decode import display, engine, programs
from msn_jax.decode.engine import Decoder, Generation
from msn_jax.decode.request import Request
from msn_jax.evals import conversations, statistics
from msn_jax.evals.conversations import MT_BENCH_CATEGORIES
from msn_jax.evals.questions import Question
from msn_jax.evals.suite import Evaluation, Suite

_REFERENCE = "autoregressive"
_GROUPS = ("translation", "summarization", "qa", "math_reasoning", "rag")  # next to those of MT-bench
_WARM_UPS = 3
_MAX_RUNS = 5  # of one turn


def read(path: str) -> list[Question]:
    """The questions of Spec-Bench's question.jsonl.

    Raises:
      InputError: the file is malformed, has an unknown category, or has MT-bench's questions alone.
    """
    result = conversations.read(path, "Spec-Bench's question.jsonl", (*MT_BENCH_CATEGORIES, *_GROUPS))
    grouped = [
        Question(q.id, "mt_bench" if q.group in MT_BENCH_CATEGORIES else q.group, q.prompt, q.reference, q.location)
        for q in result
    ]
    if all(question.group == "mt_bench" for question in grouped):
        raise InputError(f"{path}: has MT-bench's questions alone: expected Spec-Bench's question.jsonl")
    return grouped


def run(evaluation: Evaluation) -> list[dict]:
    """Logs the missing answers and writes the answer files; a row per group and decoder, and rows over all groups."""
    selected, log, decoders = evaluation.questions, evaluation.log, evaluation.decoders
    limit = evaluation.settings.max_new_tokens
    for question in selected:
        engine.encode(next(iter(decoders.values())), _request(question, [], limit), question.location)
    keys = {name: [(question.id, name) for question in selected] for name in decoders}
    done = [all(keys[name][i] in log for name in decoders) for i in range(len(selected))]
    if not all(done):
        for decoder in decoders.values():
            for _ in range(_WARM_UPS):
                answer(decoder, selected[0], limit)
    left = [i for i, is_done in enumerate(done) if not is_done]
    for i in outputs.with_progress(left, sum(done), len(selected), "questions"):
        for name in decoders if i % 2 == 0 else reversed(decoders):
            if keys[name][i] not in log:
                log.append(answer(decoders[name], selected[i], limit))
    answers = {name: [log[key] for key in keys[name]] for name in decoders}
    for name in decoders:
        conversations.write_answers(
            evaluation.output / "answers" / f"{name}.jsonl",
            [
                _to_line(question, sample, conversations.model_id(evaluation.model, name))
                for question, sample in zip(selected, answers[name], strict=True)
            ],
        )
    return summarize(answers)


def answer(decoder: Decoder, question: Question, max_new_tokens: int) -> dict:
    """Answers all turns of a question: a sample with one entry per turn, and `accept_lengths` over all turns."""
    texts: list[str] = []
    sample = {
        "question_id": question.id,
        "group": question.group,
        "decoder": decoder.name,
        "turns": texts,
        "tokens": [],
        "decoding_steps": [],
        "new_tokens": [],
        "wall_time": [],
        "accept_lengths": [],
        "passes": [],
        "finish_reasons": [],
    }
    for _ in question.prompt:
        generation = _timed_turn(decoder, _request(question, texts, max_new_tokens), question.location)
        if generation is None:  # the answers so far fill the context
            generation = Generation(0, "", "", [], 0, 0, [], 0.0, decoder.name, {}, "length")
        texts.append(generation.text.strip())
        sample["passes"].append(display.by_pass(decoder.model.tokenizer, generation))
        sample["tokens"].append(generation.tokens)
        sample["decoding_steps"].append(generation.forward_passes)
        sample["new_tokens"].append(generation.new_tokens)
        sample["wall_time"].append(generation.wall_time)
        sample["accept_lengths"] += generation.accept_lengths
        sample["finish_reasons"].append(generation.finish_reason)
    return sample | {"tstamp": time.time()}


def summarize(answers: dict[str, list[dict]]) -> list[dict]:
    """Rows of the report.

    Args:
      answers: samples by decoder, of the same questions in the same order.
    """
    by_group = {name: statistics.by_group(samples) for name, samples in answers.items()}
    rows = []
    for group in next(iter(by_group.values())):
        chosen = {name: groups[group] for name, groups in by_group.items()}
        for name, samples in chosen.items():
            row = {"group": group, "decoder": name, "questions": len(samples)}
            rates = _tokens_per_second(samples)
            emitted = [sum(sample["accept_lengths"]) for sample in samples]
            passes = [len(sample["accept_lengths"]) for sample in samples]
            if _REFERENCE in chosen:
                speedup = statistics.ratio_of_means(rates, _tokens_per_second(chosen[_REFERENCE]))
                row |= statistics.with_error("speedup", speedup)
            row |= statistics.with_error("mean_accepted_tokens", statistics.ratio_of_means(emitted, passes))
            row["accepted_by_position"] = accepted_by_position([n for s in samples for n in s["accept_lengths"]])
            row |= statistics.with_error("tokens_per_second", statistics.mean(rates))
            if _REFERENCE in chosen:
                pairs = zip(samples, chosen[_REFERENCE], strict=True)
                exact = [ours["tokens"] == theirs["tokens"] for ours, theirs in pairs]
                row |= statistics.with_error("exact", statistics.mean(exact))
            rows.append(row)
    return rows


def accepted_by_position(accept_lengths: Sequence[int]) -> list[float]:
    """The share of forward passes that accepted their first draft token, their first two, and so on.

    Args:
      accept_lengths: the tokens of every pass, one of which is not a draft.
    """
    longest = max(accept_lengths, default=1)
    return [sum(n > position for n in accept_lengths) / len(accept_lengths) for position in range(1, longest)]


def _tokens_per_second(samples: Sequence[dict]) -> list[float]:
    return [sum(sample["new_tokens"]) / sum(sample["wall_time"]) for sample in samples]


def _request(question: Question, answers: Sequence[str], max_new_tokens: int) -> Request:
    """The next turn."""
    return Request(conversations.messages(question.prompt, answers), max_new_tokens)


def _timed_turn(decoder: Decoder, request: Request, location: str) -> Generation | None:
    """The answer of a run that compiled nothing; None if the conversation fills the context."""
    ids = conversations.encode(decoder.model, request, location)
    if ids is None:
        return None
    for _ in range(_MAX_RUNS):
        with programs.recorded() as compiled:
            [generation] = decoder.generate_batch([0], [ids], [request], 1)
            engine.wait_for_compilation(decoder.model)
        if not compiled:
            break
    return generation


def _to_line(question: Question, sample: dict, model_id: str) -> dict:
    """A line of the benchmark's answer file."""
    names = ("turns", "decoding_steps", "new_tokens", "wall_time", "accept_lengths")
    return {
        "question_id": question.id,
        "category": question.reference["category"],
        "answer_id": conversations.answer_id(model_id, question, sample["turns"]),
        "model_id": model_id,
        "choices": [{"index": 0, **{name: sample[name] for name in names}}],
        "tstamp": sample["tstamp"],
    }


SUITE = Suite(
    read,
    run,
    max_new_tokens=1024,
    decoders=(_REFERENCE, "auto"),
    key=("question_id", "decoder"),
    flags=("decoders", "max_new_tokens"),
    is_timed=True,
)
