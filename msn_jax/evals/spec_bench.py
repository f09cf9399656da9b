"""Spec-Bench (arXiv 2401.07851): speed of decoders over autoregressive decoding, in its protocol and file format.

480 questions in six groups; those of MT-bench have two turns, and turn 2 follows the decoder's own answer to turn 1.
Batch size 1, greedy, three runs over all questions. The decoders alternate on every question, in forward and reverse
order, after three warm-ups each on the first question. The seconds of a turn include the prefill. A turn during which a
program was compiled is run again, because the benchmark is about decoding. OUTPUT/answers/DECODER.jsonl, and
DECODER-run-2.jsonl and so on, have the benchmark's own format.
"""

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence

from msn_jax import outputs
from msn_jax.cli import InputError
from msn_jax.decode import display, engine, programs
from msn_jax.decode.engine import Decoder, Generation
from msn_jax.decode.request import Request
from msn_jax.evals import conversations, statistics
from msn_jax.evals.conversations import MT_BENCH_CATEGORIES
from msn_jax.evals.questions import Question
from msn_jax.evals.sample_log import Key
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

    def key(question: Question, run: int, decoder: str) -> Key:
        return log.key_of({"question_id": question.id, "run": run, "decoder": decoder})

    order = list(_order(selected, evaluation.settings.runs, decoders))
    left = [one for one in order if key(*one) not in log]
    if left:
        for decoder in decoders.values():
            for _ in range(_WARM_UPS):
                answer(decoder, selected[0], limit)
    for question, run, name in outputs.with_progress(left, len(order) - len(left), len(order), "answers"):
        log.append({"run": run, **answer(decoders[name], question, limit)})
    answers = {
        name: [[log[key(question, run, name)] for question in selected] for run in range(evaluation.settings.runs)]
        for name in decoders
    }
    for name, by_run in answers.items():
        model_id = conversations.model_id(evaluation.model, name)
        for run, samples in enumerate(by_run):
            lines = [_to_line(*pair, model_id) for pair in zip(selected, samples, strict=True)]
            file_name = f"{name}.jsonl" if run == 0 else f"{name}-run-{run + 1}.jsonl"
            conversations.write_answers(evaluation.output / "answers" / file_name, lines)
    return summarize(answers)


def _order(selected: Sequence[Question], num_runs: int, decoders: Iterable[str]) -> Iterator[tuple[Question, int, str]]:
    """All runs, in each all questions, for each all decoders, in forward and reverse order by turns."""
    names = list(decoders)
    for run in range(num_runs):
        for i, question in enumerate(selected):
            for name in names if (i + run) % 2 == 0 else reversed(names):
                yield question, run, name


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


def summarize(answers: dict[str, list[list[dict]]]) -> list[dict]:
    """Rows of the report.

    Args:
      answers: samples by decoder, run and question, of the same questions in the same order.
    """
    by_group = {name: [statistics.by_group(samples) for samples in runs] for name, runs in answers.items()}
    rows = []
    for group in next(iter(by_group.values()))[0]:
        chosen = {name: [run[group] for run in runs] for name, runs in by_group.items()}
        rows += [_row(group, name, runs, chosen.get(_REFERENCE)) for name, runs in chosen.items()]
    return rows


def _row(group: str, name: str, runs: list[list[dict]], reference: list[list[dict]] | None) -> dict:
    """The row of a group and decoder: `runs` are its samples by run and question."""
    row = {"group": group, "decoder": name, "questions": len(runs[0])}
    rates = _tokens_per_second(runs)
    lengths = [[n for sample in samples for n in sample["accept_lengths"]] for samples in zip(*runs, strict=True)]
    if reference is not None:
        speedup = statistics.ratio_of_means(rates, _tokens_per_second(reference))
        row |= statistics.with_error("speedup", speedup)
        row["speedup_by_run"] = [
            statistics.ratio_of_means(_tokens_per_second([ours]), _tokens_per_second([theirs]))[0]
            for ours, theirs in zip(runs, reference, strict=True)
        ]
    accepted = statistics.ratio_of_means([sum(one) for one in lengths], [len(one) for one in lengths])
    row |= statistics.with_error("mean_accepted_tokens", accepted)
    row["accepted_by_position"] = accepted_by_position([n for one in lengths for n in one])
    row |= statistics.with_error("tokens_per_second", statistics.mean(rates))
    if reference is not None:
        differences = [
            [_first_difference(sample, expected) for sample in samples]
            for samples, expected in zip(zip(*runs, strict=True), reference[0], strict=True)
        ]
        row |= statistics.with_error("exact", statistics.mean([not any(found) for found in differences]))
        row["first_difference"] = next((one for found in differences for one in found if one), None)
    return row


def _first_difference(sample: dict, expected: dict) -> str:
    """Where the tokens of a sample begin to differ from those of another one; '' if they are equal."""
    for turn, (ours, theirs) in enumerate(zip(sample["tokens"], expected["tokens"], strict=True), 1):
        if ours != theirs:
            same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))
            return f"question {sample['question_id']}, turn {turn}, token {len(list(same))}"
    return ""


def accepted_by_position(accept_lengths: Sequence[int]) -> list[float]:
    """The share of forward passes that accepted their first draft token, their first two, and so on.

    Args:
      accept_lengths: the tokens of every pass, one of which is not a draft.
    """
    longest = max(accept_lengths, default=1)
    return [sum(n > position for n in accept_lengths) / len(accept_lengths) for position in range(1, longest)]


def _tokens_per_second(runs: Sequence[Sequence[dict]]) -> list[float]:
    """Of every question, over all runs."""
    return [
        sum(sum(sample["new_tokens"]) for sample in samples) / sum(sum(sample["wall_time"]) for sample in samples)
        for samples in zip(*runs, strict=True)
    ]


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
    key=("question_id", "decoder", "run"),
    flags=("decoders", "max_new_tokens", "runs"),
    protocol=2,
    is_timed=True,
)
