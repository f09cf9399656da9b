"""Reports of a training run: WORKDIR/metrics.jsonl, TensorBoard events, and a progress bar or plain lines.

A line of metrics.jsonl is `{"step": n, name: number or list of numbers, ...}`, where n counts completed steps.
Undefined numbers (such as the loss at noise positions of a batch without noise) are null.
"""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import tensorboardX
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from msn_jax.config import LlamaConfig

# Peak FLOP/s per device for dense bfloat16 matmuls, from the vendors' data sheets, by prefix of `Device.device_kind`.
_PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}

_SHOWN = ("loss", "clean_loss", "eval_clean_loss", "noise_accuracy", "eval_noise_accuracy", "tokens_per_second", "mfu")


class Writer:
    """Writes the metrics of one run. Only process 0 writes; on other processes all methods do nothing."""

    def __init__(self, workdir: Path, start: int, steps: int):
        """Opens the files of a run.

        Args:
          workdir: directory of the run.
          start: steps completed so far; later lines, of an interrupted run, are removed.
          steps: total number of steps.
        """
        self._active = jax.process_index() == 0
        if not self._active:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        _truncate(path, start)
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)
        self._bar = None
        if sys.stdout.isatty():
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns)
            self._task = self._bar.add_task("", total=steps, completed=start)
            self._bar.start()

    def advance(self, step: int) -> None:
        """Moves the progress bar."""
        if self._active and self._bar is not None:
            self._bar.update(self._task, completed=step)

    def write(self, step: int, metrics: Mapping[str, float | list[float]]) -> None:
        """Records numbers, or lists of numbers (noise metrics by offset, from 1), at `step`."""
        if not self._active:
            return
        metrics = {name: _finite(np.asarray(value).tolist()) for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in _scalars(metrics).items():
            self._tensorboard.add_scalar(name, value, step)
        line = " ".join(f"{name} {_short(metrics[name])}" for name in _SHOWN if name in metrics)
        if self._bar is None:
            print(f"step {step}: {line}", flush=True)
        else:
            self._bar.update(self._task, completed=step, description=line)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        if not self._active:
            return
        if self._bar is not None:
            self._bar.stop()
        self._file.close()
        self._tensorboard.close()


class Meter:
    """Measures tokens per second, model FLOP/s utilization (MFU) and peak memory between two calls of `read`."""

    def __init__(self, cfg: LlamaConfig, tokens_per_step: int, row_length: int, start: int):
        """Starts the clock.

        Args:
          cfg: the model.
          tokens_per_step: tokens of all rows of a batch.
          row_length: T.
          start: steps completed so far.
        """
        self._flops_per_token = flops_per_token(cfg, row_length)
        self._tokens_per_step = tokens_per_step
        self.restart(start)

    def restart(self, step: int) -> None:
        """Restarts the clock, so that evaluation, saving and compilation do not count as training time."""
        self._step, self._time = step, time.perf_counter()

    def seconds(self) -> float:
        """Seconds since the clock was started."""
        return time.perf_counter() - self._time

    def read(self, step: int) -> dict[str, float]:
        """Averages since the last `read` or `restart`; empty if no step was completed. MFU needs a known device."""
        steps, seconds = step - self._step, self.seconds()
        self.restart(step)
        if steps == 0:
            return {}
        rate = steps * self._tokens_per_step / seconds
        result = {"tokens_per_second": rate}
        peak = peak_flops(jax.devices()[0].device_kind)
        if peak is not None:
            result["mfu"] = rate * self._flops_per_token / (peak * jax.device_count())
        memory = jax.local_devices()[0].memory_stats()
        if memory is not None and "peak_bytes_in_use" in memory:
            result["peak_memory_gib"] = memory["peak_bytes_in_use"] / 2**30
        return result


def flops_per_token(cfg: LlamaConfig, row_length: int) -> float:
    """Training FLOPs per token by the convention of PaLM (arXiv 2204.02311, appendix B): 6 per parameter of a matmul
    and 12 L N H T for attention. Recomputation is not counted.
    """
    attention = cfg.d_model * cfg.head_dim * 2 * (cfg.n_heads + cfg.n_kv_heads)
    mlp = 3 * cfg.d_model * cfg.d_mlp
    matrices = cfg.n_layers * (attention + mlp) + cfg.vocab_size * cfg.d_model
    return 6 * matrices + 12 * cfg.n_layers * cfg.n_heads * cfg.head_dim * row_length


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device, or None for an unknown device, for which MFU is not reported."""
    for kind in sorted(_PEAK_FLOPS, key=len, reverse=True):
        if device_kind.startswith(kind):
            return _PEAK_FLOPS[kind]
    return None


def final_metrics(workdir: str | Path) -> dict:
    """The last line of a run's metrics.jsonl; in a finished run it has `eval_clean_loss` and `eval_noise_accuracy`."""
    lines = (Path(workdir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(lines[-1])


def _truncate(path: Path, step: int) -> None:
    """Drops the lines after `step`, and an incomplete last line left by a crash."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)


def _finite(value: float | list) -> float | list | None:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if math.isfinite(value) else None


def _scalars(metrics: Mapping[str, float | list | None]) -> dict[str, float]:
    scalars = {}
    for name, value in metrics.items():
        items = {f"{name}/{i}": item for i, item in enumerate(value, 1)} if isinstance(value, list) else {name: value}
        scalars |= {key: item for key, item in items.items() if item is not None}
    return scalars


def _short(value: float | list | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return "[" + " ".join(_short(item) for item in value) + "]"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3f}"
