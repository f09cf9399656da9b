"""Answers prompts with a trained model, several tokens per forward pass.

    python -m msn_jax.generate --model=runs/demo/msn --prompt='def area(width, height):' --stream
    python -m msn_jax.generate --model=runs/demo/msn --prompts=prompts.jsonl --output=answers.jsonl --batch_size=4

On a terminal the tokens of each pass are coloured alternately, so that the accepted runs can be seen.
A line of --prompts is {"prompt": str} or {"messages": [{"role": str, "content": str}, ...]}, and may have settings of
its own: "max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop". A line of --output is the prompt
with its answer and how it was decoded, in the order of the input. Finished answers wait in OUTPUT.partial; a run that
was interrupted goes on from there with the same command.
"""

import sys

from absl import flags

from msn_jax import answers, cli, config, request_files
from msn_jax.cli import InputError
from msn_jax.config import MeshConfig
from msn_jax.decode import display, engine, requests, tree
from msn_jax.decode.engine import Decoder
from msn_jax.decode.requests import Request


def show(answerer: Decoder, asked: dict[str, Request], batch_size: int) -> None:
    """Prints the answers: coloured on a terminal, as text for one prompt of a flag, else as JSON lines."""
    generations = engine.generate_iter(answerer, list(asked.values()), Request(""), batch_size, list(asked))
    for generation in answers.in_order(generations):
        if sys.stdout.isatty():
            display.show(answerer.model.tokenizer, generation)
        else:
            print(generation.text if list(asked) == ["--prompt"] else answers.line(generation), flush=True)


def show_streams(answerer: Decoder, asked: dict[str, Request]) -> None:
    """Prints every answer as it comes."""
    encoded = [engine.encode(answerer, request, place) for place, request in asked.items()]
    for ids, request in zip(encoded, asked.values(), strict=True):
        display.show_stream(request.prompt, (piece for piece, _ in answerer.stream(ids, request)))


def main() -> None:
    """Reads the flags and answers."""
    args = flags.FLAGS
    if (args.prompt is None) == (args.prompts is None):
        raise InputError("give either --prompt=TEXT or --prompts=FILE.jsonl")
    if args.stream and args.output is not None:
        raise InputError("--stream: shows answers as they come, and --output keeps them: give one of them")
    settings = requests.with_settings(Request(""), {name: getattr(args, name) for name in requests.SETTINGS})
    settings.check("--")
    asked = {"--prompt": requests.with_settings(settings, {"prompt": args.prompt})}
    if args.prompts is not None:
        asked = request_files.read(args.prompts, settings)
    if args.output is not None:
        answers.check_output(args.output, keep=[path for path in (args.prompts, args.tree) if path is not None])
    token_tree = None if args.tree is None else tree.load(args.tree)
    mesh = None if args.data == args.tensor == 1 else MeshConfig(data=args.data, fsdp=1, tensor=args.tensor)
    model = engine.load(args.model, args.dtype, mesh)
    draft = None if args.draft is None else engine.load(args.draft, args.dtype)
    answerer = Decoder(model, args.decoder, token_tree, draft)
    answerer.check_batch(args.batch_size)
    if args.stream:
        show_streams(answerer, asked)
    elif args.output is None:
        show(answerer, asked, args.batch_size)
    else:
        answers.write(answerer, asked, args.batch_size, args.output)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "A training workdir, a Hugging Face directory, or OWNER/NAME.", required=True)
    flags.DEFINE_enum("dtype", None, config.DTYPES, "Of parameters and computation; the model's own if not given.")
    flags.DEFINE_string("prompt", None, "One prompt, raw text.")
    flags.DEFINE_string("prompts", None, "A JSONL file of prompts.")
    flags.DEFINE_string("output", None, "A JSONL file for the answers, replaced; standard output otherwise.")
    flags.DEFINE_bool("stream", False, "Show each answer as it comes.")
    flags.DEFINE_enum("decoder", "tr_jacobi", engine.DECODERS, "Who guesses the next tokens.")
    flags.DEFINE_string("tree", None, "A JSON file with a token tree, instead of the model's or the decoder's own.")
    flags.DEFINE_string("draft", None, "The small model of --decoder=draft_model, with the same vocabulary.")
    flags.DEFINE_integer("max_new_tokens", 256, "Limit of each answer, in tokens.")
    flags.DEFINE_float("temperature", 0.0, "0: the best token; above: samples.")
    flags.DEFINE_integer("top_k", 0, "Samples are of so many best tokens; 0: of all.")
    flags.DEFINE_float("top_p", 1.0, "Samples are of the best tokens that together are as probable as this.")
    flags.DEFINE_float("min_p", 0.0, "Samples are of tokens at least this probable, as a share of the best one's.")
    flags.DEFINE_integer("seed", 0, "Of the samples.")
    flags.DEFINE_multi_string("stop", [], "A text that ends an answer and is not part of it; may be repeated.")
    flags.DEFINE_integer("batch_size", 1, "Prompts decoded at once.")
    flags.DEFINE_integer("data", 1, "Devices over which the rows of a batch are dealt.")
    flags.DEFINE_integer("tensor", 1, "Devices over which the weights are split.")
    cli.run(main)
