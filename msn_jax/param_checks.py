"""Checks of parameters: a fingerprint that any flipped bit changes, and values that are not finite."""

from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array

from msn_jax.cli import InputError


def fingerprint(tree: object) -> int:
    """Sum of all leaves' bit patterns as unsigned words, modulo 2**32: independent of the mesh, changed by any flip."""
    return int(_sum_of_bits(tree))


@jax.jit
def _sum_of_bits(tree: object) -> Array:
    total = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(tree):
        words = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
        total += jnp.sum(words.astype(jnp.uint32), dtype=jnp.uint32)
    return total


def check_finite(params: dict, where: str | Path, is_cast: bool = False) -> None:
    """Refuses parameters with values that are NaN or infinite. Reads each leaf once, on its devices; one host sync.

    Args:
      params: on any mesh.
      where: their directory, for the message.
      is_cast: whether they were finite before a cast to their dtype, which is then what the message is about.

    Raises:
      InputError: names the first such parameter.
    """
    for path, is_finite in jax.tree_util.tree_leaves_with_path(jax.device_get(_finite_leaves(params))):
        if not is_finite:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            remedy = ": remove this checkpoint to use the one before it, or choose another model"
            if is_cast:
                remedy = f" as {jax.tree.leaves(params)[0].dtype}: choose a dtype with a larger range"
            raise InputError(f"{where}: parameter {name!r} has values that are NaN or infinite{remedy}")


@jax.jit
def _finite_leaves(tree: dict) -> dict:
    return jax.tree.map(lambda leaf: jnp.all(jnp.isfinite(leaf)), tree)
