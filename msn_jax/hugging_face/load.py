"""Safetensors -> parameters on a mesh.

The files are memory-mapped; `stream.py` reads their tensors piece by piece.
"""

import dataclasses
import json
import mmap
import re
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors
from jax.sharding import Mesh

from msn_jax import json_files, sharding
from msn_jax.cli import InputError
from msn_jax.config import LlamaConfig
from msn_jax.hugging_face import stream
from msn_jax.hugging_face.names import (
    DERIVED,
    DTYPES,
    FROM_HUGGING_FACE,
    INDEX,
    SINGLE,
    TO_HUGGING_FACE,
    rename,
    tensor_shape,
)
from msn_jax.mapped_file import open_mapped, release_pages

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
        release_pages(self.file)


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
        mapped = open_mapped(path)
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
    rows: bool = False,
) -> dict:
    """Loads the parameters of a Hugging Face directory onto the devices, in `cfg.param_dtype`.

    Args:
      directory: has one safetensors file, or several and their index.
      cfg: from `read_config`; the caller may change `dtype` and `param_dtype`.
      mesh: devices that the parameters are sharded over; None is the default device.
      rules: sharding rules, see `sharding.py`. Every process of a pod reads only the parts of its own devices.
      stacked: whether to use the training layout, with all layers of a weight in one array, or the decoding layout.
      rows: whether the layers' weights become rows (`projections.py`); for the decoding layout on one device.

    Raises:
      InputError: a file is missing, damaged or a pickle, the tensors do not match the config, or a value is NaN or
        infinite in `cfg.param_dtype`.
    """
    directory = Path(directory)
    target = stream.Target(cfg, mesh, rules, stacked, rows)
    tensors = check_tensors(open_tensors(directory), target.shapes(), cfg, directory)
    return target.write(
        tensors, lambda name: _not_finite(tensors[name], rename(name, TO_HUGGING_FACE), cfg.param_dtype)
    )


def _not_finite(tensor: Tensor, name: str, dtype: str) -> InputError:
    where, stored = f"{tensor.path}: tensor {name!r} has values that are NaN or infinite", tensor.values.dtype.name
    if jnp.finfo(dtype).max >= jnp.finfo(stored).max:  # the cast cannot overflow
        return InputError(f"{where}: download or export the model again")
    return InputError(f"{where} as {dtype} (stored as {stored}): choose a dtype with a larger range")


def check_tensors(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], cfg: LlamaConfig, directory: Path
) -> dict[str, Tensor]:
    """Matches tensors with parameters.

    Args:
      tensors: from `open_tensors`.
      shapes: of the parameters, by their names in the decoding layout.
      cfg: the model.
      directory: for messages.

    Returns:
      The tensor of every parameter, by the parameter's name in the decoding layout.

    Raises:
      InputError: a tensor is missing, unexpected, or of another shape or dtype.
    """
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
    step = max(1, stream.PIECE_BYTES // (4 * embed.shape[-1]))
    for start in range(0, embed.shape[0] if same else 0, step):
        piece = slice(start, start + step)
        same &= unembed.values[piece].tobytes() == embed.values[piece].tobytes()
    if not same:
        raise InputError(
            f"{unembed.path}: tensor 'lm_head.weight' differs from 'model.embed_tokens.weight', but in config.json key "
            "'tie_word_embeddings' is true: set it to false"
        )
