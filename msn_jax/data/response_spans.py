"""Which characters of a rendered conversation are the assistant's, exactly or not at all.

 1. Where the template marks them with `{% generation %}`, the marked ones.
 2. Otherwise by construction. A turn begins where the generation prompt ends, because the model sees exactly that text
    when its turn comes; it ends with its end token, the first special token after its content. Contents are located by
    rendering the conversation twice, once with an unused character after every content; apart from that character the
    two texts must be equal. So a template may strip, shorten or drop contents, or add a system prompt. The text that it
    writes around a content is learned from a small conversation, and must recur at each turn.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n Hello <|im_end|> \\n
                                                            `-- content   `-- end token, the last that counts

A turn with tool calls is located by the name of its last call, and ends with the special token that closes calls in
the small conversation.
"""

import dataclasses
import datetime
import functools
import re
from collections.abc import Sequence

from msn_jax.cli import InputError
from msn_jax.data.chat_template import ChatTemplate, Span, unused_characters
from msn_jax.data.messages import PROBE_ARGUMENTS, PROBE_TOOLS, has_calls, probe_call, probe_result, strings

_MARK = "\ue000"


@dataclasses.dataclass(frozen=True)
class _Frame:
    """The text that a template writes around the assistant's content."""

    header: str  # the generation prompt, without `surplus`; '' for templates that have none
    opening: str  # from the generation prompt to the content, for templates that have no generation prompt; else ''
    surplus: str  # the end of the generation prompt that a finished turn lacks, such as '<think>\\n'; mostly ''
    end: str  # from the end of the content to the end of the end token


@dataclasses.dataclass(frozen=True)
class _Rendering:
    """A conversation and its text."""

    template: ChatTemplate
    messages: list[dict]
    tools: list[dict] | None
    now: datetime.datetime
    text: str
    literal: Sequence[Span]  # characters in which special tokens are plain text
    end_tokens: frozenset[str]

    def find(self, part: str, start: int, stop: int | None = None) -> list[int]:
        """Where `part` occurs in text[start:stop] outside of `literal`."""
        starts, position = [], self.text.find(part, start, stop)
        while position >= 0:
            if not any(first < position + len(part) and position < last for first, last in self.literal):
                starts.append(position)
            position = self.text.find(part, position + 1, stop)
        return starts


def find_response_spans(
    template: ChatTemplate,
    messages: list[dict],
    tools: list[dict] | None,
    now: datetime.datetime,
    text: str,
    literal: Sequence[Span],
    end_tokens: frozenset[str],
    per_message: bool = False,
) -> list[Span]:
    """The assistant's turns in `text`, each including its end token.

    Args:
      template: the template that rendered `text`.
      messages: as `messages.normalize` returns them.
      tools: JSON schemas of functions, or None.
      now: the time that the template was given.
      text: the rendered conversation.
      literal: characters of `text` in which special tokens are plain text.
      end_tokens: the texts of all special tokens, one of which ends a turn. With `{% generation %}` the template itself
        decides what ends a turn.
      per_message: whether to return exactly one span per assistant message, in order.

    Returns:
      One span per assistant message; with `{% generation %}` and not `per_message`, one per outermost block that
      prints something.

    Raises:
      InputError: the spans cannot be located exactly.
    """
    rendering = _Rendering(template, messages, tools, now, text, literal, end_tokens)
    if not template.has_generation_blocks:
        return _constructed_spans(rendering)
    opening, closing = unused_characters(text, 2)
    marked = template.render(messages, False, tools, now, markers=(opening, closing))
    if marked.replace(opening, "").replace(closing, "") != text:
        raise _not_located(template, "it does more with its {% generation %} blocks than print them")
    spans = _outermost_blocks(marked, opening, closing)
    if not spans:
        raise _not_located(template, "its {% generation %} blocks mark nothing in this conversation")
    if per_message:
        _check_one_block_per_message(rendering, len(spans))
    return spans


def _outermost_blocks(marked: str, opening: str, closing: str) -> list[Span]:
    """The spans between markers that are not empty, in coordinates of the text without markers."""
    spans, depth, position, start = [], 0, 0, 0
    for character in marked:
        if character == opening:
            start = position if depth == 0 else start
            depth += 1
        elif character == closing:
            depth -= 1
            if depth == 0 and position > start:
                spans.append((start, position))
        else:
            position += 1
    return spans


