"""Compiles a training step or the decoding loop for TPUs or GPUs that are not there, with their real compilers.

    python -m benchmarks.compile --config=configs/llama3_8b.py:msn --topology=v5e:8x8
    python -m benchmarks.compile --config=configs/llama3_8b.py:msn --topology=h100:8
    python -m benchmarks.compile --config=configs/llama3_8b.py:msn --topology=v5e:2x4 --decode --widths=1,64

Reports, for every program: memory per device against the device's own, collectives with the bytes that they move in
one step, and seconds of compilation. Exits with code 2 if a program needs more than --share of the memory. No
weights and no data are read. Needs `pip install -e '.[tpu-compile]'` or '.[gpu-compile]'. Writes JSON to standard
output or --output, and a table to standard error.
"""

import collections
import dataclasses
import itertools
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu compiles; it must not look for a TPU
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
from absl import flags
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from ml_collections import config_flags

from benchmarks import passes, report
from msn_jax import cache as caches
from msn_jax import checkpoint, cli, config, llama, metrics, optim, sharding, target, train
from msn_jax.cli import InputError
from msn_jax.config import Config, LlamaConfig, MeshConfig
from msn_jax.decode import loop
from msn_jax.decode.drafters import Drafter
from msn_jax.decode.loop import DecodeState
from msn_jax.decode.request import Request, make_sampler
from msn_jax.noise import Batch

# Memory per device in GiB, from the data sheets, by the part of a topology's name before the colon.
_HBM_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "h100": 79}
# What XLA's GPU compiler must know of a device, from NVIDIA's data sheet of the H100 SXM.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_CHUNK = 512  # prompt tokens per forward pass
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "ragged-all-to-all")
_CALLED = re.compile(r"(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.-]+)")
_ITEM_BYTES = {"pred": 1, "c64": 8, "c128": 16, "token": 0}  # others have their bits in their name


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler says about one program; bytes are those of one device."""

    name: str
    argument_bytes: int
    output_bytes: int
    donated_bytes: int  # of the outputs: they take the place of arguments
    temporary_bytes: int
    code_bytes: int
    collectives: dict[str, dict[str, int]]  # kind -> executions in one call, and the bytes of their results
    flops: float | None  # a loop counts once, like in `bytes_accessed`; None if the compiler does not say
    bytes_accessed: float | None
    compile_seconds: float

    @property
    def total_bytes(self) -> int:
        """The most memory that the program needs at a time."""
        own = self.output_bytes - self.donated_bytes
        return self.argument_bytes + own + self.temporary_bytes + self.code_bytes


def compile_program(name: str, lowered: jax.stages.Lowered, hlo: Path | None = None) -> Program:
    """Compiles a program and describes it; writes the compiled module into the directory `hlo`, if it is given."""
    began = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - began
    text = compiled.as_text()
    if hlo is not None:
        (hlo / f"{name.replace(', ', '_').replace(' ', '_')}.txt").write_text(text, encoding="utf-8")
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}  # none for a GPU
    return Program(
        name=name,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        donated_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        collectives=count_collectives(text),
        flops=cost.get("flops"),
        bytes_accessed=cost.get("bytes accessed"),
        compile_seconds=seconds,
    )


def count_collectives(hlo: str) -> dict[str, dict[str, int]]:
    """The collectives of a compiled module: how often one call executes them, and the bytes of their results.

    A loop that ends when a counter reaches a constant executes its body that often, any other loop once.
    """
    bodies: dict[str, list[str]] = {}
    entry = current = ""
    for line in hlo.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$", line):
            current = header[2]
            entry = current if header[1] else entry
            bodies[current] = []
        elif current:
            bodies[current].append(line)
    counts: dict[str, collections.Counter] = {}
    for line, times in _executed(bodies, entry, 1):
        # An asynchronous one also returns its operands when it starts, but only its results when it is done.
        kind = re.search(r" = (.*?) (" + "|".join(_COLLECTIVES) + r")(-done)?\(", line)
        if kind:
            moved = sum(_array_bytes(kind[1]))
            counts.setdefault(kind[2], collections.Counter()).update(count=times, bytes=times * moved)
    return {kind: dict(counter) for kind, counter in counts.items()}


def _executed(bodies: dict[str, list[str]], name: str, times: int) -> Iterator[tuple[str, int]]:
    """The instructions of a computation and of those that it calls, and how often they are executed.

    A TPU overlaps a collective with computations in several fusions, which all show it: the one that starts it counts.
    """
    for line in bodies.get(name, ()):
        yield line, times
        iterations = _iterations(line, bodies)
        branches = re.search(r"branch_computations=\{([^}]*)\}", line)
        named = [name.strip().lstrip("%") for name in branches[1].split(",")] if branches else []
        for called in [*_CALLED.findall(line), *named]:
            is_later_part = called.startswith("async_collective_fusion") or any(
                "AsyncCollectiveDone" in instruction for instruction in bodies.get(called, ())
            )
            if not is_later_part:
                yield from _executed(bodies, called, times * iterations)


def _iterations(line: str, bodies: dict[str, list[str]]) -> int:
    """How often a loop runs: as the compiler says, or the constant that its counter is compared with; else 1."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", line)
    text = "\n".join(bodies.get(condition[1], ())) if condition else ""
    limits = re.findall(r" constant\((\d+)\)", text)
    return int(limits[0]) if len(limits) == 1 and "direction=LT" in text else 1


