"""The optimizer: AdamW (arXiv 1711.05101) with linear warm-up, cosine decay and clipping by the global norm."""

import jax
import jax.numpy as jnp
import optax
from jax import Array

from msn_jax.config import OptimConfig

# By name and not by rank: the norms of a scanned stack are [L, D] and would pass for matrices.
_NOT_DECAYED = ("scale", "bias")


def learning_rate(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Step index (from 0) -> learning rate: up linearly over `warmup_steps`, then down by a cosine to
    `final_fraction` of the peak at `steps`. A run shorter than its warm-up ends inside it.
    """

    def schedule(step: Array) -> Array:
        step = jnp.asarray(step, jnp.float32)
        warmup = (step + 1) / max(cfg.warmup_steps, 1)
        progress = jnp.clip((step - cfg.warmup_steps) / max(steps - cfg.warmup_steps, 1), 0, 1)
        cosine = cfg.final_fraction + (1 - cfg.final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return cfg.learning_rate * jnp.minimum(warmup, cosine)

    return schedule


def adamw(cfg: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` steps. Matrices are decayed, norms and biases are not."""
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm),
        optax.adamw(learning_rate(cfg, steps), b1=cfg.b1, b2=cfg.b2, weight_decay=cfg.weight_decay, mask=decayed),
    )


def decayed(params: dict) -> dict:
    """True at every parameter that weight decay applies to."""

    def by_name(path: tuple, _: Array) -> bool:
        return not any(isinstance(key, jax.tree_util.DictKey) and key.key in _NOT_DECAYED for key in path)

    return jax.tree_util.tree_map_with_path(by_name, params)
