"""Cost of a forward pass of the decoding loop, and exactness in bfloat16.

    python -m benchmarks.decode --shape=110m
    python -m benchmarks.decode --shape=8b --dtype=bfloat16 --widths=1,8,32,64,128 --lengths=256,4096 --batch_sizes=1,8
    python -m benchmarks.decode --model=DIR --parts=precision --dtype=bfloat16 --prompts=prompts.jsonl

Parts (`--parts`):

    width      time per forward pass by tree width, committed length and batch size; ratio to width 1
    capacity   the same pass with a limit of 512 tokens and of 8,192 tokens (the engine's caches grow with the sequence,
               so the ratio should be 1), and with a cache of 8,192 slots from the start
    overhead   time per pass of the loop relative to a bare forward, unembed and argmax of the same width
    bandwidth  bytes of weights and committed cache read per second, as a share of the measured copy bandwidth; its
               shares are reported with `width`
    precision  share of completions equal to those of autoregressive decoding, in the same dtype and in float32, and the
               gap between the two largest logits at every first difference

With --shape the weights are random and generated on the device. Their completions are meaningless, so only the time per
forward pass is reported. Writes JSON to standard output or --output, and tables to standard error.
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
from msn_jax.decode import drafters, models
from msn_jax.decode.models import Model
from msn_jax.decode.request import Request, encode_prompt

PARTS = ("width", "capacity", "overhead", "bandwidth", "precision")
_COLUMNS = {  # printed in the tables
    "width": (
        *("decoder", "width", "batch_size", "length", "capacity", "seconds", "ratio"),
        *("bandwidth_share", "compile_seconds", "temporary_bytes"),
    ),
    "capacity": ("decoder", "width", "length", "maximum", "capacity", "seconds", "ratio"),
    "overhead": ("decoder", "width", "batch_size", "length", "seconds", "bare_seconds", "ratio"),
    "precision": ("decoder", "dtype", "reference", "prompts", "exact_share", "largest_gap"),
}
_SHORT, _LONG = 512, 8192  # length limits of the part `capacity`, in tokens
_COPY_BYTES = {"cpu": 1 << 28}  # size of the copied array: much larger than the processor's caches
_COPY_BYTES_ON_ACCELERATORS = 1 << 31


def measure_widths(
    model: Model, decoders: list[tuple[str, str]], widths: list[int], settings: list[Setting], repeats: int
) -> list[dict]:
    """Rows of the part `width`: seconds per forward pass. Ratios are relative to width 1 in the same setting."""
    rows = []
    for setting in track(settings, "width", disable=not sys.stderr.isatty()):
        compiled = {}
        for name, width in _combinations(decoders, widths):
            compiled[name, width] = passes.compile_loop(model, passes.drafter(*name, width), setting)
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
                    "ratio": seconds[name, width] / seconds[_BASELINE],
                    "bytes_per_pass": weights + cache,
                    "bytes_per_second": (weights + cache) / seconds[name, width],
                    "compile_seconds": timed.compile_seconds,
                    "temporary_bytes": timed.temporary_bytes,
                }
            )
    return rows


_BASELINE = (("autoregressive", "chain"), 1)


def _combinations(decoders: list[tuple[str, str]], widths: list[int]) -> list[tuple[tuple[str, str], int]]:
    return [_BASELINE, *((name, width) for name in decoders for width in widths if width > 1)]


def _cache_bytes(model: Model, setting: Setting) -> int:
    return shapes.cache_bytes(model.cfg, setting.batch_size, setting.length)


def measure_capacity(
    model: Model, name: tuple[str, str], widths: list[int], length: int, repeats: int, num_passes: int
) -> list[dict]:
    """Rows of the part `capacity`: one committed length, by length limit and by number of cache slots."""
    rows = []
    for width in widths:
        drafter = passes.drafter(*name, width)
        short = passes.capacity(length, num_passes, width)
        runs = {
            (maximum, slots): passes.compile_loop(model, drafter, Setting(1, length, slots, num_passes, maximum))
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
                    "is_engine_capacity": slots == short,
                    "seconds": time,
                    "ratio": time / seconds[_SHORT, short],
                }
            )
    return rows


def measure_overhead(
    model: Model, decoders: list[tuple[str, str]], widths: list[int], setting: Setting, repeats: int
) -> list[dict]:
    """Rows of the part `overhead`: time per pass of the loop relative to a bare forward pass over the same tree."""
    rows = []
    for name, width in _combinations(decoders, widths):
        drafter = passes.drafter(*name, width)
        decode_loop = passes.compile_loop(model, drafter, setting)
        cache = passes.initial_state(model, drafter, setting).cache
        bare_loop = passes.bare_timer(model, drafter.tree, cache, setting.passes)
        seconds = report.alternate({"loop": decode_loop.run, "bare": bare_loop}, repeats)
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
    """Loads --model, or creates a random model of --shape."""
    if (args.model is None) == (args.shape is None):
        raise InputError("give either --model=DIR or --shape=" + "|".join(shapes.SHAPES))
    if args.model is not None:
        return models.load(args.model, args.dtype)
    cfg = shapes.config(args.shape, args.dtype or "float32")
    return Model(llama.decode_layout(shapes.random_params(cfg), cfg), cfg, passes.NoTokenizer())


def measure_precision(model: Model, args: flags.FlagValues) -> list[dict]:
    """Rows of the part `precision`, with the decoders' default trees."""
    if args.prompts is not None:
        if args.model is None:
            raise InputError(f"--prompts={args.prompts}: --shape has no tokenizer; give --model=DIR")
        requests = request_files.read(args.prompts, Request("")).items()
        limit = model.cfg.max_length
        encoded = [encode_prompt(model.tokenizer, request, limit, location) for location, request in requests]
    else:
        encoded = np.random.default_rng(1).integers(0, model.cfg.vocab_size, (args.num_prompts, 32)).tolist()
    names = dict.fromkeys(["autoregressive", *args.decoders])
    return precision.compare(model, {name: drafters.get(name) for name in names}, encoded, args.new_tokens)


