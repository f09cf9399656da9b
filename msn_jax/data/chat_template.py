"""Chat templates: the Jinja programs of Hugging Face tokenizers, and which part of their text the assistant says.

Rendering follows `apply_chat_template` of transformers: the same sandbox, options, filters and globals, so the same
text. A template is a program of others. It sees no more than its messages and special tokens, and what it may do is
bounded: loop turns and macro calls (`_MAX_TURNS`), and the length of its output and of every string it joins, adds or
multiplies (`_MAX_LENGTH`); beyond that, as with any error of its own, it is refused. (Not bounded: one filter or method
that makes a huge string by itself, such as `center`.)

The assistant's part, exactly:

 1. Where the template marks it with `{% generation %}`, what is marked.
 2. Else by construction. A turn begins where the generation prompt ends, for that is what the model sees when its turn
    comes; it ends with its end token, the first special token behind its content. Contents are found by rendering the
    conversation twice, once with a character behind every answer that occurs nowhere else; what the two texts share
    must be the whole text. So a template may strip, shorten or drop contents, or set a system prompt by itself. What
    it says around an answer is learnt from a small conversation, and must recur at each turn.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n Hello <|im_end|> \\n
                                                            `-- content   `-- end token, the last that counts
"""

import dataclasses
import datetime
import functools
import json
import re

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from msn_jax.cli import InputError

Span = tuple[int, int]  # characters of a text: from, to (excluded)

_MAX_TURNS = 1_000_000  # of all loops and macros of one rendering; ten of them a second or so
_MAX_LENGTH = 1 << 25  # characters
_FIRST_PRIVATE = 0xE000  # Unicode's private use area: characters that no text needs


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template and what it is given besides messages."""

    source: str
    place: str  # where it stands, for messages
    special_tokens: tuple[tuple[str, str], ...]  # such as ('bos_token', '<s>')

    def render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        """The text of a conversation, as `apply_chat_template(messages, tokenize=False)` gives it.

        Args:
          messages: {'role', 'content'} each.
          add_generation_prompt: whether what opens the assistant's turn comes at the end.

        Raises:
          InputError: the template is broken, unbounded, or refuses these messages.
        """
        return self._render(messages, add_generation_prompt, datetime.datetime.now())

    def render_with_spans(self, messages: list[dict], end_tokens: frozenset[str]) -> tuple[str, list[Span]]:
        """The text of a conversation, and where in it the assistant speaks, each time its end token included.

        Args:
          messages: {'role', 'content'} each.
          end_tokens: the texts of all special tokens, one of which ends a turn. Templates with `{% generation %}`
            say themselves what ends it.

        Raises:
          InputError: as `render`; or the spans cannot be found exactly.
        """
        now = datetime.datetime.now()
        text = self._render(messages, False, now)
        environment, _ = _compile(self.source, self.place)
        if environment.has_generation_blocks:
            return text, self._marked_spans(messages, text, now)
        return text, self._constructed_spans(messages, text, end_tokens, now)

    def _render(
        self,
        messages: list[dict],
        add_generation_prompt: bool,
        now: datetime.datetime,
        markers: tuple[str, str] = ("", ""),
    ) -> str:
        environment, template = _compile(self.source, self.place)
        variables = {
            **dict(self.special_tokens),
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
            "strftime_now": now.strftime,
        }
        environment.begin(markers)
        parts, length = [], 0
        try:
            for part in template.generate(variables):
                length = environment.check_length(length + len(part))
                parts.append(part)
        except Exception as error:  # a program of others may raise anything
            said = str(error) or type(error).__name__
            raise InputError(f"{self.place}: the chat template refuses these messages: {said}") from error
        return "".join(parts)

    def _marked_spans(self, messages: list[dict], text: str, now: datetime.datetime) -> list[Span]:
        opening, closing = _unused_characters(text, 2)
        marked = self._render(messages, False, now, (opening, closing))
        if marked.replace(opening, "").replace(closing, "") != text:
            raise self._not_found("it does more with its {% generation %} blocks than to print them")
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
        if not spans:
            raise self._not_found("its {% generation %} blocks mark nothing in this conversation")
        return spans

    def _constructed_spans(
        self, messages: list[dict], text: str, end_tokens: frozenset[str], now: datetime.datetime
    ) -> list[Span]:
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        opening, surplus, end = _frame(self, end_tokens)
        spans, done = [], 0
        for index, content_end in zip(answers, self._content_ends(messages, text, answers, end, now), strict=True):
            prompt = self._render(messages[:index], True, now)
            if not text.startswith(prompt) and surplus and prompt.endswith(surplus):
                prompt = prompt.removesuffix(surplus)
            start = len(prompt + opening)
            if not text.startswith(prompt + opening) or not done <= start <= content_end:
                raise self._not_found(f"what stands before message {index + 1} depends on what comes behind it")
            done = content_end + len(end)
            spans.append((start, done))
        return spans

    def _content_ends(
        self, messages: list[dict], text: str, answers: list[int], end: str, now: datetime.datetime
    ) -> list[int]:
        """Where in `text` the content of each answer ends and `end` follows."""
        (mark,) = _unused_characters(text + "".join(message["content"] for message in messages), 1)
        marked = [
            {**message, "content": message["content"] + mark * (i in answers)} for i, message in enumerate(messages)
        ]
        pieces = self._render(marked, False, now).split(mark)
        if len(pieces) != len(answers) + 1:
            raise self._not_found("it drops or repeats an answer")
        ends, position = [], 0  # in text
        for index, piece in zip(answers, pieces[:-1], strict=True):
            shared = _shared_length(piece, text[position : position + len(piece)])
            if piece[shared:].strip():  # white space before the mark was the content's end, and is stripped there
                raise self._not_found("it changes an answer with what stands at its end")
            # What follows the content may begin with the white space that was stripped off it.
            first, position = position, position + shared
            while not text.startswith(end, position) and position > first and text[position - 1].isspace():
                position -= 1
            if not text.startswith(end, position):
                raise self._not_found(f"message {index + 1} does not end as an assistant's turn usually does, {end!r}")
            ends.append(position)
        if pieces[-1] != text[position:]:
            raise self._not_found("it changes with what stands at the end of an answer")
        return ends

    def _not_found(self, reason: str) -> InputError:
        return InputError(f"{self.place}: cannot tell which part of the chat is the assistant's: {reason}")


@functools.lru_cache(maxsize=64)
def _frame(template: ChatTemplate, end_tokens: frozenset[str]) -> tuple[str, str, str]:
    """What a template writes around an answer: (opening, surplus, end).

    opening: the header between the generation prompt and the content, for templates that know no generation prompt;
      '' for others, whatever they write there, because the model is to write it.
    surplus: the end of the generation prompt that a finished turn does not have, such as '<think>\\n'; mostly ''.
    end: from the end of the content to the end of the end token.
    """
    question, now = [{"role": "user", "content": "a"}], datetime.datetime.now()
    mark = chr(_FIRST_PRIVATE)
    before = template._render(question, False, now)
    prompt = template._render(question, True, now)
    whole = template._render([*question, {"role": "assistant", "content": mark}], False, now)
    header, found, tail = whole.partition(mark)
    if not found:
        raise template._not_found("it does not print the answer")
    shared = header[: _shared_length(header, prompt)]
    opening = header[len(shared) :] if prompt == before and shared == prompt else ""
    opening = opening if opening.strip() else ""  # white space alone is no header: the model is to write it
    surplus = prompt[len(shared) :]
    if surplus and header != shared:
        raise template._not_found("its generation prompt is not how a turn of the assistant begins")
    ends = [(tail.find(token) + len(token), token) for token in end_tokens if token in tail]
    if not ends:
        raise template._not_found("there is no special token at the end of the assistant's turns")
    first = min(tail.find(token) for _, token in ends)
    end = max(stop for stop, token in ends if tail.startswith(token, first))
    return opening, surplus, tail[:end]


def _shared_length(one: str, other: str) -> int:
    """How many characters two texts have in common from their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _unused_characters(text: str, count: int) -> list[str]:
    """Characters that `text` does not have."""
    found, used, code = [], set(text), _FIRST_PRIVATE
    while len(found) < count:
        if chr(code) not in used:
            found.append(chr(code))
        code += 1
    return found


