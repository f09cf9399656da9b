"""Writes GGUF models and vocabularies, as llama.cpp's converter does, and checks how they are read, for the tests."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import jax
import numpy as np
import sentencepiece
import tokenizers
from flax.core import meta
from flax.traverse_util import flatten_dict
from gguf import GGMLQuantizationType as Quantization
from hugging_face.families import SHAPE
from refusals import refusal
from safetensors.numpy import save_file

from msn_jax import llama
from msn_jax.config import LlamaConfig
from msn_jax.gguf import load, model
from msn_jax.hugging_face import config_json, names

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
_SHAPE = SHAPE | {"head_dim": 16, "d_mlp": 64}  # rows of whole blocks; one shape is compiled once
MODELS = {
    "llama": _SHAPE | {"norm_eps": 3e-2, "rope_theta": 123.0},
    "llama_tied": _SHAPE | {"norm_eps": 1e-5, "rope_theta": 77.0, "tie_embeddings": True},
    "linear": _SHAPE | {"norm_eps": 1e-2, "rope_theta": 345.0, "rope_scaling": "linear", "rope_factor": 3.0},
    "window": _SHAPE | {"norm_eps": 5e-3, "rope_theta": 10_000.0, "sliding_window": 6},
    "qwen2": _SHAPE | {"norm_eps": 4e-2, "rope_theta": 999.0, "qkv_bias": True, "tie_embeddings": True},
    "qwen3": _SHAPE | {"norm_eps": 6e-3, "rope_theta": 4321.0, "qk_norm": True},
}


def random_tensors(cfg: LlamaConfig) -> dict[str, np.ndarray]:
    """Random weights by Hugging Face name."""
    rng, abstract = np.random.default_rng(0), jax.eval_shape(lambda: llama.init(jax.random.key(0), cfg, stacked=False))
    tensors = {}
    for name, leaf in flatten_dict(meta.unbox(abstract), sep="/").items():
        values = rng.normal(size=names.tensor_shape(name, leaf.shape)).astype(np.float32)
        tensors[names.rename(name, names.TO_HUGGING_FACE)] = values
    return tensors


def permute(weights: np.ndarray, n_heads: int) -> np.ndarray:
    """Halves of a head -> pairs next to each other, by the converter's formula."""
    halves = weights.reshape(n_heads, 2, weights.shape[0] // n_heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weights.shape))


def round_off(tensors: Mapping[str, np.ndarray], quantization: Quantization) -> dict[str, np.ndarray]:
    """The values that Hugging Face tensors have once their matrices were quantized."""
    return {
        name: gguf.quants.dequantize(gguf.quants.quantize(value, quantization), quantization)
        if value.ndim == 2
        else value
        for name, value in tensors.items()
    }


def rope_divisors(cfg: LlamaConfig) -> np.ndarray:
    """`rope_freqs.weight` of a llama3 scaling, by the converter's formula."""
    divisors = []
    for frequency in cfg.rope_theta ** -(np.arange(0, cfg.head_dim, 2) / cfg.head_dim):
        wavelength, length = 2 * np.pi / frequency, cfg.rope_original_length
        low, high = cfg.rope_low_frequency_factor, cfg.rope_high_frequency_factor
        smooth = (length / wavelength - low) / (high - low)
        interpolated = 1 / ((1 - smooth) / cfg.rope_factor + smooth)
        divisors.append(1 if smooth > 1 else cfg.rope_factor if smooth < 0 else interpolated)
    return np.array(divisors, np.float32)


def write(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    cfg: LlamaConfig,
    *,
    quantization: Quantization = Quantization.F32,
    metadata: Mapping[str, object] | None = None,
    vocabulary: Mapping[str, object] | None = None,
    split: int = 0,
) -> None:
    """Writes a model.

    Args:
      path: the file; of a split model, without the numbers of the parts.
      tensors: by Hugging Face name.
      cfg: the model.
      quantization: of the matrices.
      metadata: further keys, without the name of the architecture, or other values; None removes a key.
      vocabulary: the keys of a tokenizer, without 'tokenizer.ggml.'.
      split: tensors per file; 0 writes one file.
    """
    arch = "qwen3" if cfg.qk_norm else "qwen2" if cfg.qkv_bias else "llama"
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split)
    keys = {
        "context_length": cfg.max_length,
        "embedding_length": cfg.d_model,
        "block_count": cfg.n_layers,
        "feed_forward_length": cfg.d_mlp,
        "attention.head_count": cfg.n_heads,
        "attention.head_count_kv": cfg.n_kv_heads,
        "attention.key_length": cfg.head_dim,
        "attention.layer_norm_rms_epsilon": cfg.norm_eps,
        "rope.freq_base": cfg.rope_theta,
        **({"attention.sliding_window": cfg.sliding_window} if cfg.sliding_window else {}),
        **(metadata or {}),
    }
    add_keys(writer, {f"{arch}.{key}": value for key, value in keys.items()})
    add_keys(writer, {f"tokenizer.ggml.{key}": value for key, value in (vocabulary or {}).items()})
    if cfg.rope_scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(cfg.rope_factor)
    if cfg.rope_scaling == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_divisors(cfg))
    gguf_names = gguf.get_tensor_name_map(ARCHITECTURES[arch], cfg.n_layers)
    for name, value in tensors.items():
        heads = {"q": cfg.n_heads, "k": cfg.n_kv_heads}.get(name.partition("self_attn.")[2][:1])
        if arch == "llama" and heads:
            value = permute(value, heads)
        kind = quantization if value.ndim == 2 else Quantization.F32
        name = gguf_names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    close(writer)


