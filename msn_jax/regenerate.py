"""Lets a model write the responses of a data set itself: data for training its drafts.

    python -m msn_jax.regenerate --model=DIR --data=chats.jsonl --output=own.jsonl --batch_size=16

A draft is accepted if it equals the model's own next token, so the model's own responses are the text to train on. The
output has the form that `--config.data.builder=sft_jsonl` reads. An interrupted run continues where it ended.
"""

import dataclasses
import json

from absl import flags

from msn_jax import cli, config, outputs, request_files
from msn_jax.cli import InputError
from msn_jax.data import record_files
from msn_jax.decode import engine, models
from msn_jax.decode.engine import Decoder
from msn_jax.decode.request import Request


def prompt_of(record: dict) -> str | list[dict]:
    """The prompt of a normalized record: its text before the first response that the model learns.

    Raises:
      InputError: the record is plain text, without a prompt.
    """
    if "messages" in record:
        is_response = [message["role"] == "assistant" and message.get("train", True) for message in record["messages"]]
        return record["messages"][: is_response.index(True)]
    if "prompt" not in record:
        raise InputError(f"{record['location']}: has only 'text', without a prompt: give a prompt or messages")
    return record["prompt"]


def read_data(path: str, settings: Request) -> dict[str, Request]:
    """The prompts of a data set by their location. InputError names a bad record."""
    records, _ = record_files.read(path)
    return {
        record["location"]: dataclasses.replace(settings, prompt=prompt_of(record), tools=record.get("tools"), sample=i)
        for i, record in enumerate(records)
    }


def to_record(generation: dict, tools: list[dict] | None, keep_truncated: bool) -> str | None:
    """A generation, as in `outputs.to_json_line`, as a line of training data; None if it is left out."""
    text = generation["text"]
    if not text or (generation["finish_reason"] == "length" and not keep_truncated):
        return None
    if "prompt" in generation:
        return json.dumps({"prompt": generation["prompt"], "response": text})
    record = {"messages": [*generation["messages"], {"role": "assistant", "content": text}]}
    return json.dumps(record | ({"tools": tools} if tools else {}))


def write(
    decoder: Decoder, requests: dict[str, Request], batch_size: int, path: str, keep_truncated: bool = False
) -> None:
    """Answers the requests and writes the training data, or continues what an interrupted call has left of it.

    Args:
      decoder: model and drafter.
      requests: by their location, from `read_data`.
      batch_size: prompts decoded together.
      path: the JSONL file, replaced.
      keep_truncated: keep responses that reach the limit, although they do not end.

    Raises:
      InputError: see `outputs.write_generations`.
    """
    tools = [request.tools for request in requests.values()]

    def to_line(line: str) -> str | None:
        generation = json.loads(line)
        return to_record(generation, tools[generation["index"]], keep_truncated)

    outputs.write_generations(decoder, requests, batch_size, path, to_line)


def main() -> None:
    """Reads the flags and writes the data."""
    args = flags.FLAGS
    if (args.data is None) == (args.prompts is None):
        raise InputError("give either --data=FILE, with responses to replace, or --prompts=FILE.jsonl")
    settings = Request("", args.max_new_tokens, args.temperature, top_p=args.top_p, seed=args.seed)
    settings.check("--")
    source = args.data or args.prompts
    requests = read_data(source, settings) if args.data else request_files.read(source, settings)
    outputs.check_output(args.output, keep=[source])
    decoder = Decoder(models.load(args.model, args.dtype), args.decoder)
    decoder.check_batch(args.batch_size)
    write(decoder, requests, args.batch_size, args.output, args.keep_truncated)


if __name__ == "__main__":
    flags.DEFINE_string(
        "model", None, "A training workdir, a Hugging Face directory, FILE.gguf, or OWNER/NAME.", required=True
    )
    flags.DEFINE_enum("dtype", None, config.DTYPES, "Of parameters and computation; default: the model's own.")
    flags.DEFINE_string("data", None, "A .json or .jsonl file of training data, whose responses are replaced.")
    flags.DEFINE_string("prompts", None, "A JSONL file of prompts.")
    flags.DEFINE_string("output", None, "The JSONL file of training data, replaced.", required=True)
    flags.DEFINE_enum("decoder", "auto", [name for name in engine.DECODERS if name != "draft_model"], "The decoder.")
    flags.DEFINE_integer("max_new_tokens", 512, "Limit of each response, in tokens.")
    flags.DEFINE_bool("keep_truncated", False, "Keep responses that reach the limit, although they do not end.")
    flags.DEFINE_float("temperature", 0.0, "0 is greedy; above 0, tokens are sampled.")
    flags.DEFINE_float("top_p", 1.0, "Sample from the most probable tokens with this total probability.")
    flags.DEFINE_integer("seed", 0, "Seed of the samples.")
    flags.DEFINE_integer("batch_size", 8, "Prompts decoded together.")
    cli.run(main)