class _Unbounded(jinja2.TemplateError):
    pass


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a limit to what a template does."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols])
        self.has_generation_blocks = False
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        del self.globals["lipsum"]
        self.begin(("", ""))

    def begin(self, markers: tuple[str, str]) -> None:
        """To be called before every rendering; `markers` go around what `{% generation %}` encloses."""
        self.markers = markers
        self._turns = 0

    def count_turn(self) -> None:
        self._turns += 1
        if self._turns > _MAX_TURNS:
            raise _Unbounded(f"it loops more than {_MAX_TURNS} times")

    def check_length(self, length: int) -> int:
        if length > _MAX_LENGTH:
            raise _Unbounded(f"it makes a text of more than {_MAX_LENGTH} characters")
        return length

    def join(self, *parts: object) -> str:
        texts = [str(part) for part in parts]
        self.check_length(sum(map(len, texts)))
        return "".join(texts)

    def call_binop(self, context, operator, left, right):
        sizes = [len(side) if isinstance(side, str | list | tuple) else None for side in (left, right)]
        if operator == "+" and None not in sizes:
            self.check_length(sum(sizes))
        elif operator == "*" and sizes != [None, None]:
            sized, times = (sizes[0], right) if sizes[0] is not None else (sizes[1], left)
            self.check_length(sized * times if isinstance(times, int) else 0)
        elif operator == "%" and isinstance(left, str) and re.search(r"\d{5}|\*", left):
            raise _Unbounded("it formats a text with a width beyond all need")
        elif operator in ("*", "**") and all(isinstance(side, int) for side in (left, right)):
            self.check_length(left.bit_length() * max(right, 1) if operator == "**" else left.bit_length())
        return super().call_binop(context, operator, left, right)

    def _generate(self, source: nodes.Template, name, filename, defer_init=False):
        """Jinja's hook between parser and code generator: makes loops and macros count, and `~` check its length."""
        for node in list(source.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            count = nodes.Call(nodes.EnvironmentAttribute("count_turn"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(count).set_lineno(node.lineno))
        source = _BoundedJoins().visit(source).set_environment(self)
        return super()._generate(source, name, filename, defer_init)


class _BoundedJoins(NodeTransformer):
    """Turns `a ~ b` into a call of the environment's `join`."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        join = nodes.EnvironmentAttribute("join")
        return nodes.Call(join, node.nodes, [], None, None).set_lineno(node.lineno)


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: prints what it encloses, between the environment's markers."""

    tags = frozenset(["generation"])

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        self.environment.has_generation_blocks = True
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller) -> str:
        opening, closing = self.environment.markers
        return f"{opening}{caller()}{closing}"


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON as transformers writes it; Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=64)
def _compile(source: str, place: str) -> tuple[_Environment, jinja2.Template]:
    environment = _Environment()
    try:
        return environment, environment.from_string(source)
    except (jinja2.TemplateError, RecursionError) as error:
        raise InputError(f"{place}: the chat template is broken: {error}") from error
