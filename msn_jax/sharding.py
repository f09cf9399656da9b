"""The device mesh, and the rules from logical axes to mesh axes for training and decoding.

`llama.py` names the logical axes of every parameter and is independent of devices. This module maps the names to mesh
axes. The compiler inserts the collectives (GSPMD), so the same program runs on one device and on a pod.

    mesh axis   batch        parameters
    data        sharded      replicated
    fsdp        sharded      sharded, gathered layer by layer (ZeRO, arXiv 1910.02054)
    tensor      replicated   sharded by heads, mlp and vocabulary (Megatron, arXiv 1909.08053)
"""

import math
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from msn_jax.cli import InputError
from msn_jax.config import MeshConfig

AXES = ("data", "fsdp", "tensor")

Rules = Mapping[str, str | tuple[str, ...] | None]  # logical axis -> mesh axes; None: replicated

TRAIN_RULES: Rules = {
    "batch": ("data", "fsdp"),
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "norm": None,
    "layers": None,
    "adapter": None,  # inputs, outputs and rank of LoRA factors: small enough to replicate
}

# A decoding step reads every weight for a few tokens, so gathering weights over 'fsdp' would take longer than the step
# itself: they are sharded over 'tensor' only.
DECODE_RULES: Rules = {**TRAIN_RULES, "embed": None, "slots": None}


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None, name: str = "config.mesh") -> Mesh:
    """A mesh over `devices`, by default all of them. Messages refer to it as `name`.

    Raises:
      InputError: the product of the axis sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    axes = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if any(size == 0 or size < -1 for size in sizes) or sizes.count(-1) > 1:
        raise InputError(f"{name}: {axes}: sizes must be positive; one may be -1, for the remaining devices")
    known = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // known if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise InputError(f"{name}: {axes} does not fit {len(devices)} devices: the product must be their number")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def one_device_mesh() -> Mesh:
    """The mesh of everything that is not sharded: the default device."""
    return make_mesh(MeshConfig(), jax.devices()[:1])


def shardings(boxed: object, mesh: Mesh, rules: Rules) -> object:
    """Shardings for a tree whose parameters are boxed with their logical axes.

    Args:
      boxed: `jax.eval_shape` of `llama.init`, or of a tree made from it (optax states keep the boxes). A leaf without
        a box, such as a step counter, is replicated.
      mesh: from `make_mesh`.
      rules: `TRAIN_RULES` or `DECODE_RULES`.

    Returns:
      The unboxed tree with a `NamedSharding` for every leaf.

    Raises:
      InputError: a parameter's dimension is not divisible by the size of its mesh axes.
      KeyError: a logical axis has no rule.
    """

    def leaf_sharding(path: tuple, leaf: object) -> NamedSharding:
        if not isinstance(leaf, nn.Partitioned):
            return NamedSharding(mesh, PartitionSpec())
        if not jax.tree.leaves(leaf.value):
            return leaf.value  # an empty box: optax masks parameters that another optimizer updates
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = partition_spec(leaf.names, rules)
        for axis, size, mesh_axes in zip(leaf.names, leaf.value.shape, spec, strict=True):
            parts = _parts(mesh, mesh_axes)
            if size % parts:
                raise InputError(
                    f"config.mesh: parameter {name}: axis {axis!r} of size {size} cannot be split into {parts} "
                    f"({mesh_axes!r}); choose a mesh size that divides it"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(leaf_sharding, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def partition_spec(axes: Sequence[str], rules: Rules) -> PartitionSpec:
    """The partition of an array with these logical axes. KeyError if one has no rule."""
    for axis in axes:
        if axis not in rules:
            raise KeyError(f"logical axis {axis!r} has no sharding rule; known axes: {', '.join(rules)}")
    return PartitionSpec(*(rules[axis] for axis in axes))


def batch_sharding(mesh: Mesh, batch_size: int) -> NamedSharding:
    """Sharding of arrays [B, ...] along the batch.

    Raises:
      InputError: `batch_size` rows cannot be distributed evenly.
    """
    parts = batch_parts(mesh)
    if batch_size % parts:
        raise InputError(
            f"config.data.batch_size={batch_size} is not divisible by the {parts} devices of the mesh axes "
            f"{TRAIN_RULES['batch']}"
        )
    return NamedSharding(mesh, partition_spec(("batch",), TRAIN_RULES))


def batch_parts(mesh: Mesh) -> int:
    """Number of shards of a batch."""
    return _parts(mesh, TRAIN_RULES["batch"])


def constrain(array: jax.Array, axes: Sequence[str], mesh: Mesh, rules: Rules) -> jax.Array:
    """Constrains the sharding of an array inside jit, by its logical axes."""
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, partition_spec(axes, rules)))


def _parts(mesh: Mesh, mesh_axes: str | tuple[str, ...] | None) -> int:
    names = () if mesh_axes is None else (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes
    return math.prod(mesh.shape[name] for name in names)
