"""config.json <-> `LlamaConfig`.

The reader accepts the keys of transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and of transformers 5
(`rope_parameters`, `dtype`); the writer writes both. For an absent size or constant, transformers falls back to the
value of one particular model of the family (`hidden_size`, `rms_norm_eps`, the kv heads of Mistral and Qwen, the
`head_dim` of Qwen3, ...); here these keys are required. Other absent keys have the same defaults as in transformers. A
feature that `llama.py` does not implement is refused by its key, never ignored.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from msn_jax import config, json_files
from msn_jax.cli import InputError, warn_once
from msn_jax.config import LlamaConfig
from msn_jax.hugging_face.load import stored_dtype

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

_LLAMA, _MISTRAL, _QWEN2, _QWEN3 = ARCHITECTURES
_MODEL_TYPES = {"llama": _LLAMA, "mistral": _MISTRAL, "qwen2": _QWEN2, "qwen3": _QWEN3}
_DTYPE_KEYS = ("dtype", "torch_dtype")
_INTEGER = "a positive integer below 2**31"
# Key -> the only values that `llama.py` implements (None: null or absent); messages suggest the first.
_ONLY = {
    "hidden_act": ("silu", "swish", None),
    "attention_bias": (False, None),  # in Llama and Qwen3 it covers the output projection too; Qwen2 ignores the key
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}
_ROPE_KEYS = {  # field of `LlamaConfig` -> key of `rope_parameters`
    "rope_factor": "factor",
    "rope_low_frequency_factor": "low_freq_factor",
    "rope_high_frequency_factor": "high_freq_factor",
    "rope_original_length": "original_max_position_embeddings",
}


def read_config(directory: str | Path) -> LlamaConfig:
    """The config of the model in a Hugging Face directory. Its `dtype` and `param_dtype` are the stored dtype.

    Raises:
      InputError: config.json is missing or malformed, or the model is not one that `llama.py` implements.
    """
    path = Path(directory) / "config.json"
    keys = _Keys(path, json_files.read(path))
    family = _architecture(keys)
    for key, accepted in _ONLY.items():
        condition = keys.values.get(key) in accepted or (key, family) == ("attention_bias", _QWEN2)
        keys.require(condition, key, json.dumps(accepted[0]))
    d_model, n_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    max_length, n_layers = keys.integer("max_position_embeddings"), keys.integer("num_hidden_layers")
    dtype = next((keys.values[key] for key in _DTYPE_KEYS if keys.values.get(key) is not None), None)
    if dtype is None:
        dtype = stored_dtype(Path(directory))
    dtype = str(dtype).removeprefix("torch.")
    dtype_key = next((key for key in _DTYPE_KEYS if key in keys.values), "dtype")
    keys.require(dtype in config.DTYPES, dtype_key, "one of " + ", ".join(config.DTYPES))
    cfg = LlamaConfig(
        vocab_size=keys.integer("vocab_size"),
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=keys.integer("num_key_value_heads", n_heads if family == _LLAMA else None),
        head_dim=keys.integer("head_dim", None if family == _QWEN3 else d_model // max(n_heads, 1)),
        d_mlp=keys.integer("intermediate_size"),
        max_length=max_length,
        sliding_window=_sliding_window(keys, family, n_layers),
        norm_eps=keys.number("rms_norm_eps", keys.values),
        qkv_bias=family == _QWEN2,
        qk_norm=family == _QWEN3,
        tie_embeddings=keys.boolean("tie_word_embeddings", False),
        dtype=dtype,
        param_dtype=dtype,
        **_rope(keys, max_length),
    )
    try:
        config.check_model(cfg)
    except InputError as error:
        raise InputError(f"{path}: invalid model: {error}") from error
    return cfg


@dataclasses.dataclass(frozen=True)
class _Keys:
    """The keys of a config.json, checked on access."""

    path: Path
    values: Mapping[str, object]

    def require(self, condition: bool, key: str, expected: str, values: Mapping[str, object] | None = None) -> None:
        """Raises InputError about `key` of `values` (default: the top level) unless `condition` is true."""
        values = self.values if values is None else values
        if not condition:
            actual = f"is {values[key]!r}" if key in values else "is missing"
            raise InputError(f"{self.path}: key {key!r} {actual}: must be {expected}")

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer. `default` replaces an absent key or null; without a default the key is required."""
        value = default if self.values.get(key) is None and default is not None else self.values.get(key)
        self.require(isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31, key, _INTEGER)
        return value

    def number(self, key: str, values: Mapping[str, object]) -> float:
        """A positive number, the value of `key` in `values`."""
        value = values.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        self.require(is_number and 0 < value <= sys.float_info.max, key, "a positive number", values)
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        self.require(isinstance(value, bool), key, "true or false")
        return value


def _architecture(keys: _Keys) -> str:
    names = keys.values.get("architectures")
    if names is None:
        known = _MODEL_TYPES.get(str(keys.values.get("model_type")))
        keys.require(known is not None, "model_type", "one of " + ", ".join(_MODEL_TYPES))
        return known
    condition = isinstance(names, list) and len(names) == 1 and names[0] in ARCHITECTURES
    keys.require(condition, "architectures", "one of " + ", ".join(ARCHITECTURES))
    return names[0]


