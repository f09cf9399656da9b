"""Safetensors -> parameters on a mesh.

Tensors are streamed: a piece of at most `PIECE_BYTES` is read, each device receives its part, checks that it is finite
and writes it into the preallocated parameters. The host holds one piece at a time, regardless of the size of the model,
of a shard or of a tensor.

In this package a *tensor* belongs to a safetensors file and a *parameter* (or leaf) to our Flax tree.
"""

import dataclasses
import functools
import json
import math
import mmap
import re
from collections.abc import Mapping
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from msn_jax import json_files, llama, sharding
from msn_jax.cli import InputError
from msn_jax.config import LlamaConfig, MeshConfig
from msn_jax.hugging_face.names import (
    DERIVED,
    DTYPES,
    FROM_HUGGING_FACE,
    INDEX,
    SINGLE,
    TO_HUGGING_FACE,
    input_axes,
    rename,
    tensor_shape,
)

PIECE_BYTES = 64 * 2**20


# --- Files


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file, memory-mapped: values are read from disk on access."""

    path: Path
    code: str  # dtype as the safetensors header spells it
    shape: tuple[int, ...]
    values: np.ndarray | None  # a view of the mapped file; None if `code` is not in `DTYPES`
    file: mmap.mmap  # the whole file, shared by its tensors

    def release(self) -> None:
        """Drops the file's pages from memory; a later access reads them again."""
        if hasattr(self.file, "madvise"):  # not on every platform
            self.file.madvise(mmap.MADV_DONTNEED)


