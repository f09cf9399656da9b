"""Random adapters on disk for tests. They change everything, because b is not 0."""

from pathlib import Path

import jax

from msn_jax import adapter
from msn_jax.config import AdapterConfig, LlamaConfig


def save(
    path: Path,
    model: LlamaConfig,
    gate: str = "all",
    first_layer: int = 0,
    scale: float = 0.1,
    token: int | None = None,
) -> Path:
    """Writes an adapter in PEFT's form to `path` and returns it. `scale` is the deviation of b, `token` the noise."""
    cfg = AdapterConfig(rank=4, alpha=8.0, first_layer=first_layer, gate=gate)
    params = {
        name: (a.value, scale * jax.random.normal(jax.random.fold_in(jax.random.key(1), index), b.value.shape))
        for index, (name, (a, b)) in enumerate(adapter.init(jax.random.key(0), model, cfg).items())
    }
    adapter.save(adapter.Adapter(params, cfg, token), path, "base")
    return path
