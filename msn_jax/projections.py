"""Products of a layer's inputs with its weights; axes as in `llama.py`.

A weight has one of two layouts:

    q, k, v, o, gate, up, down    [in..., out...], with axes of heads: in general
    rows_q_k_v, rows_o, ...       [out, in], weights with the same input concatenated: for decoding with a large
                                  float32 model on one CPU; `to_rows` makes them, `cpu.py` gives the reason
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from msn_jax import cpu

# LoRA factors of one layer by the name of their matrix (`adapter.py`), and the tokens at which they are active, bool
# [B or 1, T]; None: all.
LayerAdapter = tuple[dict, Array | None]

# The weights of a layer that multiply the same input, and how many of their leading axes that input has.
_JOINED = {
    "attention": ((("q", "k", "v"), 1), (("o",), 2)),
    "mlp": ((("gate", "up"), 1), (("down",), 1)),
}
INPUT_AXES = {name: count for groups in _JOINED.values() for names, count in groups for name in names}


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight that multiplies the last axis of its input."""

    shape: tuple[int, ...]  # [in..., out...]
    axes: tuple[str, ...]  # logical axes, see `sharding.py`
    num_inputs: int = 1  # leading axes that are inputs
    writes_residual: bool = False  # initialized to zero, so that every block starts as the identity

    def create(self, module: nn.Module, name: str) -> Array:
        """The parameter `name` of the module, in the compute dtype. It is drawn with deviation fan_in ** -0.5."""
        fan_in = math.prod(self.shape[: self.num_inputs])
        initializer = nn.initializers.zeros if self.writes_residual else nn.initializers.normal(fan_in**-0.5)
        return param(module, name, self.shape, self.axes, initializer).astype(module.cfg.dtype)


def param(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...], initializer: Callable) -> Array:
    """The parameter `name` of the module, boxed with its logical axes when it is initialized."""
    initializer = nn.with_logical_partitioning(initializer, axes)
    return module.param(name, initializer, shape, module.cfg.param_dtype)


def multiply_all(
    module: nn.Module, x: Array, weights: dict[str, Weight], adapter: LayerAdapter | None
) -> tuple[Array, ...]:
    """x [B, T, I] times each of the module's weights, plus the adapter's share: [B, T, out...] each."""
    outputs = {name: weight.shape[weight.num_inputs :] for name, weight in weights.items()}
    rows = _rows_name(tuple(weights))
    if module.has_variable("params", rows):
        joined = cpu.multiply_by_rows(x, module.get_variable("params", rows).astype(module.cfg.dtype))
        ends = list(itertools.accumulate(math.prod(shape) for shape in outputs.values()))
        products = jnp.split(joined.astype(x.dtype), ends[:-1], axis=-1)
    else:
        # Flat products, because XLA would transpose a weight with two output axes in every step of the decoding loop.
        flat = (weight.create(module, name).reshape(x.shape[-1], -1) for name, weight in weights.items())
        products = [_multiply(x, weight) for weight in flat]
    shaped = zip(outputs, products, outputs.values(), strict=True)
    return tuple(_adapt(y.reshape(*x.shape[:-1], *shape), x, name, adapter) for name, y, shape in shaped)


def to_rows(layer: dict) -> dict:
    """One layer's parameters with the weights as rows, or the same if they are rows already.

    Outside of a trace, the given weights are deleted once they are joined, so that no two copies of a model exist.
    """
    for module, groups in _JOINED.items():
        weights = dict(layer[module])
        for names, num_inputs in groups:
            if _rows_name(names) in weights:
                continue
            given = [weights.pop(name) for name in names]
            weights[_rows_name(names)] = joined = _join(given, num_inputs)
            if not isinstance(joined, jax.core.Tracer):
                joined.block_until_ready()
                for weight in given:
                    weight.delete()
        layer = layer | {module: weights}
    return layer


def row_slots(layer: dict) -> dict[str, tuple[str, int]]:
    """Where each weight of a layer is among the rows: its path -> (the path of the rows, its first row).

    Args:
      layer: a layer's parameters, or their shapes, with the weights as they are before `to_rows`.
    """
    slots = {}
    for module, groups in _JOINED.items():
        for names, num_inputs in groups:
            start = 0
            for name in names:
                slots[f"{module}/{name}"] = (f"{module}/{_rows_name(names)}", start)
                start += math.prod(layer[module][name].shape[num_inputs:])
    return slots


@functools.partial(jax.jit, static_argnums=1)
def _join(weights: list[Array], num_inputs: int) -> Array:
    flat = (weight.reshape(math.prod(weight.shape[:num_inputs]), -1) for weight in weights)
    return jnp.concatenate([weight.T for weight in flat])


def _rows_name(names: tuple[str, ...]) -> str:
    return "_".join(("rows", *names))


def _multiply(x: Array, weight: Array) -> Array:
    """[B, T, I] by a weight [I, O] -> [B, T, O]."""
    return cpu.matmul(x, weight, "highest" if x.dtype == jnp.float32 else None)


def _adapt(y: Array, x: Array, name: str, adapter: LayerAdapter | None) -> Array:
    """The product y of x [B, T, I] with the matrix `name`, plus x a b at the tokens where the adapter is active."""
    if adapter is None or name not in adapter[0]:
        return y
    (factors, gate) = adapter
    a, b = (factor.astype(x.dtype) for factor in factors[name])
    adapted = y + _multiply(_multiply(x, a), b).reshape(y.shape)
    if gate is None:
        return adapted
    return jnp.where(gate.reshape(*gate.shape, *[1] * (y.ndim - 2)), adapted, y)
