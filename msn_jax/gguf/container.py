"""The GGUF container: metadata and tensors of a file, or of all files of a split model.

    'GGUF' | uint32 version | uint64 tensors | uint64 entries | entries | tensor descriptions | padding | tensor data

All little-endian. An entry is a key, a type and a value; a tensor description is a name, the lengths of the axes (the
fastest first), a quantization and an offset into the tensor data. Source: docs/gguf.md of ggml. The package `gguf` has
a reader too, but it makes NumPy arrays for every token: 6 s for a vocabulary of 49,152 tokens.
"""

import dataclasses
import functools
import math
import mmap
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from msn_jax.cli import InputError
from msn_jax.mapped_file import open_mapped, release_pages

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)  # version 1 has 32-bit counts
_SPLIT = re.compile(r"(.*-)(\d{5})(-of-)(\d{5})(\.gguf)")
_STRING, _ARRAY = 8, 9
_SCALARS = ("<u1", "<i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?", None, None, "<u8", "<i8", "<f8")  # by type
_MAX_AXES = 4


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One quantized tensor, memory-mapped."""

    path: Path
    code: str  # the quantization, such as 'Q4_K'
    shape: tuple[int, ...]  # the slowest axis first, as in NumPy: [out, in]
    block: tuple[int, int]  # a block of the quantization: its length in values, and in bytes
    data: np.ndarray  # uint8 [..., bytes per row]
    file: mmap.mmap  # the whole file, shared by its tensors

    def release(self) -> None:
        """Drops the file's pages from memory; a later access reads them again."""
        release_pages(self.file)


@dataclasses.dataclass(frozen=True)
class Gguf:
    """An opened model."""

    path: Path  # of the first file
    metadata: dict[str, object]  # values are int, float, bool, str, or lists of them
    tensors: dict[str, Tensor]


def is_gguf(path: str | Path) -> bool:
    """Whether `path` is a file that is named like a GGUF model or begins like one."""
    path = Path(path)
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return path.suffix == ".gguf" or file.read(len(_MAGIC)) == _MAGIC


def read(path: str | Path) -> Gguf:
    """Opens a model; of its tensors only the descriptions are read.

    Args:
      path: the file. Any file of a split model (`NAME-00002-of-00003.gguf`) stands for all of them.

    Raises:
      InputError: the file is not GGUF, is truncated or malformed, or a file of a split model is missing.
    """
    paths = _files(Path(path))
    first = _read_file(paths[0])
    parts = first.metadata.get("split.count", 1)
    if parts not in (0, len(paths)):
        raise InputError(
            f"{paths[0]}: key 'split.count' is {parts!r}, but the file's name implies {len(paths)}: give the files "
            "back their names, such as NAME-00001-of-00003.gguf"
        )
    tensors = dict(first.tensors)
    for part in paths[1:]:
        for name, tensor in _read_file(part).tensors.items():
            if name in tensors:
                raise InputError(f"{part}: tensor {name!r} is also in {tensors[name].path}: these are not one model")
            tensors[name] = tensor
    return dataclasses.replace(first, tensors=tensors)


def _files(path: Path) -> list[Path]:
    match = _SPLIT.fullmatch(path.name)
    if match is None:
        return [path]
    before, _, of, count, suffix = match.groups()
    paths = [path.with_name(f"{before}{part:05d}{of}{count}{suffix}") for part in range(1, int(count) + 1)]
    for part in paths:
        if not part.is_file():
            raise InputError(
                f"{part}: is missing: {path.name} is part of a model of {int(count)} files: copy all there"
            )
    return paths or [path]


class _Truncated(Exception):
    """The file ends before a value does."""


