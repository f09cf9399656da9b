"""Compares our decoders with transformers, llama.cpp and the paper's code: same weights, prompts, dtype, machine.

    python -m benchmarks.peers --model=HF_DIR --prompts=prompts.jsonl
    python -m benchmarks.peers --model=HF_DIR --spec_bench=question.jsonl --questions=10
    python -m benchmarks.peers --shape=110m                                # random weights, exported for the peers
    python -m benchmarks.peers --model=HF_DIR --prompts=... --authors=DIR  # a checkout of MakeSomeNoiseInference
    python -m benchmarks.peers --model=HF_DIR --prompts=... --llama_cpp=MODEL.gguf
    python -m benchmarks.peers --model=HF_DIR --prompts=... --nopeers      # our decoders alone

All decoders run in one process. For every prompt, a first run of each decoder compiles and a second one counts forward
passes; then the decoders alternate `--repeats` times, in forward and reverse order. Each measurement consists of two
runs, and only the second is timed. All decoders take and return token ids, and their times include the prefill.
`taskset` limits the cores of all decoders. Needs the `peers` extra, except with `--nopeers`.

Spec-Bench questions are their first turns; a prompt that exceeds the context is truncated on the left. `exact_share` is
the share of prompts whose tokens equal those of our autoregressive decoding. `tokens_per_second` is the number of new
tokens of a group, divided by the sum of its prompts' median times. A peer's tokens after the first stop token are not
counted. Prints a table, and JSON.
"""

import functools
import importlib
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
from benchmarks.questions import Completion, Decoder, Question
from msn_jax import cli, config, hugging_face, llama, request_files
from msn_jax.cli import InputError
from msn_jax.decode import drafters, engine, models
from msn_jax.decode import tree as trees
from msn_jax.decode.models import Model
from msn_jax.decode.request import Request
from msn_jax.decode.session import DecodeSession
from msn_jax.decode.tree import TokenTree

REFERENCE = "autoregressive"  # its tokens define exactness
OURS = (REFERENCE, "prompt_lookup", "tr_jacobi", "auto")


def our_decoder(model: Model, name: str, tree: TokenTree | None) -> Decoder:
    """One of our decoders, with batch size 1."""
    drafter = drafters.get(name, tree)

    def decode(question: Question) -> Completion:
        session = DecodeSession(model, drafter, [question.ids], [Request("", question.max_new_tokens)], 1)
        session.run()
        engine.wait_for_compilation(model)  # of `auto`, after its first run
        [(tokens, accept_lengths)] = session.output_tokens()
        return Completion(tokens, len(accept_lengths))

    return decode


def measure(
    decoders: dict[str, Decoder], prompts: Sequence[Question], stop_ids: Sequence[int], repeats: int
) -> list[dict]:
    """A row per question and decoder: median seconds, new tokens, forward passes, and equality with the reference."""
    rows = []
    for question in track(prompts, "decoding", disable=not sys.stderr.isatty()):
        for decode in decoders.values():
            decode(question)  # compiles; `auto` compiles in the background and continues with the root alone
        completions = {name: decode(question) for name, decode in decoders.items()}
        runs = {name: functools.partial(_seconds, decode, question) for name, decode in decoders.items()}
        seconds = report.alternate(runs, repeats)
        reference = _truncate(completions[REFERENCE].tokens, question, stop_ids)
        for name, completion in completions.items():
            tokens = _truncate(completion.tokens, question, stop_ids)
            rows.append(
                {
                    "group": question.group,
                    "decoder": name,
                    "seconds": seconds[name],
                    "new_tokens": len(tokens),
                    "forward_passes": completion.forward_passes,
                    "exact": tokens == reference,
                }
            )
    return rows


def _seconds(decode: Decoder, question: Question) -> float:
    """Seconds of the second of two runs. The first run starts with caches filled by another decoder, which differs
    between decoders.
    """
    decode(question)
    start = time.perf_counter()
    decode(question)
    return time.perf_counter() - start


