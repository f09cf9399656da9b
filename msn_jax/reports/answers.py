"""Answers to show, in the parts that the forward passes emitted."""

import dataclasses
from collections.abc import Sequence

from msn_jax.reports.sources import Source

_MAX_GROUPS = 8  # with an answer of its own
_BYTES_OF_MARKUP = 8  # of a pass


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer of one decoder."""

    decoder: str
    group: str
    title: str
    passes: list[str]  # the text of each forward pass
    lengths: list[int]  # the tokens of each forward pass; empty if the run did not record them
    prompt: str = ""
    num_cut: int = 0  # forward passes that are left out at the end

    @property
    def pace(self) -> float:
        """Characters per forward pass."""
        return sum(map(len, self.passes)) / len(self.passes)

    @property
    def mean_accepted_tokens(self) -> float | None:
        """Tokens per forward pass, if recorded."""
        return sum(self.lengths) / len(self.lengths) if self.lengths else None


def choose(source: Source) -> list[Answer]:
    """Answers of the decoder with the most text per pass: a typical one of each group, or three of a single group."""
    if source.kind == "demo":
        return [_of_demo(record) for record in source.report.get("answers") or [] if record["passes"]]
    candidates = [answer for sample in source.samples for answer in _of_sample(sample)]
    by_decoder: dict[str, list[Answer]] = {}
    for answer in candidates:
        by_decoder.setdefault(answer.decoder, []).append(answer)
    if not by_decoder:
        return []
    fastest = max(by_decoder.values(), key=_pace)
    groups: dict[str, list[Answer]] = {}
    for answer in fastest:
        groups.setdefault(answer.group, []).append(answer)
    if len(groups) > 1:
        return [_typical(group) for group in list(groups.values())[:_MAX_GROUPS]]
    ordered = sorted(fastest, key=lambda answer: answer.pace)
    if len(ordered) < 3:
        return ordered[::-1]
    chosen = {"typical": ordered[len(ordered) // 2], "most tokens per pass": ordered[-1], "fewest": ordered[0]}
    return [dataclasses.replace(answer, title=f"{answer.title}, {name}") for name, answer in chosen.items()]


def shorten(answer: Answer, size: int) -> Answer:
    """The answer, cut after a forward pass if it has more than about `size` bytes."""
    used = 0
    for number, text in enumerate(answer.passes):
        used += len(text.encode("utf-8", "replace")) + _BYTES_OF_MARKUP
        if used > size:
            kept = max(number, 1)
            return dataclasses.replace(
                answer,
                passes=answer.passes[:kept],
                lengths=answer.lengths[:kept],
                num_cut=len(answer.passes) - kept,
            )
    return answer


def _of_sample(sample: dict) -> list[Answer]:
    """One answer per turn; none if the log is of an older version, or nothing was generated."""
    passes = sample.get("passes") or []
    turns: list[list[str]] = passes if passes and isinstance(passes[0], list) else [passes]
    lengths = sample.get("accept_lengths") or []
    if sum(map(len, turns)) != len(lengths):
        lengths = []
    group, question = str(sample.get("group", "")), f"question {sample.get('question_id')}"
    result, begin = [], 0
    for turn, texts in enumerate(turns, 1):
        number = turn if len(turns) > 1 else sample.get("turn")
        title = question if number is None else f"{question}, turn {number}"
        if texts and any(texts):
            own = lengths[begin : begin + len(texts)]
            result.append(Answer(sample.get("decoder") or "", group, title, texts, own))
        begin += len(texts)
    return result


def _of_demo(record: dict) -> Answer:
    prompt = record["prompt"]
    if isinstance(prompt, list):
        contents = [message.get("content") for message in prompt if isinstance(message, dict)]
        prompt = "\n\n".join(content for content in contents if isinstance(content, str))
    return Answer(record["decoder"], record["model"], record["model"], record["passes"], [], prompt)


def _pace(answers: Sequence[Answer]) -> float:
    passes = sum(len(answer.passes) for answer in answers)
    return sum(answer.pace * len(answer.passes) for answer in answers) / passes


def _typical(answers: Sequence[Answer]) -> Answer:
    """The one with the median pace among the longer half."""
    longer = sorted(answers, key=lambda answer: sum(map(len, answer.passes)))[len(answers) // 2 :]
    return sorted(longer, key=lambda answer: answer.pace)[len(longer) // 2]
