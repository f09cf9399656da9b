"""Answers prompts with a trained model, several tokens per forward pass.

    python -m msn_jax.generate --model=runs/demo/msn --prompt='def area(width, height):' --decoder=tr_jacobi
    python -m msn_jax.generate --model=runs/demo/msn --prompts=prompts.jsonl --output=answers.jsonl --batch_size=4

On a terminal the tokens of each pass are coloured alternately, so that the accepted runs can be seen.
A line of --prompts is {"prompt": str} or {"messages": [{"role": str, "content": str}, ...]}; a line of --output is the
prompt with its answer and how it was decoded, in the order of the input.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from absl import flags
from rich.progress import track

from msn_jax import cli
from msn_jax.cli import InputError
from msn_jax.decode import display, engine, tree
from msn_jax.decode.engine import Generation, Prompt


def read_prompts(path: str) -> list[Prompt]:
    """The prompts of a JSONL file. InputError names the file and the line that is wrong."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts={path}: cannot read it: {error}") from error
    prompts = [_read_prompt(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise InputError(f"--prompts={path}: holds no prompt")
    return prompts


def _read_prompt(line: str, place: str) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: not JSON: {error}") from error
    prompt = record.get("prompt", record.get("messages")) if isinstance(record, dict) else None
    is_chat = isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)
    if not is_chat and not isinstance(prompt, str):
        raise InputError(f'{place}: needs {{"prompt": text}} or {{"messages": [{{"role", "content"}}, ...]}}')
    return prompt


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


def write(generations: Iterable[Generation], path: str) -> None:
    """Appends each answer to the file as soon as it is there."""
    with Path(path).open("w") as file:
        for generation in generations:
            file.write(output_line(generation) + "\n")
            file.flush()


def main() -> None:
    """Reads the flags and answers."""
    args = flags.FLAGS
    if (args.prompt is None) == (args.prompts is None):
        raise InputError("give either --prompt=TEXT or --prompts=FILE.jsonl")
    prompts = [args.prompt] if args.prompts is None else read_prompts(args.prompts)
    token_tree = None if args.tree is None else tree.load(args.tree)
    model = engine.load(args.model)
    generations = engine.generate_iter(
        model, prompts, args.decoder, args.max_new_tokens, args.temperature, args.seed, args.batch_size, token_tree
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
    flags.DEFINE_string("model", None, "A training workdir.", required=True)
    flags.DEFINE_string("prompt", None, "One prompt, raw text.")
    flags.DEFINE_string("prompts", None, "A JSONL file of prompts.")
    flags.DEFINE_string("output", None, "A JSONL file for the answers; standard output otherwise.")
    flags.DEFINE_string("decoder", "tr_jacobi", "autoregressive, jacobi, prompt_lookup or tr_jacobi.")
    flags.DEFINE_string("tree", None, "A JSON file with a token tree, instead of the decoder's own.")
    flags.DEFINE_integer("max_new_tokens", 256, "Limit of each answer, in tokens.")
    flags.DEFINE_float("temperature", 0.0, "0: the best token; above: samples.")
    flags.DEFINE_integer("seed", 0, "Of the samples.")
    flags.DEFINE_integer("batch_size", 1, "Prompts decoded at once.")
    cli.run(main)
