"""Generations on a terminal, with the tokens of each forward pass in alternating colours."""

import io
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME
from rich.text import Text

from msn_jax.data.tokenizer import Tokenizer
from msn_jax.decode.engine import Generation, StreamChunk
from msn_jax.decode.request import Prompt

COLOURS = ("bold cyan", "bold yellow")  # of the tokens of alternating forward passes


def coloured(tokenizer: Tokenizer, generation: Generation) -> Text:
    """The generated text with the tokens of each forward pass in alternating colours."""
    text = Text()
    for number, emitted in enumerate(passes(tokenizer, generation)):
        text.append(emitted, style=COLOURS[number % 2])
    return text


def passes(tokenizer: Tokenizer, generation: Generation) -> list[str]:
    """The part of the generated text that each forward pass emitted; together they are the text.

    A character whose bytes came from several passes belongs to the pass that completed it.
    """
    emitted, shown, end = [], 0, 0
    for accept_length in generation.accept_lengths:
        end += accept_length
        decoded = tokenizer.decode(generation.tokens[:end], start=not isinstance(generation.prompt, str))
        if end < len(generation.tokens):
            decoded = decoded.rstrip("\ufffd")  # maybe the first bytes of a character
        decoded = decoded[: len(generation.text)]  # the text ends before a stop string
        emitted.append(decoded[shown:])
        shown = len(decoded)
    return emitted


def summary(generation: Generation) -> str:
    """One line of statistics."""
    return (
        f"{generation.new_tokens} tokens in {generation.forward_passes} forward passes "
        f"(mean accepted tokens {generation.mean_accepted_tokens:.2f}), "
        f"{generation.new_tokens / generation.wall_time:.0f} tokens/s including prefill and compilation, "
        f"{generation.decoder}, {generation.finish_reason}"
    )


def show_stream(prompt: Prompt, chunks: Iterable[StreamChunk]) -> None:
    """Prints an output while it is decoded; on a terminal after its prompt, in one colour per chunk."""
    console = Console(highlight=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        for chunk in chunks:
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
        print(flush=True)
        return
    if isinstance(prompt, str):
        console.print(prompt, end="", markup=False)
    for number, chunk in enumerate(chunks):
        console.print(Text(chunk.text, style=COLOURS[number % 2]), end="")
        if chunk.generation is not None:
            print(f"\n{summary(chunk.generation)}", file=sys.stderr)


def show(tokenizer: Tokenizer, generation: Generation) -> None:
    """Prints prompt, coloured output and statistics."""
    console = Console(highlight=False, emoji=False, soft_wrap=True)
    if isinstance(generation.prompt, str):
        console.print(generation.prompt, end="", markup=False)
    console.print(coloured(tokenizer, generation))
    print(summary(generation), file=sys.stderr)


def save_svg(tokenizer: Tokenizer, generation: Generation, path: Path) -> None:
    """Writes prompt, coloured output and statistics as an SVG picture of a terminal."""
    console = Console(record=True, file=io.StringIO(), width=100, highlight=False, emoji=False, force_terminal=True)
    if isinstance(generation.prompt, str):
        console.print(generation.prompt, end="", markup=False)
    console.print(coloured(tokenizer, generation))
    title = (
        f"{generation.new_tokens} tokens in {generation.forward_passes} forward passes; "
        "each colour change is a forward pass"
    )
    svg = console.export_svg(title=title, theme=SVG_EXPORT_THEME)
    path.write_text(re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL), encoding="utf-8")  # no remote fonts
