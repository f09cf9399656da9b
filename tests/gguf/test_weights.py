"""Parameters of GGUF models equal those of Hugging Face directories of the same weights."""

import dataclasses

import gguf
import gguf_files
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quantization
from gguf_files import MODELS, assert_refused, assert_same_tree, random_tensors, write_both

from msn_jax import hugging_face, sharding
from msn_jax.config import LlamaConfig, MeshConfig
from msn_jax.gguf import container, load, model
from msn_jax.projections import to_rows

pytestmark = pytest.mark.usefixtures("quick_compilation")

QUANTIZATIONS = [
    ("llama", Quantization.F32),
    ("llama", Quantization.Q4_1),
    ("llama_tied", Quantization.Q8_0),
    ("linear", Quantization.F16),
    ("window", Quantization.BF16),
    ("qwen2", Quantization.Q5_0),
    ("qwen3", Quantization.Q4_0),
]
DEQUANTIZED = [
    kind for kind in Quantization if container.dequantizer(kind.name) is not None and kind is not Quantization.F32
]


@pytest.mark.parametrize(("name", "quantization"), QUANTIZATIONS)
def test_equals_a_hugging_face_directory_of_the_same_weights(tmp_path, name, quantization):
    path, directory, cfg = write_both(tmp_path, name, quantization)
    dtype = {"F16": "float16", "BF16": "bfloat16"}.get(quantization.name, "float32")
    assert model.load_config(path) == dataclasses.replace(cfg, dtype=dtype, param_dtype=dtype)
    actual, expected = load.load_params(path, cfg), hugging_face.load_params(directory, cfg)
    assert_same_tree(actual, expected)
    cfg = dataclasses.replace(cfg, dtype="float32", param_dtype="float32")
    separate, rows = (load.load_params(path, cfg, stacked=False, rows=rows) for rows in (False, True))
    assert_same_tree(rows, {name: to_rows(leaf) if "layer" in name else leaf for name, leaf in separate.items()})


def test_sharded_equals_unsharded(tmp_path, monkeypatch):
    path, directory, cfg = write_both(tmp_path, "llama", Quantization.Q8_0)
    monkeypatch.setattr("msn_jax.hugging_face.stream.PIECE_BYTES", 4096)  # several pieces per tensor
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    actual = load.load_params(path, cfg, mesh, sharding.TRAIN_RULES)
    assert_same_tree(jax.device_get(actual), jax.device_get(hugging_face.load_params(directory, cfg)))


@pytest.mark.parametrize("kind", DEQUANTIZED, ids=lambda kind: kind.name)
def test_every_quantization_is_dequantized_by_slices(kind, tmp_path):
    length, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 64, (6, 3 * size), np.uint8)  # scales in F16 are below 2, and finite
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("w", data, raw_dtype=kind)
    gguf_files.close(writer)
    values = load.Dequantized("w", container.read(tmp_path / "one.gguf").tensors["w"], None)
    expected = gguf.quants.dequantize(data, kind)
    assert values.shape == expected.shape == (6, 3 * length)
    np.testing.assert_array_equal(values[:, :], expected)
    np.testing.assert_array_equal(values[2:5, length // 2 : 2 * length], expected[2:5, length // 2 : 2 * length])


def test_weights_that_are_not_finite_are_refused(tmp_path):
    cfg = LlamaConfig(**MODELS["llama"])
    tensors = random_tensors(cfg)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    gguf_files.write(tmp_path / "nan.gguf", tensors, cfg, quantization=Quantization.F16)
    assert_refused(tmp_path / "nan.gguf", "tensor 'blk.1.ffn_up.weight' has values that are NaN or infinite as float16")
