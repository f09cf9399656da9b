"""What a pass of the decoding loop costs: by width, committed length, batch size and capacity; against the bare model;
against the memory's bandwidth; and how exact it is in bfloat16.

    python -m benchmarks.decode --shape=110m
    python -m benchmarks.decode --shape=8b --dtype=bfloat16 --widths=1,8,32,64,128 --lengths=256,4096 --batch_sizes=1,8
    python -m benchmarks.decode --model=DIR --parts=precision --dtype=bfloat16 --prompts=prompts.jsonl

Parts (`--parts`):

    width      time of a pass of every width, committed length and batch size, and its ratio to a pass of width 1
    capacity   the same pass where a text may grow to 512 tokens and to 8,192 (the engine's caches grow with the text,
               so the ratio should be 1), and in a cache that has 8,192 slots from the start
    overhead   the loop over a bare forward, unembed and argmax of the same width
    bandwidth  bytes of weights and committed cache a pass, over its time, as a share of a measured copy; with `width`
    precision  the share of answers that equal autoregressive decoding, in the same dtype and in float32, and the gap
               between the two best logits at every first difference

A shape has random weights, made on the device; there is nothing to accept in its texts, so times are of passes. Writes
JSON to standard output or --output, and tables to standard error.
"""

import itertools
import sys

import jax
import numpy as np
from absl import flags
from rich.progress import track

from benchmarks import passes, precision, report, shapes
from benchmarks.passes import Setting
from msn_jax import cli, config, llama, request_files
from msn_jax.cli import InputError
from msn_jax.decode import drafters, engine
from msn_jax.decode.request import Request, encode_prompt
from msn_jax.decode.session import Model

PARTS = ("width", "capacity", "overhead", "bandwidth", "precision")
_COLUMNS = {  # of the tables
    "width": (
        *("decoder", "width", "batch_size", "length", "capacity", "seconds", "ratio"),
        *("bandwidth_share", "compile_seconds", "temporary_bytes"),
    ),
    "capacity": ("decoder", "width", "length", "maximum", "capacity", "seconds", "ratio"),
    "overhead": ("decoder", "width", "batch_size", "length", "seconds", "bare_seconds", "ratio"),
    "precision": ("decoder", "dtype", "against", "texts", "exact_share", "largest_gap"),
}
_SHORT, _LONG = 512, 8192  # maxima of the capacity part
_COPIED = {"cpu": 1 << 28}  # bytes of the array that is copied; far more than a cache holds
_COPIED_ON_ACCELERATORS = 1 << 31


def measure_widths(
    model: Model, decoders: list[tuple[str, str]], widths: list[int], settings: list[Setting], repeats: int
) -> list[dict]:
    """Seconds a pass for every setting, decoder and width; width 1 comes first and is what ratios are to."""
    rows = []
    for setting in track(settings, "width", disable=not sys.stderr.isatty()):
        compiled = {}
        for name, width in _combinations(decoders, widths):
            compiled[name, width] = passes.compiled(model, passes.drafter(*name, width), setting)
        seconds = report.alternate({key: timed.run for key, timed in compiled.items()}, repeats)
        for (name, width), timed in compiled.items():
            weights, cache = shapes.weight_bytes(model.cfg), _cache_bytes(model, setting)
            rows.append(
                {
                    "decoder": "/".join(name),
                    "width": width,
                    "batch_size": setting.batch_size,
                    "length": setting.length,
                    "capacity": setting.capacity,
                    "seconds": seconds[name, width],
                    "ratio": seconds[name, width] / seconds[_FIRST],
                    "bytes_per_pass": weights + cache,
                    "bytes_per_second": (weights + cache) / seconds[name, width],
                    "compile_seconds": timed.compile_seconds,
                    "temporary_bytes": timed.temporary_bytes,
                }
            )
    return rows


_FIRST = (("autoregressive", "chain"), 1)


def _combinations(decoders: list[tuple[str, str]], widths: list[int]) -> list[tuple[tuple[str, str], int]]:
    return [_FIRST, *((name, width) for name in decoders for width in widths if width > 1)]


