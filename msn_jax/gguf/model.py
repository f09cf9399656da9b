"""Metadata of a GGUF file -> `LlamaConfig`.

Keys are those of llama.cpp's converter. Sizes and constants are required; what `llama.py` does not implement is refused
by its key, never ignored.
"""

import dataclasses
from pathlib import Path

import numpy as np

from msn_jax import config
from msn_jax.cli import InputError
from msn_jax.config import LlamaConfig
from msn_jax.gguf import container
from msn_jax.gguf.container import Gguf
from msn_jax.rope import inverse_frequencies

ARCHITECTURES = ("llama", "qwen2", "qwen3")

# Keys of features that `llama.py` does not implement -> values with which they do nothing.
_ONLY = {
    "expert_count": (0,),
    "attention.clamp_kqv": (0,),
    "attention.scale": (0,),
    "attention.temperature_scale": (0,),
    "attention.causal": (True,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "use_parallel_residual": (False,),
}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LLAMA3 = (1.0, 4.0, 8192)  # low and high frequency factor, original length of Llama 3.1 to 3.3
_TOLERANCE = 1e-4  # relative, on frequencies: original lengths are rounded to whole tokens


def read_config(gguf: Gguf) -> LlamaConfig:
    """The config of a model.

    Its `dtype` and `param_dtype` are those of the matrices where all are F16 or all are BF16, else float32, in which
    dequantized values are exact.

    Raises:
      InputError: a key is missing or malformed, or the model is not one that `llama.py` implements.
    """
    keys = _Keys(gguf, architecture(gguf))
    for key, accepted in _ONLY.items():
        keys.require(keys.get(key, accepted[0]) in accepted, key, f"{accepted[0]}: this feature is not supported")
    embed = gguf.tensors.get("token_embd.weight")
    if embed is None or len(embed.shape) != 2:
        raise InputError(f"{gguf.path}: tensor 'token_embd.weight' is missing or no matrix: not a language model")
    d_model, n_heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", d_model // n_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        keys.require(keys.get(key, head_dim) == head_dim, key, f"{head_dim}, the size of a head")
    max_length, window = keys.integer("context_length"), keys.get("attention.sliding_window", 0)
    keys.require(isinstance(window, int) and window >= 0, "attention.sliding_window", "0 (none) or more")
    dtype = _dtype(gguf)
    cfg = LlamaConfig(
        vocab_size=embed.shape[0],
        d_model=d_model,
        n_layers=keys.integer("block_count"),
        n_heads=n_heads,
        n_kv_heads=keys.integer("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        d_mlp=keys.integer("feed_forward_length"),
        max_length=max_length,
        rope_theta=keys.number("rope.freq_base", 10_000.0),
        rope_scaling="none",
        sliding_window=window if window < max_length else 0,
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        qkv_bias=keys.architecture == "qwen2",
        qk_norm=keys.architecture == "qwen3",
        tie_embeddings="output.weight" not in gguf.tensors,
        dtype=dtype,
        param_dtype=dtype,
    )
    try:
        config.check_model(cfg)
    except InputError as error:
        raise InputError(f"{gguf.path}: invalid model: {error}") from error
    return _with_rope_scaling(cfg, keys)


def architecture(gguf: Gguf) -> str:
    """One of `ARCHITECTURES`. InputError for any other."""
    name = gguf.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        found = f"is {name!r}" if name is not None else "is missing"
        raise InputError(f"{gguf.path}: key 'general.architecture' {found}: supported are {', '.join(ARCHITECTURES)}")
    return name


@dataclasses.dataclass(frozen=True)
class _Keys:
    """The keys of an architecture, checked on access."""

    gguf: Gguf
    architecture: str

    def get(self, key: str, default: object = None) -> object:
        return self.gguf.metadata.get(f"{self.architecture}.{key}", default)

    def require(self, condition: bool, key: str, expected: str) -> None:
        """Raises InputError about `key` unless `condition` is true."""
        if not condition:
            value = self.get(key)
            actual = (
                "is missing" if value is None else "varies by layer" if isinstance(value, list) else f"is {value!r}"
            )
            raise InputError(f"{self.gguf.path}: key '{self.architecture}.{key}' {actual}: must be {expected}")

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer, required unless it has a default."""
        value = self.get(key, default)
        if isinstance(value, list) and len(set(value)) == 1:  # one value per layer
            value = value[0]
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        self.require(is_integer and 0 < value < 2**31, key, "a positive integer below 2**31")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number, required unless it has a default."""
        value = self.get(key, default)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        self.require(is_number and 0 < value < float("inf"), key, "a positive number")
        return float(value)


def _dtype(gguf: Gguf) -> str:
    codes = {tensor.code for tensor in gguf.tensors.values() if len(tensor.shape) == 2}
    return _DTYPES.get(codes.pop(), "float32") if len(codes) == 1 else "float32"


def _with_rope_scaling(cfg: LlamaConfig, keys: _Keys) -> LlamaConfig:
    factor = keys.get("rope.scaling.factor", keys.get("rope.scale_linear", 0))  # 0: none; the second is an old name
    kind = keys.get("rope.scaling.type", "linear" if factor not in (0, 1) else "none")
    keys.require(kind in ("none", "linear"), "rope.scaling.type", "none or linear (llama3 comes as rope_freqs.weight)")
    if "rope_freqs.weight" in keys.gguf.tensors:
        keys.require(kind == "none", "rope.scaling.type", "none next to a tensor 'rope_freqs.weight'")
        return _llama3(cfg, keys.gguf)
    if kind == "none" or factor in (0, 1):
        return cfg
    key = "rope.scaling.factor" if keys.get("rope.scaling.factor") is not None else "rope.scale_linear"
    return dataclasses.replace(cfg, rope_scaling="linear", rope_factor=keys.number(key))


def _llama3(cfg: LlamaConfig, gguf: Gguf) -> LlamaConfig:
    """The config with the llama3 scaling that gives the divisors of the frequencies in `rope_freqs.weight`.

    The converter stores the divisors alone. With s = (original_length / wavelength - low) / (high - low), clipped to
    [0, 1], a divisor is 1 / ((1 - s) / factor + s). Multiplying low, high and original_length by one number changes
    nothing, so that low = 1 can be assumed.

    Raises:
      InputError: no constants give these divisors.
    """
    tensor = gguf.tensors["rope_freqs.weight"]
    where = f"{gguf.path}: tensor 'rope_freqs.weight'"
    if tensor.code != "F32" or tensor.shape != (cfg.head_dim // 2,):
        raise InputError(f"{where} is {tensor.code} of shape {tensor.shape}: must be F32 ({cfg.head_dim // 2},)")
    divisors = tensor.data.view("<f4").astype(np.float64)
    if np.all(divisors == 1):
        return cfg
    plain = inverse_frequencies(cfg).astype(np.float64)
    factor = float(divisors.max())
    candidates = [_LLAMA3]
    with np.errstate(all="ignore"):
        smooth = (1 / divisors - 1 / factor) / (1 - 1 / factor)
        between = (smooth > 1e-4) & (smooth < 1 - 1e-4)
        if between.sum() >= 2:
            slope, intercept = np.polyfit(plain[between] / (2 * np.pi), smooth[between], 1)
            high = 1 - 1 / intercept
            candidates.append((1.0, round(float(high), 4), slope * (high - 1)))
    for low, high, length in candidates:
        if not (np.isfinite([high, length]).all() and high > low and 1 <= round(length) < 2**31):
            continue
        scaled = dataclasses.replace(
            cfg,
            rope_scaling="llama3",
            rope_factor=factor,
            rope_low_frequency_factor=low,
            rope_high_frequency_factor=high,
            rope_original_length=round(length),
        )
        if np.allclose(inverse_frequencies(scaled), plain / divisors, rtol=_TOLERANCE, atol=0):
            return scaled
    raise InputError(f"{where} has divisors that no llama3 scaling gives: other RoPE scalings are not supported")


def load_config(path: str | Path) -> LlamaConfig:
    """The config of the model in a file. Raises like `read_config`."""
    return read_config(container.read(path))