def _truncate(tokens: Sequence[int], question: Question, stop_ids: Sequence[int]) -> list[int]:
    """Truncates to the limit and after the first stop token. The authors' code generates beyond both."""
    tokens = list(tokens[: question.max_new_tokens])
    stops = [index for index, token in enumerate(tokens) if token in stop_ids]
    return tokens[: stops[0] + 1] if stops else tokens


def summarize(rows: Sequence[dict]) -> list[dict]:
    """A row per group and decoder, and a row per decoder over all groups."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    decoders = list(dict.fromkeys(row["decoder"] for row in rows))
    summary = []
    for group in [*groups, *(["all"] if len(groups) > 1 else [])]:
        rates = {}
        for name in decoders:
            selected = [row for row in rows if row["decoder"] == name and group in (row["group"], "all")]
            new_tokens = sum(row["new_tokens"] for row in selected)
            rates[name] = new_tokens / sum(row["seconds"] for row in selected)
            summary.append(
                {
                    "group": group,
                    "decoder": name,
                    "prompts": len(selected),
                    "new_tokens": new_tokens,
                    "mean_accepted_tokens": new_tokens / sum(row["forward_passes"] for row in selected),
                    "tokens_per_second": rates[name],
                    "speedup": rates[name] / rates[REFERENCE],
                    "exact_share": sum(row["exact"] for row in selected) / len(selected),
                }
            )
    return summary


def speed_ratios(summary: Sequence[dict]) -> dict[str, float]:
    """Ratios of tokens/s over all groups, and the worst group's ratio of `tr_jacobi` to our own `prompt_lookup`."""
    rate = {(row["group"], row["decoder"]): row["tokens_per_second"] for row in summary}
    groups = list(dict.fromkeys(row["group"] for row in summary))
    overall = groups[-1]  # 'all', or the only group

    def ratio(decoder: str, baseline: str, group: str = overall) -> float:
        return rate[group, decoder] / rate[group, baseline]

    ratios = {
        "tr_jacobi_over_prompt_lookup_worst_group": min(ratio("tr_jacobi", "prompt_lookup", name) for name in groups),
    }
    for baseline in (REFERENCE, "transformers", "transformers_prompt_lookup", "llama_cpp", "llama_cpp_prompt_lookup"):
        if (overall, baseline) in rate:
            ratios[f"auto_over_{baseline}"] = ratio("auto", baseline)
    if (overall, "transformers") in rate:
        ratios["autoregressive_over_transformers"] = ratio(REFERENCE, "transformers")
        ratios["tr_jacobi_over_transformers_prompt_lookup"] = ratio("tr_jacobi", "transformers_prompt_lookup")
    if (overall, "authors") in rate:
        ratios["tr_jacobi_over_authors"] = ratio("tr_jacobi", "authors")
    return ratios