def _cache_bytes(model: Model, setting: Setting) -> int:
    return shapes.cache_bytes(model.cfg, setting.batch_size, setting.length)


def measure_capacity(model: Model, name: tuple[str, str], widths: list[int], length: int, repeats: int, passes_: int):
    """Rows of the part `capacity`: a pass at one committed length, by how long the text may become and by the slots of
    the cache.
    """
    rows = []
    for width in widths:
        drafter = passes.drafter(*name, width)
        short = passes.capacity(length, passes_, width)
        runs = {
            (maximum, slots): passes.compiled(model, drafter, Setting(1, length, slots, passes_, maximum))
            for maximum, slots in ((_SHORT, short), (_LONG, short), (_LONG, _LONG))
        }
        seconds = report.alternate({key: timed.run for key, timed in runs.items()}, repeats)
        for (maximum, slots), time in seconds.items():
            rows.append(
                {
                    "decoder": "/".join(name) if width > 1 else "autoregressive",
                    "width": width,
                    "length": length,
                    "maximum": maximum,
                    "capacity": slots,
                    "as_the_engine": slots == short,
                    "seconds": time,
                    "ratio": time / seconds[_SHORT, short],
                }
            )
    return rows


def measure_overhead(model: Model, decoders: list[tuple[str, str]], widths: list[int], setting: Setting, repeats: int):
    """Rows of the part `overhead`: the loop's pass over the bare one of the same tree."""
    rows = []
    for name, width in _combinations(decoders, widths):
        drafter = passes.drafter(*name, width)
        looped = passes.compiled(model, drafter, setting)
        bare = passes.bare_run(model, drafter.tree, passes.state(model, drafter, setting).cache, setting.passes)
        seconds = report.alternate({"loop": looped.run, "bare": bare}, repeats)
        rows.append(
            {
                "decoder": "/".join(name),
                "width": width,
                "batch_size": setting.batch_size,
                "length": setting.length,
                "seconds": seconds["loop"],
                "bare_seconds": seconds["bare"],
                "ratio": seconds["loop"] / seconds["bare"],
            }
        )
    return rows


def load(args: flags.FlagValues) -> Model:
    """The model of --model, or a random one of --shape."""
    if (args.model is None) == (args.shape is None):
        raise InputError("give either --model=DIR or --shape=" + "|".join(shapes.SHAPES))
    if args.model is not None:
        return engine.load(args.model, args.dtype)
    cfg = shapes.config(args.shape, args.dtype or "float32")
    return Model(llama.decode_layout(shapes.random_params(cfg), cfg), cfg, passes.NoTokenizer())


def measure_precision(model: Model, args: flags.FlagValues) -> list[dict]:
    """Rows of the part `precision`, for the decoders' own trees."""
    if args.prompts is not None:
        if args.model is None:
            raise InputError("--prompts: a shape has no tokenizer: give --model=DIR")
        found = request_files.read(args.prompts, Request("")).items()
        encoded = [encode_prompt(model.tokenizer, asked.prompt, model.cfg.max_length, at) for at, asked in found]
    else:
        encoded = np.random.default_rng(1).integers(0, model.cfg.vocab_size, (args.texts, 32)).tolist()
    names = dict.fromkeys(["autoregressive", *args.decoders])
    return precision.compare(model, {name: drafters.get(name) for name in names}, encoded, args.new_tokens)