def write_both(
    directory: Path,
    name: str | LlamaConfig,
    quantization: Quantization = Quantization.F32,
    **options: object,
) -> tuple[Path, Path, LlamaConfig]:
    """Writes a random model both as GGUF and as a Hugging Face directory; returns the two paths and the config.

    Args:
      directory: contains both.
      name: a key of `MODELS`, or a config.
      quantization: of the matrices.
      options: of `write`.
    """
    cfg = LlamaConfig(**MODELS[name]) if isinstance(name, str) else name
    tensors = round_off(random_tensors(cfg), quantization)
    (directory / "exact").mkdir()
    (directory / "exact" / "config.json").write_text(json.dumps(config_json.to_json(cfg, "float32", {})))
    save_file(tensors, directory / "exact" / "model.safetensors")
    write(directory / "model.gguf", tensors, cfg, quantization=quantization, **options)
    return directory / "model.gguf", directory / "exact", cfg


def add_keys(writer: gguf.GGUFWriter, keys: Mapping[str, object]) -> None:
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)


def close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_level(backend: tokenizers.Tokenizer, pre: str | None, **keys: object) -> dict[str, object]:
    """The keys of a byte-level BPE, with further `keys` such as `eos_token_id`."""
    tokens = [backend.id_to_token(i) for i in range(backend.get_vocab_size())]
    added = backend.get_added_tokens_decoder()
    types = [1 if i not in added else 3 if added[i].special else 4 for i in range(len(tokens))]
    merges = json.loads(backend.to_str())["model"]["merges"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    return {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": merges, **keys}


def pieces(processor: sentencepiece.SentencePieceProcessor, **keys: object) -> dict[str, object]:
    """The keys of a SentencePiece model, with further `keys`."""
    ids = range(processor.get_piece_size())
    kinds = (("unknown", 2), ("control", 3), ("unused", 5), ("byte", 6))
    types = [next((kind for name, kind in kinds if getattr(processor, f"is_{name}")(i)), 1) for i in ids]
    ends = {f"{name}_token_id": getattr(processor, f"{name}_id")() for name in ("bos", "eos")}
    tokens, scores = [processor.id_to_piece(i) for i in ids], [processor.get_score(i) for i in ids]
    ends["unknown_token_id"] = processor.unk_id()
    return {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types, **ends, **keys}


def write_vocabulary(path: Path, vocabulary: Mapping[str, object]) -> None:
    """Writes a file without tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    add_keys(writer, {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()})
    close(writer)


def assert_same_tree(actual: object, expected: object) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def load_params(path: Path) -> dict:
    return load.load_params(path, model.load_config(path))


def assert_refused(path: Path, message: str, read: Callable[[Path], object] = load_params) -> None:
    """Asserts that `read(path)` raises an InputError of one line that contains the message."""
    assert message in refusal(read, path)
