"""Quantized tensors -> parameters on a mesh.

Tensors take the path of safetensors (`hugging_face/stream.py`): piece by piece, with each piece dequantized when the
devices ask for it, so that the host holds one piece in float32 at a time.

Two layouts differ from Hugging Face. The names are those of llama.cpp; and in architecture llama, the rows of each head
of q and k are in the order of rotated pairs, (0, H/2), (1, H/2 + 1), ..., where `rope.rotate` takes the two halves.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jax.sharding import Mesh

from msn_jax import sharding
from msn_jax.cli import InputError
from msn_jax.config import LlamaConfig
from msn_jax.gguf import container, model
from msn_jax.gguf.container import Gguf, Tensor
from msn_jax.hugging_face import stream
from msn_jax.hugging_face.names import rename, tensor_shape

# Tensor name -> parameter name in the decoding layout.
FROM_GGUF = (
    (r"token_embd\.weight", r"embed"),
    (r"output\.weight", r"unembed"),
    (r"output_norm\.weight", r"norm/scale"),
    (r"blk\.(\d+)\.attn_norm\.weight", r"layer_\1/attention_norm/scale"),
    (r"blk\.(\d+)\.ffn_norm\.weight", r"layer_\1/mlp_norm/scale"),
    (r"blk\.(\d+)\.attn_([qkv])\.weight", r"layer_\1/attention/\2"),
    (r"blk\.(\d+)\.attn_output\.weight", r"layer_\1/attention/o"),
    (r"blk\.(\d+)\.attn_([qkv])\.bias", r"layer_\1/attention/\2_bias/bias"),
    (r"blk\.(\d+)\.attn_([qk])_norm\.weight", r"layer_\1/attention/\2_norm/scale"),
    (r"blk\.(\d+)\.ffn_(gate|up|down)\.weight", r"layer_\1/mlp/\2"),
)
# Read by `model.py`, or in older files and determined by the config.
_NO_PARAMETERS = r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd(\.weight)?"


@dataclasses.dataclass(frozen=True)
class Dequantized:
    """A tensor, and its values as an array of float32, each dequantized on access."""

    name: str
    tensor: Tensor
    rows: np.ndarray | None  # the row of the file for every row; None: the same

    @property
    def values(self) -> "Dequantized":
        """The tensor itself: it can be sliced."""
        return self

    def release(self) -> None:
        """Drops the pages that were read."""
        self.tensor.release()

    @property
    def shape(self) -> tuple[int, ...]:
        """As in a Hugging Face file: [out, in] or [size]."""
        return self.tensor.shape

    @property
    def itemsize(self) -> int:
        """Bytes per dequantized value."""
        return np.dtype(np.float32).itemsize

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        dequantize = container.dequantizer(self.tensor.code)
        with np.errstate(all="ignore"):  # NaN and infinity are reported with the tensor's name
            if len(self.shape) == 1:
                return dequantize(self.tensor.data)[index]
            rows, columns = index
            rows = rows if self.rows is None else self.rows[rows]
            start, stop, _ = columns.indices(self.shape[1])
            length, size = self.tensor.block
            first, last = start // length, -(-stop // length)
            data = np.ascontiguousarray(self.tensor.data[rows, first * size : last * size])
            return dequantize(data)[:, start - first * length : stop - first * length]


def load_params(
    path: str | Path,
    cfg: LlamaConfig,
    mesh: Mesh | None = None,
    rules: sharding.Rules = sharding.DECODE_RULES,
    *,
    stacked: bool = True,
    rows: bool = False,
) -> dict:
    """Loads the parameters of a GGUF model onto the devices, in `cfg.param_dtype`.

    Args:
      path: the file, or any file of a split model.
      cfg: from `model.read_config`; the caller may change `dtype` and `param_dtype`.
      mesh: devices that the parameters are sharded over; None is the default device.
      rules: sharding rules, see `sharding.py`. Every process of a pod reads only the parts of its own devices.
      stacked: whether to use the training layout, with all layers of a weight in one array, or the decoding layout.
      rows: whether the layers' weights become rows (`projections.py`); for the decoding layout on one device.

    Raises:
      InputError: a file is missing or damaged, the tensors do not match the metadata, a quantization is unknown, or a
        value is NaN or infinite in `cfg.param_dtype`.
    """
    gguf = container.read(path)
    target = stream.Target(cfg, mesh, rules, stacked, rows)
    tensors = check_tensors(gguf, target.shapes(), cfg)

    def not_finite(name: str) -> InputError:
        return InputError(
            f"{tensors[name].tensor.path}: tensor {tensors[name].name!r} has values that are NaN or infinite as "
            f"{cfg.param_dtype}: download or export the model again, or load it as float32"
        )

    return target.write(tensors, not_finite)


def check_tensors(gguf: Gguf, shapes: Mapping[str, tuple[int, ...]], cfg: LlamaConfig) -> dict[str, Dequantized]:
    """Matches tensors with parameters.

    Args:
      gguf: the opened model.
      shapes: of the parameters, by their names in the decoding layout.
      cfg: the model.

    Returns:
      The tensor of every parameter, by the parameter's name in the decoding layout.

    Raises:
      InputError: a tensor is missing, unexpected, or of another shape or quantization.
    """
    matched = {}
    for tensor_name, tensor in gguf.tensors.items():
        if re.fullmatch(_NO_PARAMETERS, tensor_name):
            continue
        where, name = f"{tensor.path}: tensor {tensor_name!r}", rename(tensor_name, FROM_GGUF)
        if name not in shapes:
            raise InputError(f"{where}: unexpected, the model that its metadata describes has no such tensor")
        if container.dequantizer(tensor.code) is None:
            raise InputError(f"{where} has quantization {tensor.code}: the package gguf cannot dequantize it")
        expected = tensor_shape(name, shapes[name])
        if tensor.shape != expected:
            raise InputError(f"{where} has shape {tensor.shape}: the metadata imply {expected}")
        permuted = model.architecture(gguf) == "llama" and re.fullmatch(r".*/attention/[qk]", name)
        rows = _half_rows(tensor.shape[0], cfg.head_dim) if permuted else None
        matched[name] = Dequantized(tensor_name, tensor, rows)
    for name in shapes:
        if name not in matched:
            raise InputError(f"{gguf.path}: has no tensor for parameter {name!r}: download or export the model again")
    return matched


def _half_rows(rows: int, head_dim: int) -> np.ndarray:
    """The row of the file, with pairs next to each other, for every row, with the halves of a head in sequence."""
    return np.arange(rows).reshape(-1, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)
