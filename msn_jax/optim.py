"""Optimizers: AdamW (arXiv 1711.05101) or Muon (arXiv 2502.16982), with linear warm-up, cosine decay and clipping of
gradients by their global norm.
"""

import jax
import jax.numpy as jnp
import optax
from jax import Array
from optax.contrib import MuonDimensionNumbers, muon

from msn_jax.config import OptimConfig

# By name instead of rank: stacked norm scales are [L, D], like matrices.
_NOT_DECAYED = ("scale", "bias")
# Input and output axes of the matmul of a stacked weight [L, ...].
_HEADS_OUT, _HEADS_IN, _PLAIN = (MuonDimensionNumbers(*axes) for axes in (((1,), (2, 3)), ((1, 2), (3,)), ((1,), (2,))))
_MATRICES = {
    "q": _HEADS_OUT,  # [L, D, N, H]
    "k": _HEADS_OUT,
    "v": _HEADS_OUT,
    "o": _HEADS_IN,  # [L, N, H, D]
    "gate": _PLAIN,  # [L, D, F]
    "up": _PLAIN,
    "down": _PLAIN,  # [L, F, D]
}
_MUON_RMS = 0.2  # RMS of an update in units of the learning rate, about AdamW's, so that both work with the same rate


def learning_rate(cfg: OptimConfig, steps: int) -> optax.Schedule:
    """Step index (from 0) -> learning rate: linear warm-up over `warmup_steps`, then cosine decay to `final_fraction`
    of the peak at `steps`. A run shorter than its warm-up ends within it.
    """

    def schedule(step: Array) -> Array:
        step = jnp.asarray(step, jnp.float32)
        warmup = (step + 1) / max(cfg.warmup_steps, 1)
        progress = jnp.clip((step - cfg.warmup_steps) / max(steps - cfg.warmup_steps, 1), 0, 1)
        cosine = cfg.final_fraction + (1 - cfg.final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return cfg.learning_rate * jnp.minimum(warmup, cosine)

    return schedule


def optimizer(cfg: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` steps.

    'adamw' applies weight decay to matrices, not to norms and biases. 'muon' orthogonalizes the update of every matrix
    inside the layers and applies weight decay to it; embeddings, norms and biases use Adam without weight decay.
    """
    rate = learning_rate(cfg, steps)
    if cfg.kind == "adamw":
        update = optax.adamw(rate, b1=cfg.b1, b2=cfg.b2, weight_decay=cfg.weight_decay, mask=decayed)
    else:
        update = muon(
            rate,
            weight_decay=cfg.weight_decay,
            adam_b1=cfg.b1,
            adam_b2=cfg.b2,
            consistent_rms=_MUON_RMS,
            muon_weight_dimension_numbers=_matrix_axes,
        )
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), update)


def decayed(params: dict) -> dict:
    """Mask of the parameters that weight decay applies to."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not _names(path).intersection(_NOT_DECAYED), params)


def _matrix_axes(params: dict) -> dict:
    """The matmul axes of every stacked matrix; None for other parameters."""

    def axes(path: tuple, _: Array) -> MuonDimensionNumbers | None:
        return next((_MATRICES[name] for name in _names(path) if name in _MATRICES), None)

    return jax.tree_util.tree_map_with_path(axes, params)


def _names(path: tuple) -> set[str]:
    return {key.key for key in path if isinstance(key, jax.tree_util.DictKey)}