def _sliding_window(keys: _Keys, family: str, n_layers: int) -> int:
    """The window of all layers; 0 for full attention."""
    values = keys.values
    layer_types = values.get("layer_types") or []
    condition = isinstance(layer_types, list) and all(isinstance(kind, str) for kind in layer_types)
    keys.require(condition, "layer_types", "a list of strings")
    kinds = set(layer_types)
    if family == _LLAMA:
        keys.require(kinds <= {"full_attention"}, "layer_types", "full_attention for every layer")
        return 0
    if family == _MISTRAL:
        window = values.get("sliding_window", 4096)
        keys.require(len(kinds) < 2, "layer_types", "the same for all layers")
        return 0 if window is None else keys.integer("sliding_window", 4096)
    if not keys.boolean("use_sliding_window", False) or values.get("sliding_window", 4096) is None:
        keys.require(kinds <= {"full_attention"}, "layer_types", "full_attention unless use_sliding_window is true")
        return 0
    if not kinds:
        first = values.get("max_window_layers", 28)
        condition = isinstance(first, int) and (first <= 0 or first >= n_layers)
        expected = f"0 or at least num_hidden_layers={n_layers}: a mix of layers is not supported"
        keys.require(condition, "max_window_layers", expected)
        kinds = {"sliding_attention" if first <= 0 else "full_attention"}
    keys.require(len(kinds) == 1, "layer_types", "the same for all layers: a mix of kinds is not supported")
    return keys.integer("sliding_window", 4096) if kinds == {"sliding_attention"} else 0


def _rope(keys: _Keys, max_length: int) -> dict[str, object]:
    """The RoPE fields of `LlamaConfig`. As in transformers, a non-empty `rope_scaling` overrides `rope_parameters`, and
    settings without a type are those of plain RoPE.
    """
    values, name = keys.values, "rope_scaling" if keys.values.get("rope_scaling") else "rope_parameters"
    rope = values.get(name) or {}
    keys.require(isinstance(rope, dict), name, "an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = {"default": "none", "linear": "linear", "llama3": "llama3"}
    for_all_layers = not any(isinstance(value, dict) for value in rope.values())
    condition = isinstance(kind, str) and kind in known and for_all_layers
    keys.require(condition, name, "of rope_type default, linear or llama3, the same for all layers")
    keys.require(rope.get("partial_rotary_factor", 1) == 1, "partial_rotary_factor", "1", rope)
    ignored = [repr(key) for key in rope if key not in ("rope_theta", "partial_rotary_factor")]
    if ignored and "rope_type" not in rope and "type" not in rope:
        warn_once(
            f"{keys.path}: key {name!r} has no 'rope_type': read as 'default', which ignores {', '.join(ignored)}, as "
            "transformers does"
        )
    theta = rope if "rope_theta" in rope else {"rope_theta": 10_000.0, **values}
    fields: dict[str, object] = {"rope_theta": keys.number("rope_theta", theta), "rope_scaling": known[kind]}
    for field in config.ROPE_CONSTANTS[known[kind]]:
        fallback = {"original_max_position_embeddings": max_length} if field == "rope_original_length" else {}
        fields[field] = keys.number(_ROPE_KEYS[field], {**fallback, **rope})
    if "rope_original_length" in fields:
        fields["rope_original_length"] = int(fields["rope_original_length"])
    return fields


def to_json(cfg: LlamaConfig, dtype: str, token_ids: Mapping[str, object]) -> dict[str, object]:
    """The content of config.json for a model.

    Args:
      cfg: the model.
      dtype: dtype of the stored parameters: 'float32', 'bfloat16' or 'float16'.
      token_ids: optional values of `bos_token_id`, `eos_token_id` and `pad_token_id`, each an int, a list or None.

    Raises:
      InputError: no architecture in `ARCHITECTURES` combines the features of this model.
    """
    family = architecture(cfg)
    rope = {"rope_type": "default" if cfg.rope_scaling == "none" else cfg.rope_scaling}
    rope |= {_ROPE_KEYS[field]: getattr(cfg, field) for field in config.ROPE_CONSTANTS[cfg.rope_scaling]}
    values = {
        "architectures": [family],
        "model_type": next(name for name, known in _MODEL_TYPES.items() if known == family),
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "intermediate_size": cfg.d_mlp,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "num_key_value_heads": cfg.n_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_length,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tie_embeddings,
        "rope_parameters": {"rope_theta": cfg.rope_theta, **rope},
        "rope_theta": cfg.rope_theta,
        "rope_scaling": None if cfg.rope_scaling == "none" else {"type": cfg.rope_scaling, **rope},
        "dtype": dtype,
        "torch_dtype": dtype,
        **{key: token_ids.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    if family == _MISTRAL:
        values["sliding_window"] = cfg.sliding_window or None
    if family in (_QWEN2, _QWEN3):
        values["use_sliding_window"] = cfg.sliding_window > 0
        values["sliding_window"] = cfg.sliding_window or None
        values["max_window_layers"] = 0 if cfg.sliding_window else cfg.n_layers
        kind = "sliding_attention" if cfg.sliding_window else "full_attention"
        values["layer_types"] = [kind] * cfg.n_layers
    if family in (_LLAMA, _QWEN3):
        values["attention_bias"] = False
    if family == _LLAMA:
        values["mlp_bias"] = False
    return values


def architecture(cfg: LlamaConfig) -> str:
    """The transformers architecture for a model, Llama where several would do. InputError if there is none."""
    if cfg.qkv_bias and cfg.qk_norm:
        raise InputError("config.model.qkv_bias and config.model.qk_norm: no Hugging Face architecture has both")
    if cfg.qkv_bias:
        return _QWEN2
    if cfg.qk_norm:
        return _QWEN3
    # For Llama, transformers requires n_heads to divide d_model; Mistral is the same model without that check.
    return _MISTRAL if cfg.sliding_window or cfg.d_model % cfg.n_heads else _LLAMA