@dataclasses.dataclass
class _Cursor:
    """Reads values one after the other."""

    file: mmap.mmap
    position: int = 0

    def take(self, size: int) -> bytes:
        """The next `size` bytes."""
        if size > len(self.file) - self.position:
            raise _Truncated
        self.position += size
        return self.file[self.position - size : self.position]

    def integer(self, kind: str) -> int:
        """An integer; 'I' has 32 bits, 'Q' has 64."""
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0]

    def string(self) -> str:
        """A string. Its invalid UTF-8 is replaced: names of models and tokens may have some."""
        return self.take(self.integer("Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> object:
        """A value of type `kind`. Raises ValueError for an unknown type."""
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, count = self.integer("I"), self.integer("Q")
            if kind in (_STRING, _ARRAY):
                if count > len(self.file):
                    raise _Truncated
                return [self.value(kind) for _ in range(count)]
            return self._scalars(kind, count)
        return self._scalars(kind, 1)[0]

    def _scalars(self, kind: int, count: int) -> list:
        if kind >= len(_SCALARS):
            raise ValueError(f"a value of the unknown type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        values = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        # The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06.
        return [float(str(value)) for value in values] if dtype == np.float32 else values.tolist()


def _read_file(path: Path) -> Gguf:
    try:
        mapped = open_mapped(path)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise InputError(f"{path}: cannot be read as a GGUF file ({error})") from error
    if mapped[: len(_MAGIC)] != _MAGIC:
        raise InputError(f"{path}: not a GGUF file: it does not begin with {_MAGIC.decode()}")
    cursor = _Cursor(mapped, len(_MAGIC))
    try:
        version = cursor.integer("I")
        if version not in _VERSIONS:
            kind = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
            raise InputError(f"{path}: is {kind} GGUF: convert it to version 3, little-endian")
        num_tensors, num_entries = cursor.integer("Q"), cursor.integer("Q")
        metadata = {}
        for _ in range(num_entries):
            key = cursor.string()
            metadata[key] = cursor.value(cursor.integer("I"))
        described = [_describe(cursor) for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise ValueError(f"key 'general.alignment' is {alignment!r}")
        start = -(-cursor.position // alignment) * alignment
        tensors = {name: _tensor(path, mapped, start, *rest) for name, *rest in described}
    except _Truncated as error:
        raise InputError(f"{path}: is truncated, at {len(mapped)} bytes: download or copy it again") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is malformed ({error}): download or export it again") from error
    return Gguf(path, metadata, tensors)


def _describe(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape, number of the quantization, offset) of a tensor."""
    name, rank = cursor.string(), cursor.integer("I")
    if not 0 < rank <= _MAX_AXES:
        raise ValueError(f"tensor {name!r} has {rank} axes")
    shape = tuple(cursor.integer("Q") for _ in range(rank))[::-1]
    return name, shape, cursor.integer("I"), cursor.integer("Q")


def _tensor(path: Path, file: mmap.mmap, start: int, shape: tuple[int, ...], number: int, offset: int) -> Tensor:
    code, block = quantization(number)
    row = shape[-1] // block[0] * block[1]
    size = math.prod(shape[:-1]) * row
    if start + offset + size > len(file):
        raise _Truncated
    if shape[-1] % block[0]:
        raise ValueError(f"a tensor of shape {shape} is not made of whole blocks of {block[0]}")
    data = np.frombuffer(file, np.uint8, size, start + offset).reshape(*shape[:-1], row)
    return Tensor(path, code, shape, block, data, file)


def quantization(number: int) -> tuple[str, tuple[int, int]]:
    """(name, block) of a quantization; an unknown one is named by its number and has no length."""
    import gguf

    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        return f"number {number}", (1, 0)
    return kind.name, gguf.GGML_QUANT_SIZES[kind]


@functools.cache
def dequantizer(code: str) -> Callable[[np.ndarray], np.ndarray] | None:
    """The function uint8 [rows, bytes per row] -> float32 [rows, columns] of a quantization; None if unknown."""
    import gguf

    kind = getattr(gguf.GGMLQuantizationType, code, None)
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (KeyError, NotImplementedError):
        return None
    return lambda data: gguf.quants.dequantize(data, kind)
