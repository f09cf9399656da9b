"""One tiny model per family, written by transformers (`make_references.py`), and the config expected for each."""

from pathlib import Path

import ml_dtypes  # noqa: F401 (registers bfloat16 for safetensors)
import numpy as np
from safetensors.numpy import load_file

REFERENCES = Path(__file__).parent
FAMILIES = ("llama2", "llama3", "deepseek_coder", "mistral", "qwen2", "qwen3")
SHAPE = {
    "vocab_size": 64,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 8,
    "d_mlp": 48,
    "max_length": 96,
    "rope_scaling": "none",
    "sliding_window": 0,
    "qkv_bias": False,
    "qk_norm": False,
    "tie_embeddings": False,
    "dtype": "float32",
    "param_dtype": "float32",
}
LLAMA3 = {
    "rope_scaling": "llama3",
    "rope_factor": 5.0,
    "rope_low_frequency_factor": 1.5,
    "rope_high_frequency_factor": 6.0,
    "rope_original_length": 24,
}
HALF = {"dtype": "float16", "param_dtype": "float16"}
BFLOAT = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
CONFIGS = {
    "llama2": SHAPE | {"n_kv_heads": 4, "norm_eps": 3e-2, "rope_theta": 123.0},
    "llama3": SHAPE | LLAMA3 | HALF | {"norm_eps": 2e-2, "rope_theta": 567.0, "head_dim": 12, "tie_embeddings": True},
    "deepseek_coder": SHAPE | {"norm_eps": 1e-2, "rope_theta": 345.0, "rope_scaling": "linear", "rope_factor": 3.0},
    "mistral": SHAPE | {"norm_eps": 5e-3, "rope_theta": 77.0, "head_dim": 10, "sliding_window": 6},
    "qwen2": SHAPE
    | BFLOAT
    | {"norm_eps": 4e-2, "rope_theta": 999.0, "tie_embeddings": True, "sliding_window": 7, "qkv_bias": True},
    "qwen3": SHAPE | {"norm_eps": 6e-3, "rope_theta": 4321.0, "head_dim": 14, "qk_norm": True},
}


def tensors_in(directory: Path) -> dict[str, np.ndarray]:
    return {name: value for path in directory.glob("model*.safetensors") for name, value in load_file(path).items()}


def assert_same_tensors(directory: Path, other: Path) -> None:
    actual, expected = tensors_in(directory), tensors_in(other)
    assert actual.keys() == expected.keys()
    for name in actual:
        assert (actual[name].dtype, actual[name].shape) == (expected[name].dtype, expected[name].shape), name
        assert actual[name].tobytes() == expected[name].tobytes(), name
