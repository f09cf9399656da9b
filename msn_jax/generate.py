"""Answers prompts with a trained model, several tokens per forward pass.

    python -m msn_jax.generate --model=runs/demo/msn --prompt='def area(width, height):' --decoder=tr_jacobi
    python -m msn_jax.generate --model=runs/demo/msn --prompts=prompts.jsonl --output=answers.jsonl --batch_size=4

On a terminal the tokens of each pass are coloured alternately, so that the accepted runs can be seen.
A line of --prompts is {"prompt": str} or {"messages": [{"role": str, "content": str}, ...]}; a line of --output is the
prompt with its answer and how it was decoded, in the order of the input.
"""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from absl import flags
from rich.progress import track

from msn_jax import cli, config
from msn_jax.cli import InputError
from msn_jax.decode import display, drafters, engine, tree
from msn_jax.decode.engine import Generation, Prompt


def read_prompts(path: str) -> dict[str, Prompt]:
    """The prompts of a JSONL file by their place, FILE:LINE. InputError names the place that is wrong."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")  # str.splitlines would also cut inside texts
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts={path}: cannot read it: {error}") from error
    places = {f"{path}:{number}": line for number, line in enumerate(lines, 1) if line.strip()}
    prompts = {place: _read_prompt(line, place) for place, line in places.items()}
    if not prompts:
        raise InputError(f"--prompts={path}: holds no prompt")
    return prompts


def _read_prompt(line: str, place: str) -> Prompt:
    try:
        record = json.loads(line)
    except (RecursionError, ValueError) as error:  # also nested too deeply, or a number of thousands of digits
        raise InputError(f"{place}: not JSON: {error}") from error
    forms = [form for form in ("prompt", "messages") if isinstance(record, dict) and form in record]
    if forms == ["prompt"] and isinstance(record["prompt"], str):
        return record["prompt"]
    if forms == ["messages"] and isinstance(record["messages"], list):
        return record["messages"]
    raise InputError(f'{place}: needs either {{"prompt": text}} or {{"messages": [{{"role", "content"}}, ...]}}')


def output_line(generation: Generation) -> str:
    """A line of --output."""
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


def check_output(path: str) -> None:
    """InputError if no file can be written there. Nothing is touched."""
    folder = Path(path).parent
    if not folder.is_dir():
        raise InputError(f"--output={path}: no such folder: {folder}")
    if Path(path).is_dir():
        raise InputError(f"--output={path}: is a folder: name a file")
    if not os.access(path if Path(path).exists() else folder, os.W_OK):
        raise InputError(f"--output={path}: cannot be written: permission denied")


def write(generations: Iterable[Generation], path: str) -> None:
    """Writes each answer as soon as it is there. What the file held before is replaced when the first one is."""
    mode = "w"
    for generation in generations:
        with Path(path).open(mode, encoding="utf-8") as file:
            file.write(output_line(generation) + "\n")
        mode = "a"


def main() -> None:
    """Reads the flags and answers."""
    args = flags.FLAGS
    if (args.prompt is None) == (args.prompts is None):
        raise InputError("give either --prompt=TEXT or --prompts=FILE.jsonl")
    prompts = {"--prompt": args.prompt} if args.prompts is None else read_prompts(args.prompts)
    if args.output is not None:
        check_output(args.output)
    token_tree = None if args.tree is None else tree.load(args.tree)
    model = engine.load(args.model, args.dtype)
    generations = engine.generate_iter(
        model,
        list(prompts.values()),
        args.decoder,
        args.max_new_tokens,
        args.temperature,
        args.seed,
        args.batch_size,
        token_tree,
        places=list(prompts),
    )
    if args.output is not None:
        progress = track(generations, "decoding", total=len(prompts), disable=not sys.stderr.isatty())
        write(progress, args.output)
        return
    for generation in generations:
        if sys.stdout.isatty():
            display.show(model.tokenizer, generation)
        else:
            print(output_line(generation) if args.prompts else generation.text, flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "A training workdir, a Hugging Face directory, or OWNER/NAME.", required=True)
    flags.DEFINE_enum("dtype", None, config.DTYPES, "Of parameters and computation; the model's own if not given.")
    flags.DEFINE_string("prompt", None, "One prompt, raw text.")
    flags.DEFINE_string("prompts", None, "A JSONL file of prompts.")
    flags.DEFINE_string("output", None, "A JSONL file for the answers, replaced; standard output otherwise.")
    flags.DEFINE_enum("decoder", "tr_jacobi", list(drafters.DEFAULT_TREES), "Who guesses the next tokens.")
    flags.DEFINE_string("tree", None, "A JSON file with a token tree, instead of the decoder's own.")
    flags.DEFINE_integer("max_new_tokens", 256, "Limit of each answer, in tokens.")
    flags.DEFINE_float("temperature", 0.0, "0: the best token; above: samples.")
    flags.DEFINE_integer("seed", 0, "Of the samples.")
    flags.DEFINE_integer("batch_size", 1, "Prompts decoded at once.")
    cli.run(main)
