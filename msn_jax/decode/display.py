"""Answers for a person to look at: what each forward pass gave, in alternating colours."""

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from msn_jax.data.tokenizer import Tokenizer
from msn_jax.decode.engine import Generation, Piece
from msn_jax.decode.requests import Prompt

_RUN_COLOURS = ("bold cyan", "bold yellow")


def coloured(tokenizer: Tokenizer, generation: Generation) -> Text:
    """The answer with the tokens of each forward pass in alternating colours.

    A character whose bytes came in several passes has the colour of the one that completed it.
    """
    text, shown, end = Text(), 0, 0
    for number, accept_length in enumerate(generation.accept_lengths):
        end += accept_length
        decoded = tokenizer.decode(generation.tokens[:end], start=not isinstance(generation.prompt, str))
        if end < len(generation.tokens):
            decoded = decoded.rstrip("\ufffd")  # perhaps the first bytes of a character
        decoded = decoded[: len(generation.text)]  # which ends before a stop string
        text.append(decoded[shown:], style=_RUN_COLOURS[number % 2])
        shown = len(decoded)
    return text


def summary(generation: Generation) -> str:
    """One line of figures."""
    return (
        f"{generation.new_tokens} tokens in {generation.forward_passes} forward passes "
        f"({generation.mean_accepted_tokens:.2f} a pass), {generation.new_tokens / generation.wall_time:.0f} tokens/s "
        f"with prefill and any compilation, {generation.decoder}, {generation.finish_reason}"
    )


def show_stream(prompt: Prompt, pieces: Iterable[Piece]) -> None:
    """Prints an answer as it comes: on a terminal behind its prompt, a colour for each pass."""
    console = Console(highlight=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        for piece in pieces:
            sys.stdout.write(piece.text)
            sys.stdout.flush()
        print(flush=True)
        return
    if isinstance(prompt, str):
        console.print(prompt, end="", markup=False)
    for number, piece in enumerate(pieces):
        console.print(Text(piece.text, style=_RUN_COLOURS[number % 2]), end="")
        if piece.generation is not None:
            print(f"\n{summary(piece.generation)}", file=sys.stderr)


def show(tokenizer: Tokenizer, generation: Generation) -> None:
    """Prints prompt and answer for a person."""
    console = Console(highlight=False, emoji=False, soft_wrap=True)
    if isinstance(generation.prompt, str):
        console.print(generation.prompt, end="", markup=False)
    console.print(coloured(tokenizer, generation))
    print(summary(generation), file=sys.stderr)
