"""Cost of noise in a training step: `noise.kind` 'ahead' and 'none' in otherwise identical programs.

    python -m benchmarks.train [--steps=60] [--row_length=256] [--batch_size=16]

Prints one JSON object. `noise_step_ratio` is the ratio of the median step times; it should be at most 1.02. The two
programs alternate step by step in one process, so that other load on the machine affects both equally.
"""

import dataclasses
import functools
import json
import os
import platform
import statistics
import time

import jax
import jaxlib
import numpy as np
from absl import flags

from configs import demo
from msn_jax import cli, metrics, optim, sharding, train
from msn_jax.config import Config, NoiseConfig
from msn_jax.noise import Batch


def random_batch(cfg: Config) -> Batch:
    """Random rows of two samples each; the first half of every sample is prompt, the second half response."""
    shape = (cfg.data.batch_size, cfg.data.row_length)
    half = cfg.data.row_length // 2
    index = np.arange(cfg.data.row_length, dtype=np.int32)
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, shape, np.int32)
    rows = (index % half, 1 + index // half, index % half >= half // 2)
    return Batch(tokens, *(np.broadcast_to(row, shape) for row in rows))


def compiled_step(cfg: Config, state: train.TrainState, batch: Batch) -> tuple[jax.stages.Compiled, float]:
    """The compiled training step and the compile time in seconds. No donation: every call uses the same state."""
    optimizer = optim.optimizer(cfg.optim, cfg.train.steps)
    lowered = jax.jit(functools.partial(train.train_step, cfg=cfg, optimizer=optimizer)).lower(state, batch)
    start = time.perf_counter()
    return lowered.compile(), time.perf_counter() - start


def measure(cfg: Config, steps: int) -> dict:
    """Times the steps of both programs and derives throughput and model FLOPs utilization."""
    mesh = sharding.make_mesh(cfg.mesh)
    batch = train.to_devices(random_batch(cfg), sharding.batch_sharding(mesh, cfg.data.batch_size))
    optimizer = optim.optimizer(cfg.optim, cfg.train.steps)
    state = train.initial_state(cfg, optimizer, train.abstract_state(cfg, optimizer, mesh), mesh)
    programs, compile_seconds, seconds = {}, {}, {"ahead": [], "none": []}
    for kind in seconds:
        noise = NoiseConfig(kind, cfg.noise.segments, cfg.noise.length)
        programs[kind], compile_seconds[kind] = compiled_step(dataclasses.replace(cfg, noise=noise), state, batch)
    for turn in range(-1, steps):
        for kind in ("ahead", "none") if turn % 2 else ("none", "ahead"):
            start = time.perf_counter()
            jax.block_until_ready(programs[kind](state, batch))
            if turn >= 0:  # turn -1 is a warm-up
                seconds[kind].append(time.perf_counter() - start)
    median = {kind: statistics.median(times) for kind, times in seconds.items()}
    tokens = cfg.data.batch_size * cfg.data.row_length
    peak = metrics.peak_flops(jax.devices()[0].device_kind)
    flops = tokens * metrics.flops_per_token(cfg.model, cfg.data.row_length)
    return {
        "noise_step_ratio": median["ahead"] / median["none"],
        "median_step_seconds": median,
        "fastest_step_seconds": {kind: min(times) for kind, times in seconds.items()},
        "compile_seconds": compile_seconds,
        "tokens_per_second": tokens / median["ahead"],
        "mfu": peak and flops / median["ahead"] / (peak * jax.device_count()),
        "steps": steps,
    }


def main() -> None:
    """Configures the demo's model with the paper's noise, measures, and prints the report."""
    cfg = demo.get_config("msn")
    cfg.train.init_from = ""
    cfg.noise = NoiseConfig()  # the paper's noise in the row; the demo appends noise blocks instead
    cfg.data.row_length, cfg.data.batch_size = flags.FLAGS.row_length, flags.FLAGS.batch_size
    result = measure(cfg, flags.FLAGS.steps)
    device = jax.devices()[0]
    result["hardware"] = f"{jax.device_count()} x {device.device_kind}, {os.cpu_count()} cores, {platform.machine()}"
    result["versions"] = {"python": platform.python_version(), "jax": jax.__version__, "jaxlib": jaxlib.__version__}
    result["config"] = {"model": dataclasses.asdict(cfg.model), "noise": dataclasses.asdict(cfg.noise)}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    flags.DEFINE_integer("steps", 60, "Timed steps per program.", lower_bound=1)
    flags.DEFINE_integer("row_length", 256, "Tokens per row.", lower_bound=16)
    flags.DEFINE_integer("batch_size", 16, "Rows per step.", lower_bound=1)
    cli.run(main)
