"""Loading Hugging Face directories: agreement with transformers, sharding, and refusals of damaged files."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, REFERENCES
from run_loop import check_bookkeeping, run, sequences
from safetensors.numpy import load_file, save_file

from msn_jax import cpu, hugging_face, llama, masks, pretrained, sharding
from msn_jax.cli import InputError
from msn_jax.config import LlamaConfig, MeshConfig
from msn_jax.decode import drafters
from msn_jax.hugging_face import names, stream
from msn_jax.rope import inverse_frequencies, rotary_angles, rotate

pytestmark = pytest.mark.usefixtures("quick_compilation")


def in_float32(directory: Path) -> LlamaConfig:
    return dataclasses.replace(hugging_face.read_config(directory), dtype="float32", param_dtype="float32")


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family):
    cfg, expected = in_float32(REFERENCES / family), load_file(REFERENCES / family / "reference.safetensors")
    params = hugging_face.load_params(REFERENCES / family, cfg, stacked=False)
    tokens = jnp.asarray(expected["tokens"])
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    mask = masks.causal(tokens.shape[1])

    @jax.jit
    def activations(params):
        layer, x, layer_mask = params["layer_0"], params["embed"][tokens], mask
        rope = rotary_angles(positions, cfg, tokens.shape[1])
        if cfg.sliding_window:
            layer_mask = masks.window(mask, positions, positions, cfg.sliding_window)
        norm = llama.RMSNorm(cfg).apply({"params": layer["attention_norm"]}, x)
        attention, (keys, _) = llama.Attention(cfg).apply({"params": layer["attention"]}, norm, rope, layer_mask, None)
        return {
            "norm": norm,
            "q_rotated": rotate(jnp.asarray(expected["q"]).swapaxes(1, 2), rope).swapaxes(1, 2),
            "k_rotated": keys,
            "attention": attention,
            "block": llama.Block(cfg).apply({"params": layer}, x, rope, layer_mask, None)[0],
            "logits": llama.unembed(params, cfg, llama.forward(params, cfg, tokens, positions, mask).hidden),
        }

    actual = activations(params)
    for name, value in actual.items():
        np.testing.assert_allclose(value, expected[name], atol=1e-4, rtol=0, err_msg=name)
    np.testing.assert_array_equal(actual["logits"].argmax(-1), expected["logits"].argmax(-1))
    np.testing.assert_array_max_ulp(inverse_frequencies(cfg), expected["inverse_frequencies"], 2)
    assert 1 < np.abs(expected["logits"]).max() < 30  # so that a tolerance of 1e-4 is strict


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_emits_the_argmax_of_a_full_forward_pass(family):
    """Parameters in the layout that decoding uses, against one causal forward pass over the decoded sequence."""
    cfg = in_float32(REFERENCES / family)
    params = hugging_face.load_params(REFERENCES / family, cfg, stacked=False)
    prompts, max_new = [[5, 9, 7], [11] * 9, [3]], [24, 13, 30]
    state = run(cfg, llama.decode_layout(params, cfg), drafters.get("tr_jacobi"), prompts, max_new)
    check_bookkeeping(state, prompts, max_new)
    tokens = state.tokens[:, : max(state.lengths)]

    @jax.jit
    def predict(params):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        output = llama.forward(params, cfg, tokens, positions, masks.causal(tokens.shape[1]))
        return llama.unembed(params, cfg, output.hidden).argmax(axis=-1)

    for prompt, sequence, predicted in zip(prompts, sequences(state), predict(params), strict=True):
        np.testing.assert_array_equal(predicted[len(prompt) - 1 : len(sequence) - 1], sequence[len(prompt) :])


def test_parameters_are_sharded_by_the_rules():
    cfg = in_float32(REFERENCES / "qwen2")
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    boxed = jax.eval_shape(lambda: llama.init(jax.random.key(0), cfg))
    params = hugging_face.load_params(REFERENCES / "qwen2", cfg, mesh, sharding.TRAIN_RULES)
    shardings = sharding.shardings(boxed, mesh, sharding.TRAIN_RULES)
    for leaf, expected in zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim)
    assert params["layers"]["attention"]["q"].dtype == np.float32


@pytest.mark.parametrize(("stacked", "piece_bytes"), [(True, 1), (False, 3000)])
def test_the_piece_size_changes_no_parameter(stacked, piece_bytes, monkeypatch):
    source, cfg = REFERENCES / "qwen2", hugging_face.read_config(REFERENCES / "qwen2")
    mesh = sharding.make_mesh(MeshConfig(data=4, fsdp=1, tensor=2))
    whole = hugging_face.load_params(source, cfg, mesh, stacked=stacked)
    monkeypatch.setattr(stream, "PIECE_BYTES", piece_bytes)
    pieces = hugging_face.load_params(source, cfg, mesh, stacked=stacked)
    jax.tree.map(np.testing.assert_array_equal, pieces, whole)


@pytest.mark.parametrize(("family", "piece_bytes"), [("qwen2", 300), ("llama2", 1 << 20), ("mistral", 300)])
def test_rows_are_read_as_decode_layout_makes_them(family, piece_bytes, monkeypatch):
    cfg = in_float32(REFERENCES / family)
    monkeypatch.setattr(cpu, "_CACHE_BYTES", 0)
    monkeypatch.setattr(stream, "PIECE_BYTES", piece_bytes)
    expected = llama.decode_layout(hugging_face.load_params(REFERENCES / family, cfg, stacked=False), cfg)
    read = pretrained.load(REFERENCES / family, stacked=False, dtype="float32", rows=True).params
    assert "rows_q_k_v" in read["layer_0"]["attention"]
    jax.tree.map(np.testing.assert_array_equal, read, expected)
    jax.tree.map(np.testing.assert_array_equal, llama.decode_layout(read, cfg), expected)


# --- Damaged directories


def change_tensors(directory: Path, change, file: str = "model.safetensors") -> None:
    tensors = {name: value.copy() for name, value in load_file(directory / file).items()}
    change(tensors)
    save_file(tensors, directory / file)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("family", "damage", "words"),
    [
        ("llama2", lambda d: (d / "config.json").unlink(), "config.json: is missing"),
        ("llama2", lambda d: (d / "config.json").write_text('{\n"a": 1,\n}'), "config.json: line 3: broken JSON"),
        ("llama2", lambda d: (d / "config.json").write_text("[" * 99_999), "config.json: cannot be read"),
        ("llama2", lambda d: (d / "config.json").write_text("1" * 5000), "config.json: cannot be read"),
        ("llama2", lambda d: (d / "config.json").write_text("[]"), "config.json: must be a JSON object, not list"),
        ("llama2", lambda d: truncate(d / "model.safetensors"), "model.safetensors: truncated or not"),
        ("llama2", lambda d: (d / "model.safetensors").write_bytes(b""), "model.safetensors: truncated or not"),
        ("llama2", lambda d: (d / "model.safetensors").unlink(), "has no weights: neither model.safetensors nor"),
        (
            "llama2",
            lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
            "pytorch_model.bin: pickles are never read",
        ),
        (
            "llama2",
            lambda d: change_tensors(d, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
            "tensor 'model.layers.1.mlp.up_proj.weight' is missing",
        ),
        (
            "llama2",
            lambda d: change_tensors(d, lambda t: t.update({"model.layers.2.mlp.up_proj.weight": np.zeros((48, 32))})),
            "tensor 'model.layers.2.mlp.up_proj.weight': unexpected",
        ),
        (
            "llama2",
            lambda d: change_tensors(d, lambda t: t.update({"lm_head.weight": np.zeros((63, 32), np.float32)})),
            "tensor 'lm_head.weight' has shape (63, 32): config.json implies (64, 32)",
        ),
        (
            "llama2",
            lambda d: change_tensors(d, lambda t: t.update({"lm_head.weight": np.zeros((64, 32), np.int8)})),
            "tensor 'lm_head.weight' is I8: must be one of F32, BF16, F16",
        ),
        (
            "llama3",
            lambda d: change_tensors(d, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1})),
            "tensor 'lm_head.weight' differs from 'model.embed_tokens.weight'",
        ),
        ("mistral", lambda d: (d / "model-00002-of-00003.safetensors").unlink(), "00002-of-00003.safetensors: is miss"),
        ("mistral", lambda d: truncate(d / "model-00003-of-00003.safetensors"), "00003-of-00003.safetensors: trunc"),
        ("mistral", lambda d: (d / names.INDEX).write_text('{"weight_map": {}}'), "key 'weight_map' is {}: must name"),
        ("mistral", lambda d: (d / names.INDEX).write_text('{"weight_map": {"a": "../b"}}'), "must be a file name"),
        (
            "mistral",
            lambda d: shutil.copy(d / "model-00001-of-00003.safetensors", d / "model-00002-of-00003.safetensors"),
            "is also in",
        ),
    ],
)  # fmt: skip
def test_refuses_a_damaged_directory(family, damage, words, tmp_path):
    directory = Path(shutil.copytree(REFERENCES / family, tmp_path / family))
    damage(directory)
    with pytest.raises(InputError) as refusal:
        hugging_face.load_params(directory, hugging_face.read_config(directory))
    assert str(refusal.value).startswith(str(directory)) and "\n" not in str(refusal.value)
    assert words in str(refusal.value)


def test_redundant_tensors_of_older_files_are_accepted(tmp_path):
    directory = Path(shutil.copytree(REFERENCES / "llama3", tmp_path / "llama3"))

    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(6, np.float32)

    change_tensors(directory, repeat)
    cfg = hugging_face.read_config(directory)
    jax.tree.map(
        np.testing.assert_array_equal,
        hugging_face.load_params(directory, cfg),
        hugging_face.load_params(REFERENCES / "llama3", cfg),
    )


def test_a_prompt_given_as_a_model_name_is_refused():
    with pytest.raises(InputError, match="too long for the name of a directory"):
        pretrained.directory("Once upon a time " * 20)


# --- Weights that are not finite


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("family", "tensor", "file"),
    [
        ("llama2", "lm_head.weight", "model.safetensors"),
        ("mistral", "model.layers.1.mlp.down_proj.weight", "model-00003-of-00003.safetensors"),
        ("qwen2", "model.layers.1.self_attn.k_proj.bias", "model.safetensors"),
        ("llama3", "model.norm.weight", "model.safetensors"),
    ],
)
def test_a_weight_that_is_not_finite_is_refused_by_tensor_and_file(family, tensor, file, value, tmp_path):
    directory = Path(shutil.copytree(REFERENCES / family, tmp_path / family))

    def corrupt(tensors):
        tensors[tensor].reshape(-1)[-1] = value

    change_tensors(directory, corrupt, file)
    cfg = hugging_face.read_config(directory)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    words = f"{directory}/{file}: tensor '{tensor}' has values that are NaN or infinite"
    for placement, stacked, rows in ((None, False, False), (None, False, True), (mesh, True, False)):
        with pytest.raises(InputError) as refusal:
            hugging_face.load_params(directory, cfg, placement, sharding.TRAIN_RULES, stacked=stacked, rows=rows)
        assert str(refusal.value).startswith(words) and "\n" not in str(refusal.value)


def test_a_weight_that_overflows_the_requested_dtype_is_refused(tmp_path):
    directory = Path(shutil.copytree(REFERENCES / "llama2", tmp_path / "llama2"))
    change_tensors(directory, lambda tensors: tensors["model.norm.weight"].__setitem__(3, 1e5))
    assert pretrained.load(directory, stacked=True).cfg.dtype == "float32"
    with pytest.raises(InputError, match=r"tensor 'model\.norm\.weight' .* as float16"):
        pretrained.load(directory, stacked=True, dtype="float16")


def test_an_absent_output_matrix_points_to_tied_embeddings(tmp_path):
    directory = Path(shutil.copytree(REFERENCES / "llama2", tmp_path / "llama2"))
    change_tensors(directory, lambda tensors: tensors.pop("lm_head.weight"))
    values = json.loads((directory / "config.json").read_text())
    for tied in ({"tie_word_embeddings": False}, {}):
        values.pop("tie_word_embeddings", None)
        (directory / "config.json").write_text(json.dumps(values | tied))
        with pytest.raises(InputError, match=r"'lm_head\.weight' is missing.*'tie_word_embeddings'.*set it to true"):
            hugging_face.load_params(directory, hugging_face.read_config(directory))
    (directory / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": True}))
    assert "unembed" not in hugging_face.load_params(directory, hugging_face.read_config(directory))