def open_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory by name. Reads the headers only.

    Raises:
      InputError: there are no safetensors, only a pickle, or a file is missing, truncated or of another format.
    """
    tensors: dict[str, Tensor] = {}
    for path in _files(directory):
        try:
            with safetensors.safe_open(path, framework="numpy"):
                pass  # opening checks the header against the length of the file
        except FileNotFoundError as error:
            raise InputError(f"{path}: is missing, but {directory / INDEX} lists it: copy it there") from error
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"{path}: truncated or not a safetensors file ({error}): copy it again") from error
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        data = np.frombuffer(mapped, np.uint8)
        length = int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8 : 8 + length].tobytes())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if name in tensors:
                raise InputError(f"{path}: tensor {name!r} is also in {tensors[name].path}: keep one of the two files")
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            code, shape = entry["dtype"], tuple(entry["shape"])
            values = data[start:end].view(DTYPES[code]).reshape(shape) if code in DTYPES else None
            tensors[name] = Tensor(path, code, shape, values, mapped)
    return tensors


def stored_dtype(directory: Path) -> str:
    """The dtype of the stored embedding, 'absent' if there is none. Raises like `open_tensors`."""
    embed = open_tensors(directory).get("model.embed_tokens.weight")
    code = "absent" if embed is None else embed.code
    return np.dtype(DTYPES[code]).name if code in DTYPES else code


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if (directory / SINGLE).exists():
        return [directory / SINGLE]
    if index.exists():
        names = json_files.read(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise InputError(f"{index}: key 'weight_map' is {names!r}: must name the file of every tensor")
        for name in names.values():
            if not isinstance(name, str) or Path(name).name != name:
                raise InputError(f"{index}: key 'weight_map' maps to {name!r}: must be a file name")
        return [directory / name for name in sorted(set(names.values()))]
    pickles = [path for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in sorted(directory.glob(pattern))]
    if pickles:
        raise InputError(
            f"{pickles[0]}: pickles are never read, because opening one may run arbitrary code: save the model as "
            "safetensors (transformers: model.save_pretrained)"
        )
    raise InputError(f"{directory}: has no weights: neither {SINGLE} nor {INDEX}")


# --- Files -> devices


def is_checkpoint(directory: str | Path) -> bool:
    """Whether a directory looks like a Hugging Face model: it has a config.json, or weights in one of their formats."""
    directory = Path(directory)
    patterns = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
    return (directory / "config.json").is_file() or any(any(directory.glob(pattern)) for pattern in patterns)


def load_params(
    directory: str | Path,
    cfg: LlamaConfig,
    mesh: Mesh | None = None,
    rules: sharding.Rules = sharding.DECODE_RULES,
    *,
    stacked: bool = True,
) -> dict:
    """Loads the parameters of a Hugging Face directory onto the devices, in `cfg.param_dtype`.

    Args:
      directory: has one safetensors file, or several and their index.
      cfg: from `read_config`; the caller may change `dtype` and `param_dtype`.
      mesh: devices that the parameters are sharded over; None is the default device.
      rules: sharding rules, see `sharding.py`. Every process of a pod reads only the parts of its own devices.
      stacked: whether to use the training layout, with all layers of a weight in one array, or the decoding layout.

    Raises:
      InputError: a file is missing, damaged or a pickle, the tensors do not match the config, or a value is NaN or
        infinite in `cfg.param_dtype`.
    """
    directory = Path(directory)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1]) if mesh is None else mesh
    boxed = jax.eval_shape(lambda: llama.init(jax.random.key(0), cfg, stacked))
    shardings = sharding.shardings(boxed, mesh, rules)
    abstract = nn.meta.unbox(boxed)
    tensors = check_tensors(open_tensors(directory), abstract, cfg, directory)

    def zeros() -> dict:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)

    params = flatten_dict(jax.jit(zeros, out_shardings=shardings)(), sep="/")
    for name, tensor in tensors.items():
        leaf_name, layer = leaf_of(name, stacked)
        params[leaf_name], is_finite = write_tensor(tensor.values, leaf_name, params[leaf_name], layer)
        tensor.release()
        if not is_finite:
            raise _not_finite(tensor, rename(name, TO_HUGGING_FACE), cfg.param_dtype)
    return unflatten_dict(params, sep="/")


def _not_finite(tensor: Tensor, name: str, dtype: str) -> InputError:
    where, stored = f"{tensor.path}: tensor {name!r} has values that are NaN or infinite", tensor.values.dtype.name
    if jnp.finfo(dtype).max >= jnp.finfo(stored).max:  # the cast cannot overflow
        return InputError(f"{where}: download or export the model again")
    return InputError(f"{where} as {dtype} (stored as {stored}): choose a dtype with a larger range")


def check_tensors(
    tensors: Mapping[str, Tensor], abstract: dict, cfg: LlamaConfig, directory: Path
) -> dict[str, Tensor]:
    """Matches tensors with parameters.

    Args:
      tensors: from `open_tensors`.
      abstract: shapes of the parameters, either layout.
      cfg: the model.
      directory: for messages.

    Returns:
      The tensor of every parameter, by the parameter's name in the decoding layout.

    Raises:
      InputError: a tensor is missing, unexpected, or of another shape or dtype.
    """
    shapes = {}
    for name, leaf in flatten_dict(abstract, sep="/").items():
        if name.startswith("layers/"):
            shapes |= {name.replace("layers/", f"layer_{i}/", 1): leaf.shape[1:] for i in range(cfg.n_layers)}
        else:
            shapes[name] = leaf.shape
    matched = {}
    for tensor_name, tensor in tensors.items():
        if re.fullmatch(DERIVED, tensor_name):
            continue
        where, name = f"{tensor.path}: tensor {tensor_name!r}", rename(tensor_name, FROM_HUGGING_FACE)
        if name == "unembed" and cfg.tie_embeddings and "model.embed_tokens.weight" in tensors:
            _check_tied(tensor, tensors["model.embed_tokens.weight"])
            continue
        if name not in shapes:
            raise InputError(f"{where}: unexpected, the model of {directory}/config.json has no such tensor")
        if tensor.code not in DTYPES:
            raise InputError(f"{where} is {tensor.code}: must be one of {', '.join(DTYPES)}")
        expected = tensor_shape(name, shapes[name])
        if tensor.shape != expected:
            raise InputError(f"{where} has shape {tensor.shape}: config.json implies {expected}")
        matched[name] = tensor
    for name in shapes:
        if name not in matched:
            where = f"{directory}: tensor {rename(name, TO_HUGGING_FACE)!r} is missing from its safetensors"
            if name == "unembed":
                where += (
                    ", but in config.json key 'tie_word_embeddings' is false or absent: if the model shares its "
                    "embedding matrix with its output layer, set it to true"
                )
            raise InputError(where)
    return matched


def _check_tied(unembed: Tensor, embed: Tensor) -> None:
    """Refuses two different matrices in a model with tied embeddings. Some files store the shared one twice."""
    same = (unembed.code, unembed.shape) == (embed.code, embed.shape) and embed.values is not None
    step = max(1, PIECE_BYTES // (4 * embed.shape[-1]))
    for start in range(0, embed.shape[0] if same else 0, step):
        piece = slice(start, start + step)
        same &= unembed.values[piece].tobytes() == embed.values[piece].tobytes()
    if not same:
        raise InputError(
            f"{unembed.path}: tensor 'lm_head.weight' differs from 'model.embed_tokens.weight', but in config.json key "
            "'tie_word_embeddings' is true: set it to false"
        )


def leaf_of(name: str, stacked: bool) -> tuple[str, int]:
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


def write_tensor(tensor: np.ndarray, name: str, leaf: Array, layer: int) -> tuple[Array, bool]:
    """Writes a tensor into a parameter, piece by piece.

    A piece is the same range of rows of every device's part of the tensor, in whole heads. The last piece overlaps the
    one before it where needed to have the same size, so that one compiled program writes all of them.

    Args:
      tensor: in the layout of Hugging Face, [out, in] or [size]. Its shape, itemsize and slices are used.
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


def _read(tensor: np.ndarray, target: NamedSharding, parts: int, start: int, count: int) -> Array:
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
