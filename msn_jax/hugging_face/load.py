"""Safetensors -> parameters on a mesh.

A piece of a file is read, each device gets its part of it, and the piece is written into the parameters there. The
host holds one piece at a time (`PIECE_BYTES`), whatever the size of the model, of a shard or of a tensor.
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
    their_shape,
)

PIECE_BYTES = 64 * 2**20


# --- Files


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file. Its values are read from the disk when they are looked at."""

    path: Path
    code: str  # dtype, as the header has it
    shape: tuple[int, ...]
    values: np.ndarray | None  # a map of the file; None if `code` is none of `DTYPES`
    file: mmap.mmap  # with all its tensors

    def forget(self) -> None:
        """Gives the file's pages in memory back: they are read again when they are looked at again."""
        if hasattr(self.file, "madvise"):  # not everywhere
            self.file.madvise(mmap.MADV_DONTNEED)


def open_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory by name. Reads the headers only.

    Raises:
      InputError: no safetensors, a pickle instead, a file missing, truncated or of another format.
    """
    tensors: dict[str, Tensor] = {}
    for path in _files(directory):
        try:
            with safetensors.safe_open(path, framework="numpy"):
                pass  # it has checked the header against the length of the file
        except FileNotFoundError as error:
            raise InputError(f"{path}: is missing, but {directory / INDEX} names it: copy it there") from error
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
                raise InputError(f"{path}: tensor {name!r} is in {tensors[name].path} too: keep one of the two files")
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            code, shape = entry["dtype"], tuple(entry["shape"])
            values = data[start:end].view(DTYPES[code]).reshape(shape) if code in DTYPES else None
            tensors[name] = Tensor(path, code, shape, values, mapped)
    return tensors


def stored_dtype(directory: Path) -> str:
    """The dtype of the embedding in the files. InputError as of `open_tensors`."""
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
                raise InputError(f"{index}: key 'weight_map' holds {name!r}: must be a file name")
        return [directory / name for name in sorted(set(names.values()))]
    found = [path for ending in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in sorted(directory.glob(ending))]
    if found:
        raise InputError(
            f"{found[0]}: a pickle, which may run any code when it is opened, is never read: save the model as "
            f"safetensors (transformers: model.save_pretrained)"
        )
    raise InputError(f"{directory}: has no weights: neither {SINGLE} nor {INDEX}")


# --- Files -> devices


def is_checkpoint(directory: str | Path) -> bool:
    """Whether a directory is meant to be a Hugging Face one: it has a config.json, or weights in a format of theirs."""
    directory = Path(directory)
    endings = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
    return (directory / "config.json").is_file() or any(any(directory.glob(ending)) for ending in endings)


def load_params(
    directory: str | Path,
    cfg: LlamaConfig,
    mesh: Mesh | None = None,
    rules: sharding.Rules = sharding.DECODE_RULES,
    *,
    stacked: bool = True,
) -> dict:
    """The parameters of a Hugging Face directory, in `cfg.param_dtype`, straight onto the devices.

    Args:
      directory: with safetensors, one or several and their index.
      cfg: from `read_config`; `dtype` and `param_dtype` are the caller's to change.
      mesh: where to put them, by `rules`; None is the default device.
      rules: sharding rules, see `sharding.py`; every process of a pod reads only what its devices hold.
      stacked: the training layout, or else the decoding one.

    Raises:
      InputError: a file is missing, damaged or a pickle, or the tensors are not those of the model.
    """
    directory = Path(directory)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1]) if mesh is None else mesh
    boxed = jax.eval_shape(lambda: llama.init(jax.random.key(0), cfg, stacked))
    places = sharding.shardings(boxed, mesh, rules)
    abstract = nn.meta.unbox(boxed)
    tensors = check_tensors(open_tensors(directory), abstract, cfg, directory)

    def zeros() -> dict:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)

    params = flatten_dict(jax.jit(zeros, out_shardings=places)(), sep="/")
    for name, tensor in tensors.items():
        ours, layer = _leaf(name, stacked)
        params[ours] = _stream(tensor.values, ours, params[ours], layer)
        tensor.forget()
    return unflatten_dict(params, sep="/")


def check_tensors(
    tensors: Mapping[str, Tensor], abstract: dict, cfg: LlamaConfig, directory: Path
) -> dict[str, Tensor]:
    """The tensors that make up the parameters, by our names in the decoding layout.

    Args:
      tensors: from `open_tensors`.
      abstract: shapes of the parameters, either layout.
      cfg: the model.
      directory: for messages.

    Raises:
      InputError: a tensor is missing, unexpected, or of another shape or type.
    """
    shapes = {}
    for name, leaf in flatten_dict(abstract, sep="/").items():
        if name.startswith("layers/"):
            shapes |= {name.replace("layers/", f"layer_{i}/", 1): leaf.shape[1:] for i in range(cfg.n_layers)}
        else:
            shapes[name] = leaf.shape
    found = {}
    for theirs, tensor in tensors.items():
        if re.fullmatch(DERIVED, theirs):
            continue
        where, ours = f"{tensor.path}: tensor {theirs!r}", rename(theirs, FROM_HUGGING_FACE)
        if ours == "unembed" and cfg.tie_embeddings and "model.embed_tokens.weight" in tensors:
            _check_tied(tensor, tensors["model.embed_tokens.weight"])
            continue
        if ours not in shapes:
            raise InputError(f"{where}: unexpected, the model of {directory}/config.json has none")
        if tensor.code not in DTYPES:
            raise InputError(f"{where} is {tensor.code}: must be one of {', '.join(DTYPES)}")
        wanted = their_shape(ours, shapes[ours])
        if tensor.shape != wanted:
            raise InputError(f"{where} has shape {tensor.shape}: config.json makes it {wanted}")
        found[ours] = tensor
    for ours in shapes:
        if ours not in found:
            raise InputError(f"{directory}: tensor {rename(ours, TO_HUGGING_FACE)!r} is missing from its safetensors")
    return found


def _check_tied(unembed: Tensor, embed: Tensor) -> None:
    """Some files of tied models hold the shared matrix twice; two different ones would be another model."""
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


def _leaf(name: str, stacked: bool) -> tuple[str, int]:
    """Decoding name -> (name in this layout, layer)."""
    match = re.fullmatch(r"layer_(\d+)/(.*)", name)
    return (f"layers/{match[2]}", int(match[1])) if match and stacked else (name, 0)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """How a parameter lies in our arrays and in their tensors."""

    inputs: int  # leading axes of ours that are the columns of theirs; 0: not transposed
    stacked: bool  # ours has a leading axis of layers
    ours: NamedSharding
    theirs: NamedSharding  # the same split, of the tensor in the file


def _layout(name: str, ours: NamedSharding, rank: int) -> _Layout:
    inputs, stacked = input_axes(name), name.startswith("layers/")
    spec = (*ours.spec, *[None] * (rank - len(ours.spec)))[stacked:]
    theirs = (spec[inputs], spec[0]) if inputs else spec[:1] if name.endswith("bias") else spec
    if sorted(map(str, filter(None, theirs))) != sorted(map(str, filter(None, ours.spec))):
        raise ValueError(f"{name}: {ours.spec} splits layers or heads, which can only be kept whole")
    return _Layout(inputs, stacked, ours, NamedSharding(ours.mesh, PartitionSpec(*theirs)))


def _stream(tensor: np.ndarray, name: str, leaf: Array, layer: int) -> Array:
    """`leaf` with a tensor of a file written into it, piece by piece; the old one is donated.

    A piece is the same range of rows of every device's part of the tensor, whole heads each. The last one starts early
    enough to be as long as the others, so that one program writes all of them.
    """
    layout = _layout(name, leaf.sharding, leaf.ndim)
    rows, *columns = tensor.shape
    heads = leaf.shape[layout.stacked + layout.inputs]  # or single rows, where ours has no heads there
    height = rows // heads
    parts = rows // layout.theirs.shard_shape((rows, *columns))[0]
    bytes_per_step = parts * height * math.prod(columns) * tensor.itemsize
    step = min(heads // parts, max(1, PIECE_BYTES // bytes_per_step))
    for at in range(0, heads // parts, step):
        start = min(at, heads // parts - step)
        piece = _read(tensor, layout.theirs, parts, start * height, step * height)
        leaf = _write(leaf, piece, layer, start, layout)
        leaf.block_until_ready()  # or the pieces of a fast disk would queue up on the host
    return leaf


def _read(tensor: np.ndarray, place: NamedSharding, parts: int, start: int, count: int) -> Array:
    """Rows [start, start + count) of every one of the `parts` of a tensor, one under the other, on their devices."""
    rows, *columns = tensor.shape

    def of_device(index: tuple[slice, ...]) -> np.ndarray:
        part = (index[0].start or 0) // count
        first = part * (rows // parts) + start
        return tensor[(slice(first, first + count), *index[1:])]

    return jax.make_array_from_callback((parts * count, *columns), place, of_device)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=4)
def _write(leaf: Array, piece: Array, layer: int, start: int, layout: _Layout) -> Array:
    """Writes a piece of theirs into ours, in its layout and dtype: on every device from its head `start` on."""
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

    ours, theirs, copied = layout.ours.spec, layout.theirs.spec, PartitionSpec()
    return jax.shard_map(write, mesh=layout.ours.mesh, in_specs=(ours, theirs, copied, copied), out_specs=ours)(
        leaf, piece, jnp.asarray(layer, jnp.int32), jnp.asarray(start, jnp.int32)
    )
