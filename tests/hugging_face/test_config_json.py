"""config.json: no constant is lost in either direction, and unsupported features are refused."""

import dataclasses
import json
import shutil

import pytest
from families import CONFIGS, FAMILIES, LLAMA3, REFERENCES

from msn_jax import hugging_face
from msn_jax.cli import InputError
from msn_jax.config import LlamaConfig
from msn_jax.hugging_face import config_json


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_every_constant(family):
    assert hugging_face.is_checkpoint(REFERENCES / family)
    assert hugging_face.read_config(REFERENCES / family) == LlamaConfig(**CONFIGS[family])


def test_keys_of_transformers_4_give_the_same_config(tmp_path):
    values = json.loads((REFERENCES / "llama3" / "config.json").read_text())
    rope = values.pop("rope_parameters")
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    for type_key in ("type", "rope_type"):
        old = values | {"rope_theta": theta, "rope_scaling": {type_key: kind, **rope}, "torch_dtype": "float16"}
        del old["dtype"]
        (tmp_path / "config.json").write_text(json.dumps(old))
        assert hugging_face.read_config(tmp_path) == LlamaConfig(**CONFIGS["llama3"])


def test_absent_keys_have_the_defaults_of_transformers(tmp_path):
    shutil.copy(REFERENCES / "llama2" / "model.safetensors", tmp_path)
    values = json.loads((REFERENCES / "llama2" / "config.json").read_text())
    for key in ("rope_parameters", "dtype", "head_dim", "num_key_value_heads", "tie_word_embeddings", "architectures"):
        del values[key]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert hugging_face.read_config(tmp_path) == LlamaConfig(**CONFIGS["llama2"] | {"rope_theta": 10_000.0})


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, tmp_path):
    cfg = LlamaConfig(**CONFIGS[family])
    for change in ({}, {"sliding_window": 0}, {"d_model": 30}, LLAMA3, {"tie_embeddings": not cfg.tie_embeddings}):
        changed = dataclasses.replace(cfg, **change)
        (tmp_path / "config.json").write_text(json.dumps(config_json.to_json(changed, cfg.dtype, {})))
        assert hugging_face.read_config(tmp_path) == changed
    with pytest.raises(InputError, match="no Hugging Face architecture has both"):
        config_json.to_json(dataclasses.replace(cfg, qkv_bias=True, qk_norm=True), "float32", {})


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        (
            "llama2",
            {"architectures": ["GPT2LMHeadModel"]},
            "key 'architectures' is ['GPT2LMHeadModel']: must be one of",
        ),
        ("llama2", {"architectures": None, "model_type": "gemma"}, "key 'model_type' is 'gemma': must be one of"),
        ("llama2", {"hidden_act": "gelu"}, "key 'hidden_act' is 'gelu': must be \"silu\""),
        ("llama2", {"attention_bias": True}, "key 'attention_bias' is True: must be false"),
        ("qwen3", {"attention_bias": True}, "key 'attention_bias' is True: must be false"),
        ("llama2", {"mlp_bias": True}, "key 'mlp_bias' is True: must be false"),
        ("llama2", {"quantization_config": {"bits": 4}}, "key 'quantization_config' is {'bits': 4}: must be null"),
        ("llama2", {"hidden_size": None}, "key 'hidden_size' is None: must be a positive integer"),
        ("llama2", {"num_hidden_layers": "2"}, "key 'num_hidden_layers' is '2': must be a positive integer"),
        ("llama2", {"num_key_value_heads": 3}, "config.model.n_kv_heads=3: must be a divisor of"),
        ("llama2", {"rms_norm_eps": -1}, "key 'rms_norm_eps' is -1: must be a positive number"),
        ("llama2", {"dtype": "float8"}, "key 'dtype' is 'float8': must be one of float32, bfloat16, float16"),
        ("llama2", {"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "must be of rope_type default, linear"),
        ("llama2", {"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "key 'rope_parameters' is"),
        ("llama2", {"rope_scaling": {"type": "linear"}}, "key 'factor' is missing: must be a positive number"),
        ("llama2", {"partial_rotary_factor": 0.5}, "key 'partial_rotary_factor' is 0.5: must be 1"),
        ("qwen3", {"head_dim": None}, "key 'head_dim' is None: must be a positive integer"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "key 'layer_types' is"),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "a mix of kinds is not supported"),
        ("qwen2", {"max_window_layers": 1}, "key 'max_window_layers' is 1: must be 0 or at least num_hidden_layers=2"),
        ("mistral", {"sliding_window": -4}, "key 'sliding_window' is -4: must be a positive integer"),
        ("llama2", {"vocab_size": 2**40}, "key 'vocab_size' is 1099511627776: must be a positive integer below 2**31"),
        ("llama2", {"rms_norm_eps": 10**400}, "must be a positive number"),
        ("llama2", {"rope_scaling": {"type": ["linear"]}}, "key 'rope_scaling' is"),
        (
            "llama3",
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 2,
                    "low_freq_factor": 1,
                    "high_freq_factor": 4,
                    "original_max_position_embeddings": float("inf"),
                }
            },
            "must be a positive number",
        ),
        ("qwen3", {"layer_types": 2}, "key 'layer_types' is 2: must be a list of strings"),
        ("qwen3", {"layer_types": [["full_attention"]]}, "must be a list of strings"),
    ],
)
def test_unsupported_values_are_refused_by_key(family, change, words, tmp_path):
    values = json.loads((REFERENCES / family / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError) as refusal:
        hugging_face.read_config(tmp_path)
    assert str(refusal.value).startswith(f"{tmp_path}/config.json: ") and "\n" not in str(refusal.value)
    assert words in str(refusal.value)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_rope_settings_without_a_type_are_read_as_default_with_one_warning(key, tmp_path, capsys):
    values = json.loads((REFERENCES / "llama2" / "config.json").read_text())
    del values["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(values | {"rope_theta": 123.0, key: {"factor": 2.0}}))
    for _ in range(2):
        assert hugging_face.read_config(tmp_path) == LlamaConfig(**CONFIGS["llama2"])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path}/config.json: key '{key}' has no 'rope_type': read as 'default'")
    assert "'factor'" in line
    (tmp_path / "config.json").write_text(json.dumps(values | {key: {"rope_theta": 123.0}}))
    assert hugging_face.read_config(tmp_path) == LlamaConfig(**CONFIGS["llama2"])
    assert capsys.readouterr().err == ""
