"""Our decoders against those of transformers, and of the paper's authors: same weights, prompts, dtype and machine.

    python -m benchmarks.peers --model=HF_DIR --prompts=prompts.jsonl
    python -m benchmarks.peers --model=HF_DIR --spec_bench=question.jsonl --questions=10
    python -m benchmarks.peers --shape=110m                                # random weights, exported for both sides
    python -m benchmarks.peers --model=HF_DIR --prompts=... --authors=DIR  # a checkout of MakeSomeNoiseInference
    python -m benchmarks.peers --model=HF_DIR --prompts=... --nopeers      # our decoders alone

One process; every prompt is decoded by every decoder in turn, forwards and backwards, `--repeats` times, after a first
run that compiles and counts forward passes. Each measurement is of two runs, the second of which is timed. Both sides
get the same token ids and return token ids, prefill included. `taskset` sets the cores of both. Needs the extra
`peers`, but for `--nopeers`.

Of Spec-Bench, the first turns; longer prompts than the context has room for keep their end. `same_text` is the share
of prompts whose tokens are those of our autoregressive decoding. `tokens_per_second` are all new tokens of a group over
the sum of the medians of its prompts; of peers that go on behind a stop token, tokens up to it are counted. Prints a
table, and JSON.
"""

import functools
import os
import sys
import tempfile
import time
import types
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from rich.progress import track

from benchmarks import passes, questions, report, shapes
from benchmarks.questions import Answer, Decoder, Question
from msn_jax import cli, config, hugging_face, llama, request_files
from msn_jax.cli import InputError
from msn_jax.decode import drafters, engine
from msn_jax.decode import tree as trees
from msn_jax.decode.request import Request
from msn_jax.decode.session import DecodeSession, Model
from msn_jax.decode.tree import TokenTree

REFERENCE = "autoregressive"  # whose tokens are the right ones
OURS = (REFERENCE, "prompt_lookup", "tr_jacobi")


def our_decoder(model: Model, name: str, tree: TokenTree | None) -> Decoder:
    """One of our decoders, batch 1."""
    drafter = drafters.get(name, tree)

    def decode(question: Question) -> Answer:
        session = DecodeSession(model, drafter, [question.ids], [Request("", question.max_new_tokens)], 1)
        session.run()
        tokens, accepted = session.new_tokens()[0]
        return Answer(tokens, len(accepted))

    return decode


def measure(decoders: dict[str, Decoder], asked: Sequence[Question], stop_ids: Sequence[int], repeats: int):
    """For every question and decoder: seconds, tokens, passes, and whether the tokens are the reference's."""
    rows = []
    for question in track(asked, "decoding", disable=not sys.stderr.isatty()):
        answers = {name: decode(question) for name, decode in decoders.items()}
        runs = {name: functools.partial(_seconds, decode, question) for name, decode in decoders.items()}
        seconds = report.alternate(runs, repeats)
        reference = _up_to_stop(answers[REFERENCE].tokens, question, stop_ids)
        for name, answer in answers.items():
            tokens = _up_to_stop(answer.tokens, question, stop_ids)
            rows.append(
                {
                    "group": question.group,
                    "decoder": name,
                    "seconds": seconds[name],
                    "new_tokens": len(tokens),
                    "forward_passes": answer.forward_passes,
                    "same": tokens == reference,
                }
            )
    return rows


def _seconds(decode: Decoder, question: Question) -> float:
    """Of the second of two runs: the first one meets what another decoder has left in the processor's caches, and that
    would not be the same for all.
    """
    decode(question)
    start = time.perf_counter()
    decode(question)
    return time.perf_counter() - start


def _up_to_stop(tokens: Sequence[int], question: Question, stop_ids: Sequence[int]) -> list[int]:
    """The answer as it should be: up to the first stop token and the limit. The authors' code goes beyond both."""
    tokens = list(tokens[: question.max_new_tokens])
    ends = [place for place, token in enumerate(tokens) if token in stop_ids]
    return tokens[: ends[0] + 1] if ends else tokens


