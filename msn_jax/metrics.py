"""What a training run reports: WORKDIR/metrics.jsonl, TensorBoard events, and a progress bar or plain lines.

A line of metrics.jsonl is `{"step": n, name: number or list of numbers, ...}`, n being the steps done. Numbers that
do not exist (the loss at noise positions of a batch without noise) are null.
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

# Dense bfloat16 products, FLOP/s per device, from the vendors' data sheets. By prefix of jax.Device.device_kind.
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
    """Writes the metrics of one run. Only process 0 writes; on the others every method does nothing."""

    def __init__(self, workdir: Path, start: int, steps: int):
        """Args: workdir; start: steps done before (later lines of an interrupted run are cut off); steps: in all."""
        self._active = jax.process_index() == 0
        if not self._active:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        path = workdir / "metrics.jsonl"
        _cut_back(path, start)
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
        """Records numbers, or lists of them (noise metrics, by offset from 1), at `step`."""
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
    """Tokens per second, share of the peak FLOP/s (MFU) and peak memory, between two calls of `read`."""

    def __init__(self, cfg: LlamaConfig, tokens_per_step: int, row_length: int, start: int):
        """Args: cfg; tokens_per_step; row_length: T; start: steps done before."""
        self._flops_per_token = flops_per_token(cfg, row_length)
        self._tokens_per_step = tokens_per_step
        self.restart(start)

    def restart(self, step: int) -> None:
        """Starts the clock, so that evaluation, saving and compilation are not counted as training."""
        self._step, self._time = step, time.perf_counter()

    def seconds(self) -> float:
        """Since the clock was started."""
        return time.perf_counter() - self._time

    def read(self, step: int) -> dict[str, float]:
        """Averages since the last `read` or `restart`; empty when no step was done. MFU needs a known device."""
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
    """Of one training step, by the convention of PaLM (arXiv 2204.02311, appendix B): 6 for every parameter of a
    matrix product, 12 L N H T for attention; recomputation is not counted.
    """
    attention = cfg.d_model * cfg.head_dim * 2 * (cfg.n_heads + cfg.n_kv_heads)
    mlp = 3 * cfg.d_model * cfg.d_mlp
    matrices = cfg.n_layers * (attention + mlp) + cfg.vocab_size * cfg.d_model
    return 6 * matrices + 12 * cfg.n_layers * cfg.n_heads * cfg.head_dim * row_length


def peak_flops(device_kind: str) -> float | None:
    """bfloat16 FLOP/s of a device, or None for one that is not in the table: then MFU is left out, not invented."""
    for kind in sorted(_PEAK_FLOPS, key=len, reverse=True):
        if device_kind.startswith(kind):
            return _PEAK_FLOPS[kind]
    return None


def final_metrics(workdir: str | Path) -> dict:
    """The last line of a run's metrics.jsonl. A finished run has `eval_clean_loss` and `eval_noise_accuracy` in it."""
    lines = (Path(workdir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(lines[-1])


def _cut_back(path: Path, step: int) -> None:
    """Drops the lines after `step`, and a last line that was cut off by a crash."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    shorter = path.with_suffix(".tmp")
    shorter.write_text("".join(kept), encoding="utf-8")
    shorter.replace(path)


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