def _array_bytes(text: str) -> list[int]:
    """The bytes of every array in the type of an instruction."""
    found = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", text)
    return [_item_bytes(kind) * math.prod(map(int, filter(None, sizes.split(",")))) for kind, sizes in found]


def _item_bytes(kind: str) -> int:
    """Of a type such as bf16, s32 or f8e4m3fn; four bits count as a byte."""
    return _ITEM_BYTES[kind] if kind in _ITEM_BYTES else max(int(re.search(r"\d+", kind)[0]) // 8, 1)


def train_program(cfg: Config, devices: list) -> tuple[str, jax.stages.Lowered]:
    """The training step of a config on these devices, with its name."""
    mesh = sharding.make_mesh(cfg.mesh, devices)
    optimizer = optim.optimizer(cfg.optim, cfg.train.steps)
    state = train.abstract_state(cfg, optimizer, mesh)
    frozen = None
    if cfg.adapter.rank:
        frozen = checkpoint.abstract(llama.abstract(cfg.model, True), mesh, sharding.TRAIN_RULES)
    step, _ = train.jit_steps(cfg, optimizer, mesh, state, frozen)
    return "train step", step.lower(state, abstract_batch(cfg, mesh), frozen)


def decode_programs(
    cfg: LlamaConfig, devices: list, widths: Sequence[int], batch_sizes: Sequence[int], capacity: int
) -> Iterator[tuple[str, jax.stages.Lowered]]:
    """The decoding loop with weights sharded over all devices by heads, for trees of these numbers of nodes."""
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=1, tensor=len(devices)), devices, "--topology")
    cfg = dataclasses.replace(cfg, param_dtype=cfg.dtype)
    params = checkpoint.abstract(llama.abstract(cfg, False), mesh, sharding.DECODE_RULES)
    for batch_size, width in itertools.product(batch_sizes, widths):
        drafter = passes.drafter("tr_jacobi", "binary", width)
        state = abstract_decode_state(params, cfg, drafter, mesh, batch_size, capacity)
        stop_ids, limit = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2,), ()))
        lowered = loop.decode.lower(params, cfg, drafter, stop_ids, state, limit, None, mesh)
        yield f"decode, width {width}, batch {batch_size}", lowered


def abstract_decode_state(
    params: dict, cfg: LlamaConfig, drafter: Drafter, mesh: Mesh, batch_size: int, capacity: int
) -> DecodeState:
    """Shapes and shardings of the loop's state: rows sharded like a batch, the cache also by heads."""
    tokens, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch_size, capacity), (batch_size,)))
    sampler = jax.eval_shape(lambda: make_sampler([Request("")] * batch_size))

    def prefill(*arguments: object) -> DecodeState:
        return loop.prefill(arguments[0], cfg, drafter, *arguments[1:], min(_CHUNK, capacity))

    state = jax.eval_shape(prefill, params, tokens, lengths, lengths, sampler)

    def placed(tree: object, axes: Sequence[str]) -> object:
        spec = NamedSharding(mesh, sharding.partition_spec(axes, sharding.DECODE_RULES))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=spec), tree)

    cache = placed(state.cache.layers, caches.AXES)
    rest = placed(state, ("batch",))
    return rest.replace(cache=rest.cache.replace(layers=cache))


def abstract_batch(cfg: Config, mesh: Mesh) -> Batch:
    """The shapes of a batch, sharded over the mesh."""
    shape, rows = (cfg.data.batch_size, cfg.data.row_length), sharding.batch_sharding(mesh, cfg.data.batch_size)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    return Batch(ids, ids, ids, jax.ShapeDtypeStruct(shape, bool, sharding=rows))