def measure(model: Model, args: flags.FlagValues) -> dict:
    """All parts that are asked for."""
    widths, lengths = _numbers("--widths", args.widths), _numbers("--lengths", args.lengths)
    batch_sizes = _numbers("--batch_sizes", args.batch_sizes)
    decoders = [(name, args.topology) for name in args.decoders]
    settings = [
        Setting(batch_size, length, passes.capacity(length, args.passes, widths[-1]), args.passes)
        for batch_size, length in itertools.product(batch_sizes, lengths)
    ]
    result = {}
    if "width" in args.parts:
        result["width"] = measure_widths(model, decoders, widths, settings, args.repeats)
    if "capacity" in args.parts:
        ends = sorted({1, widths[-1]})
        result["capacity"] = measure_capacity(model, decoders[0], ends, 256, args.repeats, args.passes)
    if "overhead" in args.parts:
        result["overhead"] = measure_overhead(model, decoders, widths, settings[0], args.repeats)
    if "bandwidth" in args.parts:
        copied = _COPIED.get(jax.default_backend(), _COPIED_ON_ACCELERATORS)
        bandwidth = passes.copy_bandwidth(copied, max(args.repeats, 10))
        result["copy_bytes_per_second"] = bandwidth
        for row in result.get("width", []):
            row["bandwidth_share"] = row["bytes_per_second"] / bandwidth
    if "precision" in args.parts:
        result["precision"] = measure_precision(model, args)
    memory = jax.devices()[0].memory_stats() or {}
    result["peak_memory_bytes"] = memory.get("peak_bytes_in_use")
    return result


def _numbers(flag: str, texts: list[str]) -> list[int]:
    given = f"{flag}={','.join(texts)}"
    try:
        numbers = [int(text) for text in texts]
    except ValueError as error:
        raise InputError(f"{given}: must be numbers, with commas between them") from error
    if not numbers or min(numbers) < 1:
        raise InputError(f"{given}: must be at least 1, each of them")
    return sorted(set(numbers))


def show(result: dict) -> None:
    """The tables."""
    for part, columns in _COLUMNS.items():
        report.print_table(part, result.get(part, []), columns)
    if "copy_bytes_per_second" in result:
        print(f"copy bandwidth: {result['copy_bytes_per_second'] / 1e9:.1f} GB/s", file=sys.stderr)


def main() -> None:
    """Reads the flags, measures, prints."""
    args = flags.FLAGS
    known = set(passes.SOURCES)
    for name, values, choices in (("parts", args.parts, PARTS), ("decoders", args.decoders, known)):
        wrong = sorted(set(values) - set(choices)) if values else ["''"]
        if wrong:
            raise InputError(f"--{name}: {wrong[0]} is none of {', '.join(sorted(choices))}")
    model = load(args)
    result = {
        **report.environment(),
        "model": args.model or args.shape,
        "dtype": model.cfg.dtype,
        "parameters": shapes.parameters(model.cfg),
        "weight_bytes_per_pass": shapes.weight_bytes(model.cfg),
        "passes": args.passes,
        "repeats": args.repeats,
        **measure(model, args),
    }
    show(result)
    report.write(result, args.output)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "A training workdir, a Hugging Face directory, or OWNER/NAME.")
    flags.DEFINE_enum("shape", None, list(shapes.SHAPES), "A random model instead.")
    flags.DEFINE_enum("dtype", None, config.DTYPES, "The model's own, or float32 for a shape, if not given.")
    flags.DEFINE_list("parts", ["width", "capacity", "overhead", "bandwidth"], "Some of " + ", ".join(PARTS) + ".")
    flags.DEFINE_list("decoders", ["jacobi", "tr_jacobi"], "Some of " + ", ".join(passes.SOURCES) + ".")
    flags.DEFINE_enum("topology", "chain", ["chain", "binary"], "Of the trees: chains, or two children for every node.")
    flags.DEFINE_list("widths", ["1", "2", "4", "8", "16", "32", "64"], "Nodes of the trees.")
    flags.DEFINE_list("lengths", ["256"], "Committed tokens.")
    flags.DEFINE_list("batch_sizes", ["1"], "Rows.")
    flags.DEFINE_integer("passes", 32, "Of one timed run.", lower_bound=1)
    flags.DEFINE_integer("repeats", 7, "Timed runs of each kind.", lower_bound=1)
    flags.DEFINE_integer("texts", 8, "Random prompts of the part 'precision'.", lower_bound=1)
    flags.DEFINE_integer("new_tokens", 128, "Of each of its answers.", lower_bound=1)
    flags.DEFINE_string("prompts", None, "A JSONL file with prompts for that part instead.")
    flags.DEFINE_string("output", "", "A file for the JSON.")
    cli.run(main)
