"""Generates outputs for prompts, several tokens per forward pass.

    python -m msn_jax.generate --model=runs/demo/msn --prompt='def area(width, height):' --stream
    python -m msn_jax.generate --model=runs/demo/msn --prompts=prompts.jsonl --output=outputs.jsonl --batch_size=4

On a terminal, alternating colours show the tokens of each forward pass, so that accepted runs are visible.
A line of --prompts is {"prompt": str} or {"messages": [{"role": str, "content": str}, ...]}, messages and "tools" in
the form of OpenAI's API, as far as the model's chat template shows them. It may have its own settings:
"max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "parse_special_tokens". Null counts as
absent. A line of --output has the prompt, the generated text and how it was decoded, in the order of the input.
Finished outputs are collected in OUTPUT.partial; an interrupted run continues from there with the same command.
"""

import dataclasses
import sys

from absl import flags

from msn_jax import cli, config, outputs, request_files
from msn_jax.cli import InputError
from msn_jax.config import MeshConfig
from msn_jax.decode import display, engine, models, tree
from msn_jax.decode.engine import Decoder
from msn_jax.decode.models import Model
from msn_jax.decode.request import SETTING_NAMES, Request


def show(decoder: Decoder, requests: dict[str, Request], batch_size: int) -> None:
    """Prints the outputs: coloured on a terminal, as plain text for a single --prompt, else as JSON lines."""
    generations = engine.generate_iter(decoder, list(requests.values()), Request(""), batch_size, list(requests))
    for generation in outputs.in_order(generations):
        if sys.stdout.isatty():
            display.show(decoder.model.tokenizer, generation)
        else:
            is_flag = list(requests) == ["--prompt"]
            print(generation.text if is_flag else outputs.to_json_line(generation), flush=True)


def show_streams(decoder: Decoder, requests: dict[str, Request]) -> None:
    """Prints every output while it is decoded."""
    encoded = [engine.encode(decoder, request, location) for location, request in requests.items()]
    for ids, request in zip(encoded, requests.values(), strict=True):
        display.show_stream(request.prompt, (chunk for chunk, _ in decoder.stream(ids, request)))


def main() -> None:
    """Reads the flags and generates."""
    args = flags.FLAGS
    if (args.prompt is None) == (args.prompts is None):
        raise InputError("give either --prompt=TEXT or --prompts=FILE.jsonl")
    if args.stream and args.output is not None:
        raise InputError("--stream prints the outputs and --output stores them; give one of the two")
    settings = Request("", **{name: getattr(args, name) for name in SETTING_NAMES})
    settings.check("--")
    requests = {"--prompt": dataclasses.replace(settings, prompt=args.prompt)}
    if args.prompts is not None:
        requests = request_files.read(args.prompts, settings)
    if args.output is not None:
        outputs.check_output(args.output, keep=[path for path in (args.prompts, args.tree) if path is not None])
    token_tree = None if args.tree is None else tree.load(args.tree)
    mesh = None if args.data == args.tensor == 1 else MeshConfig(data=args.data, fsdp=1, tensor=args.tensor)

    def compile_first(outline: Model) -> None:
        if args.decoder != "draft_model" and args.output is None:  # a file may have its first outputs already
            decoder = Decoder(outline, args.decoder, token_tree)
            decoder.check_batch(args.batch_size)
            engine.compile_first(decoder, requests, 1 if args.stream else args.batch_size)

    model = models.load(args.model, args.dtype, mesh, args.adapter, compile_first)
    draft = None if args.draft is None else models.load(args.draft, args.dtype)
    decoder = Decoder(model, args.decoder, token_tree, draft)
    decoder.check_batch(args.batch_size)
    if args.stream:
        show_streams(decoder, requests)
    elif args.output is None:
        show(decoder, requests, args.batch_size)
    else:
        outputs.write_generations(decoder, requests, args.batch_size, args.output)


if __name__ == "__main__":
    flags.DEFINE_string(
        "model", None, "A training workdir, a Hugging Face directory, FILE.gguf, or OWNER/NAME.", required=True
    )
    flags.DEFINE_string("adapter", None, "A directory with a LoRA adapter in PEFT's form: a gated one drafts.")
    flags.DEFINE_enum("dtype", None, config.DTYPES, "Of parameters and computation; default: the model's own.")
    flags.DEFINE_string("prompt", None, "One prompt, raw text.")
    flags.DEFINE_string("prompts", None, "A JSONL file of prompts.")
    flags.DEFINE_string("output", None, "A JSONL file for the outputs, replaced; default: standard output.")
    flags.DEFINE_bool("stream", False, "Print each output while it is decoded.")
    flags.DEFINE_enum("decoder", "auto", engine.DECODERS, "Which drafter proposes the tokens to verify.")
    flags.DEFINE_string("tree", None, "A JSON file with a token tree; default: the model's calibrated tree, if any.")
    flags.DEFINE_string("draft", None, "The small model of --decoder=draft_model, with the same vocabulary.")
    flags.DEFINE_integer("max_new_tokens", 256, "Limit of each output, in tokens.")
    flags.DEFINE_float("temperature", 0.0, "0 is greedy; above 0, tokens are sampled.")
    flags.DEFINE_integer("top_k", 0, "Sample from the k most probable tokens; 0 keeps all.")
    flags.DEFINE_float("top_p", 1.0, "Sample from the most probable tokens with this total probability.")
    flags.DEFINE_float("min_p", 0.0, "Sample from tokens with at least this share of the highest probability.")
    flags.DEFINE_integer("seed", 0, "Seed of the samples.")
    flags.DEFINE_multi_string("stop", [], "A string that ends an output and is not part of it; may be repeated.")
    flags.DEFINE_bool(
        "parse_special_tokens", False, "Read special tokens that messages spell as those tokens, not as text."
    )
    flags.DEFINE_integer("batch_size", 1, "Prompts decoded together.")
    flags.DEFINE_integer("data", 1, "Devices over which the rows of a batch are sharded.")
    flags.DEFINE_integer("tensor", 1, "Devices over which the weights are sharded.")
    cli.run(main)
