"""Tensors of a file -> parameters on a mesh, for every format.

A tensor is streamed: a piece of at most `PIECE_BYTES` is read, each device receives its part, checks that it is finite
and writes it into the preallocated parameters. The host holds one piece at a time, regardless of the size of the model,
of a file or of a tensor. Weights that become rows (`projections.py`, on a CPU alone) are put together on the host.

A *tensor* belongs to a file and has the layout of Hugging Face; a *parameter* (or leaf) belongs to our Flax tree.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from msn_jax import llama, projections, sharding
from msn_jax.cli import InputError
from msn_jax.config import LlamaConfig
from msn_jax.hugging_face.names import input_axes

PIECE_BYTES = 64 * 2**20


class Values(Protocol):
    """The values of a tensor, [out, in] or [size], read on access: a NumPy array, or what can be sliced like one."""

    shape: tuple[int, ...]
    itemsize: int

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray: ...


class Source(Protocol):
    """A tensor of an opened file."""

    values: Values

    def release(self) -> None:
        """Drops the pages that were read."""


class Target:
    """The parameters that a model's tensors are written into."""

    def __init__(self, cfg: LlamaConfig, mesh: Mesh | None, rules: sharding.Rules, stacked: bool, rows: bool = False):
        """Shapes and shardings alone; nothing is allocated.

        Args:
          cfg: the model; the parameters have its `param_dtype`.
          mesh: devices that the parameters are sharded over; None is the default device.
          rules: sharding rules, see `sharding.py`. Every process of a pod reads only the parts of its own devices.
          stacked: whether to use the training layout, with all layers of a weight in one array, or the decoding layout.
          rows: whether the weights of the layers become rows (`projections.py`); for the decoding layout on one device.
        """
        mesh = sharding.one_device_mesh() if mesh is None else mesh
        boxed = llama.abstract(cfg, stacked)
        self._cfg, self._stacked = cfg, stacked
        self._shardings = flatten_dict(sharding.shardings(boxed, mesh, rules), sep="/")
        self._abstract = flatten_dict(nn.meta.unbox(boxed), sep="/")
        self._rows: dict[str, jax.ShapeDtypeStruct] = {}
        self._row_slots: dict[str, tuple[str, int]] = {}  # parameter -> rows, and its first one
        if rows:
            layers, one = [f"layer_{i}" for i in range(cfg.n_layers)], nn.meta.unbox(boxed["layer_0"])
            slots, joined = projections.row_slots(one), flatten_dict(jax.eval_shape(projections.to_rows, one), sep="/")
            for layer in layers:
                self._row_slots |= {f"{layer}/{name}": (f"{layer}/{to}", start) for name, (to, start) in slots.items()}
                self._rows |= {f"{layer}/{name}": joined[name] for name, _ in slots.values()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter by its name in the decoding layout."""
        shapes = {}
        for name, leaf in self._abstract.items():
            if name.startswith("layers/"):
                layers = range(self._cfg.n_layers)
                shapes |= {name.replace("layers/", f"layer_{i}/", 1): leaf.shape[1:] for i in layers}
            else:
                shapes[name] = leaf.shape
        return shapes

    def write(self, sources: Mapping[str, Source], not_finite: Callable[[str], InputError]) -> dict:
        """The parameters with the values of the tensors.

        Args:
          sources: the tensor of every parameter, by the parameter's name in the decoding layout.
          not_finite: the error for the tensor of the parameter with this name.

        Raises:
          InputError: a value is NaN or infinite in the parameters' dtype.
        """
        leaves = {name: leaf for name, leaf in self._abstract.items() if name not in self._row_slots}

        def zeros() -> dict:
            return {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}

        params = jax.jit(zeros, out_shardings={name: self._shardings[name] for name in leaves})()
        rows = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in self._rows.items()}
        for name, source in sources.items():
            if name in self._row_slots:
                leaf_name, start = self._row_slots[name]
                is_finite = _write_rows(source.values, rows[leaf_name][start : start + source.values.shape[0]])
            else:
                leaf_name, layer = _leaf_of(name, self._stacked)
                params[leaf_name], is_finite = _write_tensor(source.values, leaf_name, params[leaf_name], layer)
            source.release()
            if not is_finite:
                raise not_finite(name)
        while rows:
            name, values = rows.popitem()
            params[name] = jax.device_put(values)
        return unflatten_dict(params, sep="/")


def _write_rows(tensor: Values, rows: np.ndarray) -> bool:
    """Writes a tensor [out, in] into rows on the host, piece by piece; returns whether they are finite.

    NumPy, because a compiled program for each shape would take longer to load than the weights of a small model.
    """
    count, columns = tensor.shape
    step = max(1, PIECE_BYTES // (columns * tensor.itemsize))
    for start in range(0, count, step):
        piece = rows[start : start + step]
        with np.errstate(all="ignore"):  # values that are not finite are reported with the tensor's name
            piece[:] = tensor[slice(start, start + step), slice(0, columns)]
            total = piece.sum()
        if not np.isfinite(total) and not np.isfinite(piece).all():  # the sum is faster, but may overflow
            return False
    return True


def _leaf_of(name: str, stacked: bool) -> tuple[str, int]:
    """Name in the decoding layout -> (name in this layout, layer index of a stacked leaf)."""
    match = re.fullmatch(r"layer_(\d+)/(.*)", name)
    return (f"layers/{match[2]}", int(match[1])) if match and stacked else (name, 0)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The layouts of a parameter in our tree and in a file."""

    inputs: int  # leading axes of the parameter that are the tensor's columns; 0: not transposed
    stacked: bool  # the parameter has a leading axis of layers
    leaf: NamedSharding
    tensor: NamedSharding  # the same partition, expressed in the tensor's axes


def _layout(name: str, leaf: NamedSharding, rank: int) -> _Layout:
    inputs, stacked = input_axes(name), name.startswith("layers/")
    spec = (*leaf.spec, *[None] * (rank - len(leaf.spec)))[stacked:]
    tensor = (spec[inputs], spec[0]) if inputs else spec[:1] if name.endswith("bias") else spec
    if sorted(map(str, filter(None, tensor))) != sorted(map(str, filter(None, leaf.spec))):
        raise ValueError(f"{name}: {leaf.spec} splits layers or head dimensions, which must stay whole")
    return _Layout(inputs, stacked, leaf, NamedSharding(leaf.mesh, PartitionSpec(*tensor)))


def _write_tensor(tensor: Values, name: str, leaf: Array, layer: int) -> tuple[Array, bool]:
    """Writes a tensor into a parameter, piece by piece.

    A piece is the same range of rows of every device's part of the tensor, in whole heads. The last piece overlaps the
    one before it where needed to have the same size, so that one compiled program writes all of them.

    Args:
      tensor: its values.
      name: of the leaf.
      leaf: the parameter, donated.
      layer: index into a stacked leaf, otherwise 0.

    Returns:
      The leaf, and whether all values are finite in its dtype.
    """
    layout = _layout(name, leaf.sharding, leaf.ndim)
    rows, *columns = tensor.shape
    heads = leaf.shape[layout.stacked + layout.inputs]  # or single rows, where the parameter has no axis of heads
    height = rows // heads
    parts = rows // layout.tensor.shard_shape((rows, *columns))[0]
    bytes_per_head = parts * height * math.prod(columns) * tensor.itemsize
    step = min(heads // parts, max(1, PIECE_BYTES // bytes_per_head))
    all_finite = True
    for next_head in range(0, heads // parts, step):
        start = min(next_head, heads // parts - step)
        piece = _read(tensor, layout.tensor, parts, start * height, step * height)
        leaf, is_finite = _write(leaf, piece, layer, start, layout)
        # Waits for the device, because the pieces of a fast disk would queue up on the host.
        all_finite &= bool(is_finite)
    return leaf, all_finite


def _read(tensor: Values, target: NamedSharding, parts: int, start: int, count: int) -> Array:
    """Rows [start, start + count) of each of the `parts` of a tensor, concatenated, each on its own devices."""
    rows, *columns = tensor.shape

    def read_shard(index: tuple[slice, ...]) -> np.ndarray:
        part = (index[0].start or 0) // count
        first = part * (rows // parts) + start
        return tensor[(slice(first, first + count), *index[1:])]

    return jax.make_array_from_callback((parts * count, *columns), target, read_shard)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=4)
def _write(leaf: Array, piece: Array, layer: int, start: int, layout: _Layout) -> tuple[Array, Array]:
    """Writes a piece of a tensor into a leaf, at head `start` of every device's part; and whether it is finite there.

    The check is part of the copy: the piece is on the device anyway, so that loading reads no value twice.
    """
    inputs, stacked = layout.inputs, layout.stacked

    def write(leaf: Array, piece: Array, layer: Array, start: Array) -> Array:
        shape = leaf.shape[stacked:]
        piece = piece.reshape(-1, *shape[inputs + 1 :], *shape[:inputs])
        piece = piece.transpose(*range(piece.ndim - inputs, piece.ndim), *range(piece.ndim - inputs))
        at = [jnp.zeros_like(start)] * len(shape)
        at[inputs] = start
        if stacked:
            piece, at = piece[None], [layer, *at]
        return jax.lax.dynamic_update_slice(leaf, piece.astype(leaf.dtype), at)

    mesh, replicated = layout.leaf.mesh, PartitionSpec()
    in_specs = (layout.leaf.spec, layout.tensor.spec, replicated, replicated)
    written = jax.shard_map(write, mesh=mesh, in_specs=in_specs, out_specs=layout.leaf.spec)(
        leaf, piece, jnp.asarray(layer, jnp.int32), jnp.asarray(start, jnp.int32)
    )
    is_finite = jnp.all(jnp.isfinite(piece.astype(leaf.dtype)))
    return written, jax.lax.with_sharding_constraint(is_finite, NamedSharding(mesh, replicated))
