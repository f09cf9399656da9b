"""Output files: JSON lines in the order of the prompts, written incrementally, none lost and none twice.

Batches finish in their own order. Every finished generation is appended to OUTPUT.partial immediately; after the last
one, all of them are written to OUTPUT in the order of the prompts, with one atomic rename. A restarted run does not
decode again what an interrupted run left in OUTPUT.partial.
"""

import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from rich.progress import Progress

from msn_jax import param_checks
from msn_jax.cli import InputError
from msn_jax.decode import engine
from msn_jax.decode.engine import Decoder, Generation
from msn_jax.decode.request import Request

Item = TypeVar("Item")

_SECONDS_BETWEEN_LINES = 30.0  # of progress, where there is no terminal for a bar


def to_json_line(generation: Generation) -> str:
    """A line of --output, without the newline."""
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
            "passes_by_width": generation.passes_by_width,
            "wall_time": generation.wall_time,
            "decoder": generation.decoder,
            "finish_reason": generation.finish_reason,
        }
    )


def check_output(path: str, keep: Iterable[str] = ()) -> None:
    """InputError if no file can be written to `path`, or if writing would replace one of `keep`. Writes nothing."""
    directory, files = Path(path).parent, [Path(path), _partial(path), _complete(path)]
    try:
        if not directory.is_dir():
            raise InputError(f"--output={path}: {directory} is not a directory")
        for file in files:
            if file.is_dir():
                raise InputError(f"--output={path}: {file} is a directory; name a file")
            if file.exists() and any(file.samefile(kept) for kept in keep if Path(kept).exists()):
                raise InputError(f"--output={path}: would replace the input {file}; name another file")
            if not os.access(file if file.exists() else directory, os.W_OK) or not os.access(directory, os.W_OK):
                raise InputError(f"--output={path}: cannot write {file}: permission denied")
    except OSError as error:
        raise InputError(f"--output={path}: cannot be written: {error.strerror}") from error


def write_generations(
    decoder: Decoder,
    requests: dict[str, Request],
    batch_size: int,
    path: str,
    to_line: Callable[[str], str | None] = str,
) -> None:
    """Generates the outputs of all requests and writes them to a file.

    Args:
      decoder: model and drafter.
      requests: the requests by their location, for error messages.
      batch_size: prompts decoded together.
      path: the file, replaced after the last generation.
      to_line: the line of OUTPUT for a generation's line (`to_json_line`), by default the same; None leaves it out.

    Raises:
      InputError: OUTPUT.partial belongs to a different run or was edited.
    """
    partial, header = _partial(path), json.dumps({"provenance": provenance(decoder, requests.values())})
    lines = _completed_lines(partial, header, len(requests))
    generations = engine.generate_iter(
        decoder, list(requests.values()), Request(""), batch_size, list(requests), skip=frozenset(lines)
    )
    if lines:
        print(f"{partial}: resuming after {len(lines)} of {len(requests)} generations", flush=True)
    else:
        partial.write_text(header + "\n", encoding="utf-8")
    for generation in with_progress(generations, len(lines), len(requests)):
        lines[generation.index] = to_json_line(generation)
        with partial.open("a", encoding="utf-8") as file:
            file.write(lines[generation.index] + "\n")
    complete = _complete(path)
    ordered = (to_line(lines[index]) for index in sorted(lines))
    complete.write_text("".join(line + "\n" for line in ordered if line is not None), encoding="utf-8")
    complete.replace(path)
    partial.unlink()


def replace_text(path: Path, text: str) -> None:
    """Writes a text file atomically: an interruption leaves the file that was there, if any."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def in_order(generations: Iterable[Generation]) -> Iterator[Generation]:
    """Yields generations in the order of their index, each as soon as all earlier ones have arrived."""
    waiting: dict[int, Generation] = {}
    following = 0
    for generation in generations:
        waiting[generation.index] = generation
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def provenance(decoder: Decoder, requests: Iterable[Request]) -> dict:
    """Identifies weights, decoder, tree and requests, so that a run resumes only its own partial file."""
    described = json.dumps([dataclasses.asdict(request) for request in requests], sort_keys=True)
    return {**identity(decoder), "requests": hashlib.sha256(described.encode()).hexdigest()}


def identity(decoder: Decoder) -> dict:
    """Identifies weights, decoder and tree."""
    weights = [decoder.model.params, decoder.drafter_params]
    return {
        "decoder": decoder.name,
        "dtype": decoder.model.cfg.dtype,
        "weights": [None if params is None else param_checks.fingerprint(params) for params in weights],
        "tree": hashlib.sha256(repr(decoder.drafter.tree).encode()).hexdigest(),
    }


def _partial(path: str) -> Path:
    return Path(f"{path}.partial")


def _complete(path: str) -> Path:
    return Path(f"{path}.complete")


def _completed_lines(partial: Path, header: str, count: int) -> dict[int, str]:
    """The complete lines that an interrupted run of `count` prompts left, by prompt index.

    An incomplete last line, which was being written when the run was killed, is removed from the file.
    """
    if not partial.exists():
        return {}
    content = partial.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    first, *lines = complete.decode("utf-8", errors="replace").split("\n")[:-1] or [""]
    if first and first != header:
        raise InputError(
            f"{partial}: left by an interrupted run with other prompts, settings or another model; finish that run, "
            "delete the file, or choose another --output"
        )
    by_index = {}
    for number, line in enumerate(lines, 2):
        index = _index(line)
        if index not in range(count) or index in by_index:
            raise InputError(
                f"{partial}:{number}: not a generation of the interrupted run; delete the line, or the file"
            )
        by_index[index] = line
    if len(complete) < len(content):
        with partial.open("r+b") as file:
            file.truncate(len(complete))
    return by_index


def _index(line: str) -> int | None:
    """The prompt index of a line; None if the line is not a generation."""
    try:
        index = json.loads(line)["index"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return index if type(index) is int else None


def with_progress(items: Iterable[Item], done: int, total: int, noun: str = "generations") -> Iterator[Item]:
    """Yields the items and shows how many are done: a bar on a terminal, elsewhere a line every 30 seconds.

    Args:
      items: the remaining ones; each is done when the next one is requested.
      done: how many were done before.
      total: how many there are with those.
      noun: what they are called.
    """
    if sys.stderr.isatty():
        with Progress(transient=False) as progress:
            task = progress.add_task("decoding", total=total, completed=done)
            for item in items:
                yield item
                progress.advance(task)
        return
    last_line = time.perf_counter()
    for number, item in enumerate(items, done + 1):
        yield item
        if time.perf_counter() - last_line > _SECONDS_BETWEEN_LINES:
            last_line = time.perf_counter()
            print(f"{number} of {total} {noun}", flush=True)