def measure(model: Model, args: flags.FlagValues) -> dict:
    """Runs the parts of --parts."""
    widths, lengths = report.parse_integers("--widths", args.widths), report.parse_integers("--lengths", args.lengths)
    batch_sizes = report.parse_integers("--batch_sizes", args.batch_sizes)
    decoders = [(name, args.topology) for name in args.decoders]
    settings = [
        Setting(batch_size, length, passes.capacity(length, args.passes, widths[-1]), args.passes)
        for batch_size, length in itertools.product(batch_sizes, lengths)
    ]
    result = {}
    if "width" in args.parts:
        result["width"] = measure_widths(model, decoders, widths, settings, args.repeats)
    if "capacity" in args.parts:
        extremes = sorted({1, widths[-1]})
        result["capacity"] = measure_capacity(model, decoders[0], extremes, 256, args.repeats, args.passes)
    if "overhead" in args.parts:
        result["overhead"] = measure_overhead(model, decoders, widths, settings[0], args.repeats)
    if "bandwidth" in args.parts:
        copy_bytes = _COPY_BYTES.get(jax.default_backend(), _COPY_BYTES_ON_ACCELERATORS)
        bandwidth = passes.copy_bandwidth(copy_bytes, max(args.repeats, 10))
        result["copy_bytes_per_second"] = bandwidth
        for row in result.get("width", []):
            row["bandwidth_share"] = row["bytes_per_second"] / bandwidth
    if "precision" in args.parts:
        result["precision"] = measure_precision(model, args)
    memory = jax.devices()[0].memory_stats() or {}
    result["peak_memory_bytes"] = memory.get("peak_bytes_in_use")
    return result


def print_tables(result: dict) -> None:
    """Prints a table per part to standard error."""
    for part, columns in _COLUMNS.items():
        report.print_table(part, result.get(part, []), columns)
    if "copy_bytes_per_second" in result:
        print(f"copy bandwidth: {result['copy_bytes_per_second'] / 1e9:.1f} GB/s", file=sys.stderr)


def main() -> None:
    """Checks the flags, measures, and writes the report."""
    args = flags.FLAGS
    for name, values, choices in (("parts", args.parts, PARTS), ("decoders", args.decoders, tuple(passes.SOURCES))):
        unknown = sorted(set(values) - set(choices)) if values else ["''"]
        if unknown:
            raise InputError(f"--{name}: {unknown[0]} is not one of {', '.join(sorted(choices))}")
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
    print_tables(result)
    report.write(result, args.output)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "A training workdir, a Hugging Face directory, or OWNER/NAME.")
    flags.DEFINE_enum("shape", None, list(shapes.SHAPES), "Use random weights of this shape instead of --model.")
    flags.DEFINE_enum("dtype", None, config.DTYPES, "Default: the dtype of --model, or float32 with --shape.")
    flags.DEFINE_list("parts", ["width", "capacity", "overhead", "bandwidth"], f"Any of {', '.join(PARTS)}.")
    flags.DEFINE_list("decoders", ["jacobi", "tr_jacobi"], f"Any of {', '.join(passes.SOURCES)}.")
    flags.DEFINE_enum("topology", "chain", ["chain", "binary"], "Chains, or trees with two children per node.")
    flags.DEFINE_list("widths", ["1", "2", "4", "8", "16", "32", "64"], "Tree widths: nodes, including the root.")
    flags.DEFINE_list("lengths", ["256"], "Committed lengths in tokens.")
    flags.DEFINE_list("batch_sizes", ["1"], "Batch sizes.")
    flags.DEFINE_integer("passes", 32, "Forward passes per timed run.", lower_bound=1)
    flags.DEFINE_integer("repeats", 7, "Timed runs per configuration.", lower_bound=1)
    flags.DEFINE_integer("num_prompts", 8, "Random prompts in the part 'precision'.", lower_bound=1)
    flags.DEFINE_integer("new_tokens", 128, "Tokens generated per prompt in the part 'precision'.", lower_bound=1)
    flags.DEFINE_string("prompts", None, "JSONL file of prompts for the part 'precision', instead of random ones.")
    flags.DEFINE_string("output", "", "JSON file to write; standard output if empty.")
    cli.run(main)