def load(args: flags.FlagValues, directory: Path) -> tuple[Model, Path]:
    """Our model, and the Hugging Face directory that the peers load it from."""
    if (args.model is None) == (args.shape is None):
        raise InputError("give either --model=HF_DIR or --shape=" + "|".join(shapes.SHAPES))
    if args.shape is None and (args.prompts is None) == (args.spec_bench is None):
        raise InputError("give either --prompts=FILE.jsonl or --spec_bench=question.jsonl")
    if args.model is not None:
        if not hugging_face.is_checkpoint(args.model):
            raise InputError(f"--model={args.model}: not a Hugging Face directory; create one with msn_jax.convert")
        return models.load(args.model, args.dtype), Path(args.model)
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
    """Loads the model, measures all decoders and returns the report."""
    if args.llama_cpp is not None and not args.peers:
        raise InputError("--llama_cpp names a peer and --nopeers wants none; give one of the two")
    if args.llama_cpp is not None and not Path(args.llama_cpp).is_file():
        raise InputError(f"--llama_cpp={args.llama_cpp}: no such file; llama.cpp reads a GGUF file")
    torch_peers = _import_peers("torch_peers", "torch or transformers", "-e .[peers]") if args.peers else None
    model, path = load(args, directory)
    prompts = _questions(args, model)
    tree = None if args.tree is None else trees.load(args.tree)
    stop_ids = list(model.tokenizer.stop_ids)
    decoders = {name: our_decoder(model, name, tree if name == "tr_jacobi" else None) for name in OURS}
    versions, threads = {}, args.torch_threads or len(os.sched_getaffinity(0))
    if torch_peers is not None:
        versions = {"torch": torch_peers.torch.__version__, "transformers": torch_peers.transformers.__version__}
        torch_peers.torch.set_num_threads(threads)
        decoders |= torch_peers.transformers_decoders(path, model.cfg.dtype, stop_ids, args.lookup)
        if args.authors is not None:
            decoders["authors"] = torch_peers.authors_decoder(Path(args.authors), path, model.cfg.dtype, stop_ids)
    if args.llama_cpp is not None:
        context = max(len(question.ids) for question in prompts) + args.max_new_tokens + args.lookup
        peer = _import_peers("llama_cpp_peer", "llama-cpp-python", "llama-cpp-python")
        versions["llama_cpp_python"] = peer.llama_cpp.__version__
        decoders |= peer.llama_cpp_decoders(Path(args.llama_cpp), context, threads, stop_ids, args.lookup)
    summary = summarize(measure(decoders, prompts, stop_ids, args.repeats))
    return {
        **report.environment(**versions),
        "model": args.model or args.shape,
        "dtype": model.cfg.dtype,
        "parameters": shapes.parameters(model.cfg),
        "torch_threads": threads,
        "max_new_tokens": args.max_new_tokens,
        "repeats": args.repeats,
        "lookup_tokens": args.lookup,
        "speed_ratios": speed_ratios(summary),
        "rows": summary,
    }


def _import_peers(module: str, libraries: str, install: str) -> types.ModuleType:
    """A module of `benchmarks` that needs other libraries. InputError if they are not installed."""
    try:
        return importlib.import_module(f"benchmarks.{module}")
    except ImportError as error:
        raise InputError(f"{libraries} is not installed ({error}): pip install {install}") from error


def main() -> None:
    """Measures, prints the table and writes the report."""
    args = flags.FLAGS
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory on the same GPU
    with tempfile.TemporaryDirectory() as directory:
        result = run(args, Path(directory))
    report.print_table("peers", result["rows"], list(result["rows"][0]))
    report.write(result, args.output)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "A Hugging Face directory.")
    flags.DEFINE_enum("shape", None, list(shapes.SHAPES), "Use random weights of this shape, and random prompts.")
    flags.DEFINE_enum("dtype", None, config.DTYPES, "Default: the dtype of --model, or float32 with --shape.")
    flags.DEFINE_string("prompts", None, "A JSONL file of prompts.")
    flags.DEFINE_string("spec_bench", None, "Spec-Bench's question.jsonl.")
    flags.DEFINE_integer("questions", 0, "Prompts per group; 0 takes all.", lower_bound=0)
    flags.DEFINE_integer("max_new_tokens", 128, "Limit per prompt, in tokens.", lower_bound=1)
    flags.DEFINE_integer("repeats", 3, "Timed runs per prompt and decoder.", lower_bound=1)
    flags.DEFINE_integer("lookup", 10, "prompt_lookup_num_tokens of transformers.", lower_bound=1)
    flags.DEFINE_integer("torch_threads", 0, "0: one per core. 1 is faster for tiny models.", lower_bound=0)
    flags.DEFINE_bool("peers", True, "Measure the peers, too. Without them, our decoders compare to about a percent.")
    flags.DEFINE_string("tree", None, "A JSON file with a token tree for tr_jacobi.")
    flags.DEFINE_string("authors", None, "A checkout of the authors' inference code (MakeSomeNoiseInference).")
    flags.DEFINE_string("llama_cpp", None, "The same model as a GGUF file: measure llama.cpp, too.")
    flags.DEFINE_string("output", "", "JSON file to write; standard output if empty.")
    cli.run(main)