def _check_one_block_per_message(rendering: _Rendering, count: int) -> None:
    """InputError unless each of `count` blocks prints the content, or last call, of its own assistant message.

    They are matched by rendering the conversation once more, with a numbered mark in each content.
    """
    opening, closing, mark = unused_characters(rendering.text + "".join(strings(rendering.messages)), 3)
    messages, turns = [], 0
    for message in rendering.messages:
        if message["role"] == "assistant":
            message = _with_mark(message, f"{mark}{turns}{mark}")
            turns += 1
        messages.append(message)
    marked = rendering.template.render(messages, False, rendering.tools, rendering.now, markers=(opening, closing))
    plain = marked.replace(opening, "").replace(closing, "")
    blocks = [plain[slice(*span)] for span in _outermost_blocks(marked, opening, closing)]
    printed = [re.findall(f"{mark}([0-9]+){mark}", block) for block in blocks]
    if count != turns or printed != [[str(turn)] for turn in range(turns)]:
        raise InputError(
            f"{rendering.template.location}: its {{% generation %}} blocks do not correspond to the assistant's "
            "messages one to one, so a message with train false cannot be left out"
        )


def _constructed_spans(rendering: _Rendering) -> list[Span]:
    turns = [index for index, message in enumerate(rendering.messages) if message["role"] == "assistant"]
    frame = _frame(rendering.template, rendering.end_tokens)
    spans, previous_end = [], 0
    for index, (content_end, end) in zip(turns, _turn_ends(rendering, turns, frame), strict=True):
        start = _turn_start(rendering, index, frame, previous_end, content_end)
        if not previous_end <= start <= content_end <= end:
            raise _depends_on_later(rendering, index)
        spans.append((start, end))
        previous_end = end
    return spans


def _turn_start(rendering: _Rendering, index: int, frame: _Frame, first: int, last: int) -> int:
    """Where the turn of message `index` begins, within text[first:last]."""
    template, text = rendering.template, rendering.text
    try:
        prompt = template.render(rendering.messages[:index], True, rendering.tools, rendering.now)
        if not text.startswith(prompt) and frame.surplus and prompt.endswith(frame.surplus):
            prompt = prompt.removesuffix(frame.surplus)
        if text.startswith(prompt + frame.opening) and first <= len(prompt + frame.opening) <= last:
            return len(prompt + frame.opening)
    except InputError:  # most templates refuse the empty conversation before an assistant that speaks first
        if index:
            raise
    # The text before the turn depends on later messages, as where a template drops old thoughts. Then the header
    # itself marks the turn, unless a content could be mistaken for it.
    if frame.header.strip():
        starts = rendering.find(frame.header, first, last)
        if len(starts) == 1 and not any(
            frame.header.strip() in content for content in strings(rendering.messages[: index + 1])
        ):
            return starts[0] + len(frame.header)
    elif index == 0 and not has_calls(rendering.messages[0]):
        (mark,) = unused_characters(text, 1)
        other = [{**rendering.messages[0], "content": mark}, *rendering.messages[1:]]
        shared = _shared_length(text, template.render(other, False, rendering.tools, rendering.now))
        return min(len(text[:shared].rstrip()), last)  # white space before the content is for the model to write
    raise _depends_on_later(rendering, index)


def _turn_ends(rendering: _Rendering, turns: list[int], frame: _Frame) -> list[tuple[int, int]]:
    """(end of the content or of the last call's name, end of the turn) of each assistant turn."""
    template, text = rendering.template, rendering.text
    (mark,) = unused_characters(text + "".join(strings(rendering.messages)), 1)
    marked = [_with_mark(message, mark) for message in rendering.messages]
    pieces = template.render(marked, False, rendering.tools, rendering.now).split(mark)
    if len(pieces) != len(turns) + 1:
        raise _not_located(template, "it drops or repeats a content of the assistant")
    ends, position = [], 0  # in text
    for index, piece in zip(turns, pieces[:-1], strict=True):
        shared = _shared_length(piece, text[position : position + len(piece)])
        calls = has_calls(rendering.messages[index])
        if piece[shared:].strip() or (calls and piece[shared:]):  # white space at a content's end may be stripped
            raise _not_located(template, "the end of a content changes how it renders the content")
        start, position = position, position + shared
        if calls:
            ends.append((position, _call_turn_end(rendering, index, position)))
            continue
        # The text after the content may begin with the white space that was stripped off the content.
        while not text.startswith(frame.end, position) and position > start and text[position - 1].isspace():
            position -= 1
        if not text.startswith(frame.end, position):
            raise _not_located(
                template, f"message {index + 1} does not end as the assistant's turns usually do, with {frame.end!r}"
            )
        ends.append((position, position + len(frame.end)))
    if pieces[-1] != text[position:]:
        raise _not_located(template, "the end of a content changes the text after it")
    return ends


