"""Loading a Hugging Face checkpoint onto eight devices: host memory, seconds, GB/s.

    python -m benchmarks.load [--dtype=bfloat16] [--shard_megabytes=500] [--mesh_tensor=8] [--stacked]
    python -m benchmarks.load --directory=DIR     # your own checkpoint, on the available devices

Without --directory, one process writes a random model of 1.1B parameters (the shape of TinyLlama) in shards to a
temporary directory, and a second process loads it onto eight fake CPU devices. Prints one JSON object. The loader
should keep `peak_extra_host_bytes` <= `bound_bytes`, which is 1.3 times the largest file.

The memory of fake devices is host memory. The extra host memory is therefore the peak resident memory of the process
(VmRSS of /proc/self/status, sampled every two milliseconds, pages of mapped files included), minus the resident memory
before loading, minus the bytes of the parameters, which the loader allocates as zeros before it reads any file. The
files are dropped from the page cache before the timed load.
"""

import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxlib
from absl import flags

from msn_jax import cli, hugging_face, llama, sharding
from msn_jax.config import LlamaConfig, MeshConfig

DEVICES = 8


def make_checkpoint(directory: Path, dtype: str, shard_bytes: int) -> None:
    """Writes a random model of 1.1B parameters in the Hugging Face format."""
    cfg = LlamaConfig(
        vocab_size=32_000,
        d_model=2048,
        n_layers=22,
        n_heads=32,
        n_kv_heads=8,
        head_dim=64,
        d_mlp=5632,
        max_length=2048,
        rope_theta=10_000.0,
        rope_scaling="none",
        sliding_window=0,
        norm_eps=1e-5,
        qkv_bias=False,
        qk_norm=False,
        tie_embeddings=False,
        dtype=dtype,
        param_dtype=dtype,
    )
    shapes = nn.meta.unbox(llama.abstract(cfg, True))

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        bits = jax.lax.iota(jnp.uint32, leaf.size) * jnp.uint32(2654435761)  # fast hash; its quality does not matter
        return ((bits >> 8).astype(jnp.float32) * jnp.float32(2**-24) - 0.5).astype(leaf.dtype).reshape(leaf.shape)

    params = jax.jit(lambda: jax.tree.map(draw, shapes))()
    hugging_face.export(params, cfg, directory, max_shard_bytes=shard_bytes)


def resident_bytes() -> int:
    """Resident memory of this process, pages of mapped files included."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


class PeakMemory:
    """Samples `resident_bytes` during a `with` statement and keeps the peak."""

    def __enter__(self) -> "PeakMemory":
        self.before = self.peak = resident_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, resident_bytes())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def measure(directory: Path, mesh: MeshConfig, stacked: bool) -> dict:
    """Loads a checkpoint once and measures it."""
    files = sorted(directory.glob("*.safetensors"))
    for path in files:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    cfg = hugging_face.read_config(directory)
    devices = sharding.make_mesh(mesh)
    rules = sharding.TRAIN_RULES if stacked else sharding.DECODE_RULES
    jax.block_until_ready(jax.jit(lambda: jnp.zeros(8))())  # allocate the compiler's memory before measuring
    with PeakMemory() as memory:
        start = time.perf_counter()
        params = jax.block_until_ready(hugging_face.load_params(directory, cfg, devices, rules, stacked=stacked))
        seconds = time.perf_counter() - start
    shards = [shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards]
    total, largest = sum(path.stat().st_size for path in files), max(path.stat().st_size for path in files)
    extra = memory.peak - memory.before - sum(shards)
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "parameter_bytes_on_devices": sum(shards),
        "files": len(files),
        "largest_file_bytes": largest,
        "peak_extra_host_bytes": extra,
        "bound_bytes": int(1.3 * largest),
        "within_bound": extra <= 1.3 * largest,
        "seconds": seconds,
        "gigabytes_per_second": total / seconds / 1e9,
        "stacked": stacked,
        "mesh": dataclasses.asdict(mesh),
    }


def main() -> None:
    """With --directory, loads and measures it. Without, writes a checkpoint and starts a process that loads it."""
    args = flags.FLAGS
    if args.directory:
        mesh = MeshConfig(data=1, fsdp=-1, tensor=args.mesh_tensor)
        result = measure(Path(args.directory), mesh, args.stacked)
        device = jax.devices()[0]
        result["hardware"] = f"{jax.device_count()} x {device.device_kind}, {os.cpu_count()} cores"
        result["versions"] = {"python": platform.python_version(), "jax": jax.__version__, "jaxlib": jaxlib.__version__}
        print(json.dumps(result, indent=2))
        return
    with tempfile.TemporaryDirectory() as parent:
        directory = Path(parent) / "model"
        make_checkpoint(directory, args.dtype, args.shard_megabytes * 10**6)
        xla_flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
        arguments = [f"--directory={directory}", f"--mesh_tensor={args.mesh_tensor}", f"--stacked={args.stacked}"]
        command = [sys.executable, "-m", "benchmarks.load", *arguments]
        subprocess.run(command, env={**os.environ, "XLA_FLAGS": xla_flags, "JAX_PLATFORMS": "cpu"}, check=True)


if __name__ == "__main__":
    flags.DEFINE_string("directory", "", "A checkpoint to load on the available devices.")
    flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16", "float16"], "Dtype of the generated checkpoint.")
    flags.DEFINE_integer("shard_megabytes", 500, "Size of its shards.", lower_bound=1)
    flags.DEFINE_integer("mesh_tensor", 8, "Size of mesh axis 'tensor'; 'fsdp' takes the rest.", lower_bound=1)
    flags.DEFINE_bool("stacked", False, "Use the layout and sharding rules of training, not of decoding.")
    cli.run(main)
