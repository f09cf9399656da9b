"""Hugging Face directories in: equal to what transformers computed, each part where it belongs, and refusals."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, REFERENCES
from safetensors.numpy import load_file, save_file
from test_loop import check_accounts, run, texts

from msn_jax import hugging_face, llama, masks, pretrained, sharding
from msn_jax.cli import InputError
from msn_jax.config import LlamaConfig, MeshConfig
from msn_jax.decode import drafters
from msn_jax.hugging_face import load, names

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
    def parts(params):
        layer, x, own = params["layer_0"], params["embed"][tokens], mask
        rope = llama.rotary_angles(positions, cfg, tokens.shape[1])
        if cfg.sliding_window:
            own = masks.window(mask, positions, positions, cfg.sliding_window)
        norm = llama.RMSNorm(cfg).apply({"params": layer["attention_norm"]}, x)
        attention, (keys, _) = llama.Attention(cfg).apply({"params": layer["attention"]}, norm, rope, own, None)
        return {
            "norm": norm,
            "q_rotated": llama.rotate(jnp.asarray(expected["q"]).swapaxes(1, 2), rope).swapaxes(1, 2),
            "k_rotated": keys,
            "attention": attention,
            "block": llama.Block(cfg).apply({"params": layer}, x, rope, own, None)[0],
            "logits": llama.unembed(params, cfg, llama.forward(params, cfg, tokens, positions, mask).hidden),
        }

    found = parts(params)
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], atol=1e-4, rtol=0, err_msg=name)
    np.testing.assert_array_equal(found["logits"].argmax(-1), expected["logits"].argmax(-1))
    np.testing.assert_array_max_ulp(llama.inverse_frequencies(cfg), expected["inverse_frequencies"], 2)
    assert 1 < np.abs(expected["logits"]).max() < 30  # or 1e-4 would say little


@pytest.mark.parametrize("family", FAMILIES)
def test_is_decoded_as_the_model_says(family):
    """In the form that decoding gives the parameters: the best token behind every text that it makes."""
    cfg = in_float32(REFERENCES / family)
    params = hugging_face.load_params(REFERENCES / family, cfg, stacked=False)
    prompts, max_new = [[5, 9, 7], [11] * 9, [3]], [24, 13, 30]
    state = run(cfg, llama.decode_layout(params, cfg), drafters.get("tr_jacobi"), prompts, max_new)
    check_accounts(state, prompts, max_new)
    whole = state.tokens[:, : max(state.lengths)]

    @jax.jit
    def best(params):
        positions = jnp.broadcast_to(jnp.arange(whole.shape[1], dtype=jnp.int32), whole.shape)
        output = llama.forward(params, cfg, whole, positions, masks.causal(whole.shape[1]))
        return llama.unembed(params, cfg, output.hidden).argmax(axis=-1)

    for prompt, text, behind in zip(prompts, texts(state), best(params), strict=True):
        np.testing.assert_array_equal(behind[len(prompt) - 1 : len(text) - 1], text[len(prompt) :])


def test_parameters_lie_where_the_rules_say(tmp_path):
    cfg = in_float32(REFERENCES / "qwen2")
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    boxed = jax.eval_shape(lambda: llama.init(jax.random.key(0), cfg))
    params = hugging_face.load_params(REFERENCES / "qwen2", cfg, mesh, sharding.TRAIN_RULES)
    places = sharding.shardings(boxed, mesh, sharding.TRAIN_RULES)
    for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(places), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    assert params["layers"]["attention"]["q"].dtype == np.float32


@pytest.mark.parametrize(("stacked", "piece_bytes"), [(True, 1), (False, 3000)])
def test_pieces_make_the_whole(stacked, piece_bytes, monkeypatch):
    source, cfg = REFERENCES / "qwen2", hugging_face.read_config(REFERENCES / "qwen2")
    mesh = sharding.make_mesh(MeshConfig(data=4, fsdp=1, tensor=2))
    whole = hugging_face.load_params(source, cfg, mesh, stacked=stacked)
    monkeypatch.setattr(load, "PIECE_BYTES", piece_bytes)
    pieces = hugging_face.load_params(source, cfg, mesh, stacked=stacked)
    jax.tree.map(np.testing.assert_array_equal, pieces, whole)


# --- Damaged directories


def change_tensors(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("family", "damage", "words"),
    [
        ("llama2", lambda d: (d / "config.json").unlink(), "config.json: is missing"),
        ("llama2", lambda d: (d / "config.json").write_text('{\n"a": 1,\n}'), "config.json: line 3: broken JSON"),
        ("llama2", lambda d: (d / "config.json").write_text("[" * 99_999), "config.json: cannot be read"),
        ("llama2", lambda d: (d / "config.json").write_text("1" * 5000), "config.json: cannot be read"),
        ("llama2", lambda d: (d / "config.json").write_text("[]"), "config.json: must hold a JSON object, not list"),
        ("llama2", lambda d: truncate(d / "model.safetensors"), "model.safetensors: truncated or not"),
        ("llama2", lambda d: (d / "model.safetensors").write_bytes(b""), "model.safetensors: truncated or not"),
        ("llama2", lambda d: (d / "model.safetensors").unlink(), "has no weights: neither model.safetensors nor"),
        (
            "llama2",
            lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
            "pytorch_model.bin: a pickle, which may run any code when it is opened, is never read",
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
            "tensor 'lm_head.weight' has shape (63, 32): config.json makes it (64, 32)",
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
            "is in",
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


def test_accepts_what_older_files_repeat(tmp_path):
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


def test_a_prompt_in_place_of_a_model_is_refused():
    with pytest.raises(InputError, match="too long for the name of a directory"):
        pretrained.directory("Once upon a time " * 20)