def _with_mark(message: dict, mark: str) -> dict:
    """The message with a mark after the assistant's content, or after the name of its last call."""
    if message["role"] != "assistant":
        return message
    if not has_calls(message):
        return {**message, "content": message["content"] + mark}
    *calls, last = message["tool_calls"]
    function = {**last["function"], "name": last["function"]["name"] + mark}
    return {**message, "tool_calls": [*calls, {**last, "function": function}]}


def _call_turn_end(rendering: _Rendering, index: int, position: int) -> int:
    token, count = _call_end(rendering.template, rendering.end_tokens)
    starts = rendering.find(token, position)
    if len(starts) < count:
        raise _not_located(rendering.template, f"message {index + 1} does not end with {token!r} after its calls")
    if not rendering.literal and any(token in text for text in strings(rendering.messages[index])):
        raise _not_located(rendering.template, f"a call of message {index + 1} contains the end token {token!r}")
    return starts[count - 1] + len(token)


@functools.lru_cache(maxsize=64)
def _frame(template: ChatTemplate, end_tokens: frozenset[str]) -> _Frame:
    question, now = [{"role": "user", "content": "a"}], datetime.datetime.now()
    before = template.render(question, False, now=now)
    prompt = template.render(question, True, now=now)
    whole = template.render([*question, {"role": "assistant", "content": _MARK}], False, now=now)
    header, mark, tail = whole.partition(_MARK)
    if not mark:
        raise _not_located(template, "it does not print the assistant's content")
    shared = header[: _shared_length(header, prompt)]
    opening = header[len(shared) :] if prompt == before and shared == prompt else ""
    opening = opening if opening.strip() else ""  # white space alone is no header: the model is to write it
    surplus = prompt[len(shared) :]
    if surplus and header != shared:
        raise _not_located(template, "its generation prompt differs from the beginning of an assistant's turn")
    end = _first_token(tail, end_tokens)
    if end is None:
        raise _not_located(template, "it writes no special token at the end of the assistant's turns")
    generation = prompt.removeprefix(before) if prompt.startswith(before) else ""
    return _Frame(generation.removesuffix(surplus) if surplus else generation, opening, surplus, tail[: end[1]])


@functools.lru_cache(maxsize=64)
def _call_end(template: ChatTemplate, end_tokens: frozenset[str]) -> tuple[str, int]:
    """The token that ends a turn with calls, and how many of it follow the name of the last call."""
    user, now = {"role": "user", "content": "a"}, datetime.datetime.now()
    for arguments in PROBE_ARGUMENTS:
        call = probe_call(f"f{_MARK}", arguments)
        try:
            last = template.render([user, call], False, PROBE_TOOLS, now)
            followed = template.render([user, call, probe_result(_MARK)], False, PROBE_TOOLS, now)
        except InputError:
            continue
        if last.count(_MARK) != 1 or followed.count(_MARK) != 2:
            continue
        tokens = _tokens(last.partition(_MARK)[2], end_tokens)
        others = _tokens(followed.split(_MARK)[1], end_tokens)
        shared = tokens[: _shared_length(tokens, others)]
        if shared:
            return shared[-1], shared.count(shared[-1])
    raise _not_located(template, "it writes no special token at the end of turns with tool calls")


def _first_token(text: str, tokens: frozenset[str], start: int = 0) -> Span | None:
    """Where the first of `tokens` is in text[start:], the longest of those that begin there."""
    matches = [(text.find(token, start), token) for token in tokens if token and token in text[start:]]
    if not matches:
        return None
    first = min(position for position, _ in matches)
    return first, first + max(len(token) for position, token in matches if position == first)


def _tokens(text: str, tokens: frozenset[str]) -> list[str]:
    """All of `tokens` in a text, in order."""
    matches, span = [], _first_token(text, tokens)
    while span is not None:
        matches.append(text[slice(*span)])
        span = _first_token(text, tokens, span[1])
    return matches


def _shared_length(one: Sequence, other: Sequence) -> int:
    """Length of the longest common prefix of two sequences, such as texts."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _depends_on_later(rendering: _Rendering, index: int) -> InputError:
    return _not_located(rendering.template, f"the text before message {index + 1} depends on later messages")


def _not_located(template: ChatTemplate, reason: str) -> InputError:
    return InputError(f"{template.location}: cannot locate the assistant's part of the chat exactly: {reason}")