def describe_devices(topology: str) -> list:
    """The devices of a topology such as 'v5e:8x8' or 'h100:8'. InputError if there is none, or no compiler."""
    kind, _, grid = topology.partition(":")
    if kind not in _HBM_GIB or not grid:
        raise InputError(f"--topology={topology}: must be one of {', '.join(_HBM_GIB)}, a colon and a grid")
    platform, name, options = "tpu", topology, {}
    if platform_of(topology) == "gpu":  # one host
        platform, name, options = "cuda", kind, {"topology": f"1x1x{grid}", "target_config": _H100}
    try:
        return topologies.get_topology_desc(platform=platform, topology_name=name, **options).devices
    except Exception as error:  # the plugins raise plain RuntimeErrors of many kinds
        reason = str(error).splitlines()[0]
        raise InputError(f"--topology={topology}: no such topology, or no compiler ({reason}): see --help") from error


def platform_of(topology: str) -> str:
    """'gpu' or 'tpu'."""
    return "gpu" if topology.startswith("h100") else "tpu"


def main() -> None:
    """Compiles and reports."""
    args = flags.FLAGS
    cfg = cli.read_config(Config, "configs/")
    config.check(cfg)
    if args.capacity % min(_CHUNK, args.capacity):
        raise InputError(f"--capacity={args.capacity}: must be a multiple of {_CHUNK}, or smaller")
    devices = describe_devices(args.topology)
    target.compile_for(platform_of(args.topology))
    if args.decode:
        widths = report.parse_integers("--widths", args.widths)
        batch_sizes = report.parse_integers("--batch_sizes", args.batch_sizes)
        lowered = decode_programs(cfg.model, devices, widths, batch_sizes, args.capacity)
    else:
        lowered = [train_program(cfg, devices)]
    hlo = None if args.hlo is None else cli.make_directory(args.hlo, "--hlo")
    programs = [compile_program(*one, hlo) for one in lowered]
    hbm = _HBM_GIB[args.topology.split(":")[0]] * 2**30
    rows = [
        {
            "program": program.name,
            "GiB": program.total_bytes / 2**30,
            "share of HBM": program.total_bytes / hbm,
            "arguments": program.argument_bytes / 2**30,
            "temporary": program.temporary_bytes / 2**30,
            "collectives": ", ".join(
                f"{one['count']} {kind} {one['bytes'] / 2**30:.3g} GiB" for kind, one in program.collectives.items()
            ),
            "compile s": program.compile_seconds,
        }
        for program in programs
    ]
    report.print_table(f"{args.topology}, {len(devices)} devices", rows, list(rows[0]))
    tokens = cfg.data.batch_size * cfg.data.row_length
    result = {
        **report.environment(),
        "topology": args.topology,
        "devices": len(devices),
        "hbm_bytes": hbm,
        "model_flops": None if args.decode else tokens * metrics.flops_per_token(cfg.model, cfg.data.row_length),
        "programs": [dataclasses.asdict(program) | {"total_bytes": program.total_bytes} for program in programs],
    }
    report.write(result, args.output)
    for program in programs:
        if program.total_bytes > args.share * hbm:
            raise InputError(
                f"{program.name} needs {program.total_bytes / 2**30:.1f} GiB per device, more than {args.share:.0%} of "
                f"the {hbm / 2**30:.0f} GiB of {args.topology}: use more devices, a smaller batch, or shorter rows"
            )


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "A file of configs/, with a colon and its experiment.")
    flags.DEFINE_string("topology", None, "Devices, such as v5e:8x8, v5p:2x2x4 or h100:8.", required=True)
    flags.DEFINE_bool("decode", False, "Compile the decoding loop instead of the training step.")
    flags.DEFINE_list("widths", ["1", "64", "256"], "With --decode: nodes of the token tree.")
    flags.DEFINE_list("batch_sizes", ["1", "16"], "With --decode: batch sizes.")
    flags.DEFINE_integer("capacity", 4096, "With --decode: slots of the cache.", lower_bound=1)
    flags.DEFINE_string("hlo", None, "A directory for the compiled modules as text.")
    flags.DEFINE_float("share", 0.9, "Largest share of the HBM that a program may need.", lower_bound=0.0)
    flags.DEFINE_string("output", "", "JSON file to write; standard output if empty.")
    cli.run(main)
