"""Answers in files: JSON lines in the order of the prompts, appended as they are finished, never lost and never twice.

Batches finish in an order of their own. Every finished answer is therefore appended to OUTPUT.partial at once; when
the last one is there, all of them go into OUTPUT in the order of the prompts, in one rename. What an interrupted run
left in OUTPUT.partial is not decoded again.
"""

import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.progress import Progress

from msn_jax import checkpoint
from msn_jax.cli import InputError
from msn_jax.decode import engine
from msn_jax.decode.engine import Decoder, Generation
from msn_jax.decode.requests import Request

_SECONDS_BETWEEN_LINES = 30.0  # of progress, where there is no terminal for a bar


def line(generation: Generation) -> str:
    """A line of --output, without its end."""
    form = "prompt" if isinstance(generation.prompt, str) else "messages"
    return json.dumps(
        {
            "index": generation.index,
            form: generation.prompt,
            "text": generation.text,
            "tokens": generation.tokens,
            "new_tokens": generation.new_tokens,
            "forward_passes": generation.forward_passes,
            "accept_lengths": generation.accept_lengths,
            "wall_time": generation.wall_time,
            "decoder": generation.decoder,
            "finish_reason": generation.finish_reason,
        }
    )


def check_output(path: str, keep: Iterable[str] = ()) -> None:
    """InputError if no file can be written there, or if it is one of those to `keep`. Nothing is touched."""
    folder, written = Path(path).parent, [Path(path), _partial(path), _whole(path)]
    try:
        if not folder.is_dir():
            raise InputError(f"--output={path}: no such folder: {folder}")
        for file in written:
            if file.is_dir():
                raise InputError(f"--output={path}: {file} is a folder: name a file")
            if file.exists() and any(file.samefile(kept) for kept in keep if Path(kept).exists()):
                raise InputError(f"--output={path}: would replace {file}, which is read: name another file")
            if not os.access(file if file.exists() else folder, os.W_OK) or not os.access(folder, os.W_OK):
                raise InputError(f"--output={path}: {file} cannot be written: permission denied")
    except OSError as error:
        raise InputError(f"--output={path}: cannot be written: {error.strerror}") from error


def write(answerer: Decoder, asked: dict[str, Request], batch_size: int, path: str) -> None:
    """Answers all requests into a file.

    Args:
      answerer: model and drafter.
      asked: the requests by their place.
      batch_size: prompts decoded at once.
      path: the file; what it held before is replaced when the last answer is there.

    Raises:
      InputError: an interrupted run of something else left its answers there, or somebody changed them.
    """
    partial, header = _partial(path), json.dumps({"made_by": made_by(answerer, asked.values())})
    lines = _finished(partial, header, len(asked))
    generations = engine.generate_iter(
        answerer, list(asked.values()), Request(""), batch_size, list(asked), skip=frozenset(lines)
    )
    if lines:
        print(f"{partial}: going on behind {len(lines)} of {len(asked)} answers", flush=True)
    else:
        partial.write_text(header + "\n", encoding="utf-8")
    for generation in _with_progress(generations, len(lines), len(asked)):
        lines[generation.index] = line(generation)
        with partial.open("a", encoding="utf-8") as file:
            file.write(lines[generation.index] + "\n")
    whole = _whole(path)
    whole.write_text("".join(lines[index] + "\n" for index in sorted(lines)), encoding="utf-8")
    whole.replace(path)
    partial.unlink()


def in_order(generations: Iterable[Generation]) -> Iterator[Generation]:
    """Generations by their index, each as soon as all before it are there."""
    waiting: dict[int, Generation] = {}
    following = 0
    for generation in generations:
        waiting[generation.index] = generation
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def made_by(answerer: Decoder, asked: Iterable[Request]) -> dict:
    """What the answers of an interrupted run must have been made with to count: weights, decoder, tree and requests."""
    requests = json.dumps([dataclasses.asdict(request) for request in asked], sort_keys=True)
    weights = [answerer.model.params, answerer.weights]
    return {
        "decoder": answerer.name,
        "dtype": answerer.model.cfg.dtype,
        "weights": [None if params is None else checkpoint.fingerprint(params) for params in weights],
        "tree": hashlib.sha256(repr(answerer.drafter.tree).encode()).hexdigest(),
        "requests": hashlib.sha256(requests.encode()).hexdigest(),
    }


def _partial(path: str) -> Path:
    return Path(f"{path}.partial")


def _whole(path: str) -> Path:
    return Path(f"{path}.whole")


def _finished(partial: Path, header: str, count: int) -> dict[int, str]:
    """The complete lines that an interrupted run left, by the index of their prompt, one of `count`. Half a line at the
    end, which it was writing when it was killed, is cut off.
    """
    if not partial.exists():
        return {}
    content = partial.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    first, *lines = whole.decode("utf-8", errors="replace").split("\n")[:-1] or [""]
    if first and first != header:
        raise InputError(
            f"{partial}: left by an interrupted run with other prompts, settings or another model: finish that one, "
            "delete the file, or choose another --output"
        )
    found = {}
    for number, text in enumerate(lines, 2):
        index = _index(text)
        if index not in range(count) or index in found:
            raise InputError(f"{partial}:{number}: not an answer of the interrupted run: delete the line, or the file")
        found[index] = text
    if len(whole) < len(content):
        with partial.open("r+b") as file:
            file.truncate(len(whole))
    return found


def _index(text: str) -> int | None:
    """Of the prompt that a line answers; None if it is no answer."""
    try:
        index = json.loads(text)["index"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return index if type(index) is int else None


def _with_progress(generations: Iterable[Generation], done: int, total: int) -> Iterator[Generation]:
    if sys.stderr.isatty():
        with Progress(transient=False) as progress:
            task = progress.add_task("decoding", total=total, completed=done)
            for generation in generations:
                yield generation
                progress.advance(task)
        return
    shown = time.perf_counter()
    for number, generation in enumerate(generations, done + 1):
        yield generation
        if time.perf_counter() - shown > _SECONDS_BETWEEN_LINES:
            shown = time.perf_counter()
            print(f"{number} of {total} answers", flush=True)
