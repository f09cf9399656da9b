"""Chat templates: the Jinja programs of Hugging Face tokenizers that turn messages into text.

Rendering follows `apply_chat_template` of transformers: the same sandbox, options, filters and globals, so the same
text (`template_sandbox.py`). `response_spans.py` finds the assistant's part of it.
"""

import dataclasses
import datetime

from msn_jax.cli import InputError
from msn_jax.data.template_sandbox import compile_template

Span = tuple[int, int]  # characters of a text: from, to (excluded)

_FIRST_PRIVATE = 0xE000  # Unicode's private use area: characters that no text needs


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A template and its variables other than messages and tools."""

    source: str
    location: str  # its file, for error messages
    special_tokens: tuple[tuple[str, str], ...]  # such as ('bos_token', '<s>')

    @property
    def has_generation_blocks(self) -> bool:
        """Whether it marks the assistant's part with `{% generation %}`."""
        environment, _ = compile_template(self.source, self.location)
        return environment.has_generation_blocks

    def render(
        self,
        messages: list[dict],
        add_generation_prompt: bool,
        tools: list[dict] | None = None,
        now: datetime.datetime | None = None,
        markers: tuple[str, str] = ("", ""),
    ) -> str:
        """The text of a conversation, as `apply_chat_template(messages, tools, tokenize=False)` gives it.

        Args:
          messages: as `messages.normalize` returns them.
          add_generation_prompt: whether to append the header that opens the assistant's turn.
          tools: JSON schemas of functions, or None.
          now: the time for templates that print the date; None for the current time.
          markers: printed around the output of `{% generation %}` blocks.

        Raises:
          InputError: the template is broken, unbounded, or refuses these messages.
        """
        environment, template = compile_template(self.source, self.location)
        variables = {
            **dict(self.special_tokens),
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "tools": tools or None,
            "documents": None,
            "strftime_now": (now or datetime.datetime.now()).strftime,
        }
        environment.begin(markers)
        parts, length = [], 0
        try:
            for part in template.generate(variables):
                length = environment.check_length(length + len(part))
                parts.append(part)
        except Exception as error:  # a stranger's program may raise anything
            reason = str(error) or type(error).__name__
            raise InputError(f"{self.location}: the chat template refuses these messages: {reason}") from error
        return "".join(parts)


def unused_characters(text: str, count: int) -> list[str]:
    """`count` private-use characters that are not in `text`."""
    unused, used, code = [], set(text), _FIRST_PRIVATE
    while len(unused) < count:
        if chr(code) not in used:
            unused.append(chr(code))
        code += 1
    return unused