def summarise(rows: Sequence[dict]) -> list[dict]:
    """A row per group and decoder, and per decoder over all of them."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    decoders = list(dict.fromkeys(row["decoder"] for row in rows))
    summary = []
    for group in [*groups, *(["all"] if len(groups) > 1 else [])]:
        rates = {}
        for name in decoders:
            found = [row for row in rows if row["decoder"] == name and group in (row["group"], "all")]
            new_tokens = sum(row["new_tokens"] for row in found)
            rates[name] = new_tokens / sum(row["seconds"] for row in found)
            summary.append(
                {
                    "group": group,
                    "decoder": name,
                    "prompts": len(found),
                    "new_tokens": new_tokens,
                    "mean_accepted_tokens": new_tokens / sum(row["forward_passes"] for row in found),
                    "tokens_per_second": rates[name],
                    "speedup": rates[name] / rates[REFERENCE],
                    "same_text": sum(row["same"] for row in found) / len(found),
                }
            )
    return summary


def bounds(summary: Sequence[dict]) -> dict[str, float]:
    """The ratios that matter, over all groups; and our worst group against our own prompt lookup."""
    rate = {(row["group"], row["decoder"]): row["tokens_per_second"] for row in summary}
    groups = list(dict.fromkeys(row["group"] for row in summary))
    whole = groups[-1]  # 'all', or the only one

    def ratio(ours: str, theirs: str, group: str = whole) -> float:
        return rate[group, ours] / rate[group, theirs]

    ratios = {
        "tr_jacobi_over_prompt_lookup_worst_group": min(ratio("tr_jacobi", "prompt_lookup", name) for name in groups),
    }
    if (whole, "transformers") in rate:
        ratios["autoregressive_over_transformers"] = ratio(REFERENCE, "transformers")
        ratios["tr_jacobi_over_transformers_prompt_lookup"] = ratio("tr_jacobi", "transformers_prompt_lookup")
    if (whole, "authors") in rate:
        ratios["tr_jacobi_over_authors"] = ratio("tr_jacobi", "authors")
    return ratios


def load(args: flags.FlagValues, directory: Path) -> tuple[Model, Path]:
    """Our model, and the Hugging Face directory that theirs is read from."""
    if (args.model is None) == (args.shape is None):
        raise InputError("give either --model=HF_DIR or --shape=" + "|".join(shapes.SHAPES))
    if args.shape is None and (args.prompts is None) == (args.spec_bench is None):
        raise InputError("give either --prompts=FILE.jsonl or --spec_bench=question.jsonl")
    if args.model is not None:
        if not hugging_face.is_checkpoint(args.model):
            raise InputError(f"--model={args.model}: not a Hugging Face directory: make one with msn_jax.convert")
        return engine.load(args.model, args.dtype), Path(args.model)
    cfg = shapes.config(args.shape, args.dtype or "float32")
    params = shapes.random_params(cfg)
    hugging_face.export(params, cfg, directory / "model")
    return Model(llama.decode_layout(params, cfg), cfg, passes.NoTokenizer()), directory / "model"


def _questions(args: flags.FlagValues, model: Model) -> list[Question]:
    if args.shape is not None:
        return questions.random(model.cfg, args.questions or 4, args.max_new_tokens)
    if args.spec_bench is not None:
        prompts = questions.read_spec_bench(args.spec_bench, args.questions)
    else:
        prompts = [("prompts", request.prompt) for request in request_files.read(args.prompts, Request("")).values()]
        prompts = prompts[: args.questions or None]
    return questions.encode(model, prompts, args.max_new_tokens)


def run(args: flags.FlagValues, directory: Path) -> dict:
    """Everything: the report."""
    theirs = _import_torch_peers() if args.peers else None
    model, path = load(args, directory)
    asked = _questions(args, model)
    tree = None if args.tree is None else trees.load(args.tree)
    stop_ids = list(model.tokenizer.stop_ids)
    decoders = {name: our_decoder(model, name, tree if name == "tr_jacobi" else None) for name in OURS}
    versions, threads = {}, args.torch_threads or len(os.sched_getaffinity(0))
    if theirs is not None:
        versions = {"torch": theirs.torch.__version__, "transformers": theirs.transformers.__version__}
        theirs.torch.set_num_threads(threads)
        decoders |= theirs.transformers_decoders(path, model.cfg.dtype, stop_ids, args.lookup)
        if args.authors is not None:
            decoders["authors"] = theirs.authors_decoder(Path(args.authors), path, model.cfg.dtype, stop_ids)
    summary = summarise(measure(decoders, asked, stop_ids, args.repeats))
    return {
        **report.environment(**versions),
        "model": args.model or args.shape,
        "dtype": model.cfg.dtype,
        "parameters": shapes.parameters(model.cfg),
        "torch_threads": threads,
        "max_new_tokens": args.max_new_tokens,
        "repeats": args.repeats,
        "lookup_tokens": args.lookup,
        "bounds": bounds(summary),
        "rows": summary,
    }


def _import_torch_peers() -> types.ModuleType:
    try:
        from benchmarks import torch_peers
    except ImportError as error:
        raise InputError(f"torch or transformers is not installed ({error}): pip install -e .[peers]") from error
    return torch_peers


def main() -> None:
    """Reads the flags, measures, prints."""
    args = flags.FLAGS
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs room on the same GPU
    with tempfile.TemporaryDirectory() as directory:
        result = run(args, Path(directory))
    report.print_table("peers", result["rows"], list(result["rows"][0]))
    report.write(result, args.output)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "A Hugging Face directory.")
    flags.DEFINE_enum("shape", None, list(shapes.SHAPES), "A random model instead, with random prompts.")
    flags.DEFINE_enum("dtype", None, config.DTYPES, "The model's own, or float32 for a shape, if not given.")
    flags.DEFINE_string("prompts", None, "A JSONL file of prompts.")
    flags.DEFINE_string("spec_bench", None, "Spec-Bench's question.jsonl.")
    flags.DEFINE_integer("questions", 0, "How many prompts, of each group; 0: all of them.", lower_bound=0)
    flags.DEFINE_integer("max_new_tokens", 128, "Limit of each answer.", lower_bound=1)
    flags.DEFINE_integer("repeats", 3, "Timed runs of each prompt and decoder.", lower_bound=1)
    flags.DEFINE_integer("lookup", 10, "prompt_lookup_num_tokens of transformers.", lower_bound=1)
    flags.DEFINE_integer("torch_threads", 0, "For tiny models 1 is faster; 0: one per core.", lower_bound=0)
    flags.DEFINE_bool("peers", True, "Or our decoders alone, for differences of a percent between them.")
    flags.DEFINE_string("tree", None, "A JSON file with a token tree for tr_jacobi.")
    flags.DEFINE_string("authors", None, "A checkout of the authors' inference code (MakeSomeNoiseInference).")
    flags.DEFINE_string("output", "", "A file for the JSON.")
    cli.run(main)
