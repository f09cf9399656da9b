"""Parameters on a mesh -> safetensors, one tensor at a time."""

import dataclasses
import functools
import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from msn_jax import json_files
from msn_jax.config import LlamaConfig
from msn_jax.hugging_face.names import DTYPES, INDEX, SINGLE, TO_HUGGING_FACE, input_axes, rename, tensor_shape


@dataclasses.dataclass(frozen=True)
class _Source:
    """The part of our parameters that becomes one tensor."""

    leaf: Array
    name: str  # of the leaf
    layer: int  # index into a stacked leaf

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tensor_shape(self.name, self.leaf.shape[self.name.startswith("layers/") :])


def save(params: dict, cfg: LlamaConfig, directory: Path, dtype: str, max_shard_bytes: int) -> None:
    """Writes `model.safetensors`, or shards of at most `max_shard_bytes` and their index, one tensor at a time.

    Every process of a pod calls this, because each has only a part of the parameters; process 0 writes.
    """
    code = next(code for code, known in DTYPES.items() if np.dtype(known) == np.dtype(dtype))
    itemsize = np.dtype(dtype).itemsize
    shards: list[dict[str, _Source]] = [{}]
    filled = 0
    for name, source in _sources(params, cfg).items():
        size = math.prod(source.shape) * itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        filled += size
        shards[-1][name] = source
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    for file_name, shard in zip(names, shards, strict=True):
        _save_file(directory / file_name, shard, code)
    if count > 1 and jax.process_index() == 0:
        total = sum(math.prod(source.shape) * itemsize for shard in shards for source in shard.values())
        weight_map = {name: file_name for file_name, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_bytes(json_files.dump(index))


def _sources(params: dict, cfg: LlamaConfig) -> dict[str, _Source]:
    """All tensors by name, in the order in which a forward pass uses them."""
    flat = flatten_dict(params, sep="/")
    ordered = {"embed": _Source(flat["embed"], "embed", 0)}
    for layer in range(cfg.n_layers):
        for name, leaf in flat.items():
            if name.startswith(("layers/", f"layer_{layer}/")):
                ordered[f"layer_{layer}/{name.split('/', 1)[1]}"] = _Source(leaf, name, layer)
    ordered |= {name: _Source(flat[name], name, 0) for name in ("norm/scale", "unembed") if name in flat}
    return {rename(name, TO_HUGGING_FACE): source for name, source in ordered.items()}


def _save_file(path: Path, shard: dict[str, _Source], code: str) -> None:
    """Writes the safetensors format: header length (uint64), header (JSON, padded to 8 bytes), the tensors' bytes.

    The safetensors library is not used here because it needs all tensors of a file in memory.
    """
    dtype, header, start = np.dtype(DTYPES[code]), {"__metadata__": {"format": "pt"}}, 0
    for name, source in shard.items():
        end = start + math.prod(source.shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(source.shape), "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path if jax.process_index() == 0 else os.devnull, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for source in shard.values():
            tensor = np.ascontiguousarray(_to_host(source, dtype))
            file.write(tensor.reshape(-1).view(np.uint8).data)
        file.flush()
        if jax.process_index() == 0:
            os.fsync(file.fileno())


def _to_host(source: _Source, dtype: np.dtype) -> np.ndarray:
    """The tensor's values. A sharded parameter is gathered on the devices first."""
    leaf, stacked = source.leaf, source.name.startswith("layers/")
    target = leaf.sharding
    if isinstance(target, NamedSharding):
        target = NamedSharding(target.mesh, PartitionSpec())
    layer = jnp.asarray(source.layer, jnp.int32)
    return np.asarray(_transpose(leaf, layer, input_axes(source.name), stacked, source.shape, dtype, target))


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
def _transpose(
    leaf: Array, layer: Array, inputs: int, stacked: bool, shape: tuple[int, ...], dtype: np.dtype, target: Sharding
) -> Array:
    param = jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False) if stacked else leaf
    tensor = param.transpose(*range(inputs, param.ndim), *range(inputs)).reshape(shape)
    return jax.lax.with_sharding_constraint(tensor.astype(dtype), target)
