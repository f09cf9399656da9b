"""Hugging Face directories: equal to what transformers computed (tests/hugging_face), exact both ways, and refusals."""

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401 (safetensors reads bfloat16 only with it)
import numpy as np
import pytest
import random_params
import tiny_config
from safetensors.numpy import load_file, save_file

from msn_jax import config, hugging_face, llama, masks, pretrained, sharding, train
from msn_jax.cli import InputError
from msn_jax.config import LlamaConfig, MeshConfig
from msn_jax.hugging_face import config_json, load, names, save
from msn_jax.hugging_face.directory import model_card

REFERENCES = Path(__file__).parent / "hugging_face"
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


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Half the time of these tests is the compiler's; what they look at does not depend on its optimizations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def in_float32(directory: Path) -> LlamaConfig:
    return dataclasses.replace(hugging_face.read_config(directory), dtype="float32", param_dtype="float32")


def tensors_in(directory: Path) -> dict[str, np.ndarray]:
    return {name: value for path in directory.glob("model*.safetensors") for name, value in load_file(path).items()}


def assert_same_tensors(directory: Path, other: Path) -> None:
    ours, theirs = tensors_in(directory), tensors_in(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name].dtype, ours[name].shape) == (theirs[name].dtype, theirs[name].shape), name
        assert ours[name].tobytes() == theirs[name].tobytes(), name


# --- Equal to transformers


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_every_constant(family):
    assert hugging_face.is_checkpoint(REFERENCES / family)
    assert hugging_face.read_config(REFERENCES / family) == LlamaConfig(**CONFIGS[family])


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
        rope = llama.rotary_angles(positions, cfg)
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


# --- Both ways


@pytest.mark.parametrize("family", FAMILIES)
def test_comes_back_byte_for_byte(family, tmp_path):
    source, cfg = REFERENCES / family, hugging_face.read_config(REFERENCES / family)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    params = hugging_face.load_params(source, cfg, mesh, sharding.TRAIN_RULES)
    hugging_face.export(params, cfg, tmp_path / "once", max_shard_bytes=20_000)
    assert_same_tensors(tmp_path / "once", source)
    assert hugging_face.read_config(tmp_path / "once") == cfg
    again = hugging_face.load_params(tmp_path / "once", cfg, stacked=False)
    jax.tree.map(np.testing.assert_array_equal, again, llama.unstack_layers(jax.device_get(params), cfg))
    hugging_face.export(again, cfg, tmp_path / "twice")
    assert_same_tensors(tmp_path / "twice", source)
    assert not [path for path in tmp_path.iterdir() if path.name not in ("once", "twice")]


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


def test_export_casts_when_it_is_told(tmp_path):
    source, cfg = REFERENCES / "deepseek_coder", hugging_face.read_config(REFERENCES / "deepseek_coder")
    params = hugging_face.load_params(source, cfg)
    hugging_face.export(params, cfg, tmp_path / "half", dtype="bfloat16")
    theirs = {name: value.astype(jnp.bfloat16) for name, value in tensors_in(source).items()}
    jax.tree.map(np.testing.assert_array_equal, tensors_in(tmp_path / "half"), theirs)
    assert hugging_face.read_config(tmp_path / "half").dtype == "bfloat16"


def test_shards_and_their_index(tmp_path):
    cfg = LlamaConfig(**CONFIGS["mistral"])
    hugging_face.export(random_params.stacked(cfg), cfg, tmp_path / "m", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "m" / names.INDEX).read_text())
    assert index["weight_map"].keys() == tensors_in(tmp_path / "m").keys()
    sizes = {}
    for path in sorted((tmp_path / "m").glob("*.safetensors")):
        tensors = load_file(path)
        sizes[path.name] = sum(value.nbytes for value in tensors.values())
        assert {index["weight_map"][name] for name in tensors} == {path.name}
        content = path.read_bytes()
        assert int.from_bytes(content[:8], "little") % 8 == 0  # so that a map of the file is aligned
        assert json.loads(content[8:].split(b"}")[0] + b"}}")["__metadata__"] == {"format": "pt"}
    assert max(sizes.values()) <= 20_000 and sum(sizes.values()) == index["metadata"]["total_size"]
    assert list(sizes) == [f"model-{i:05d}-of-{len(sizes):05d}.safetensors" for i in range(1, len(sizes) + 1)]


def test_the_tables_are_inverse():
    for family in FAMILIES:
        for name in tensors_in(REFERENCES / family):
            ours = names.rename(name, names.FROM_HUGGING_FACE)
            assert names.rename(ours, names.TO_HUGGING_FACE) == name
    assert names.rename("model.layers.0.mlp.gate_proj.bias", names.FROM_HUGGING_FACE) is None


def test_the_rest_of_the_directory(tmp_path):
    run = tiny_config.get_config()
    params, cfg = random_params.stacked(run.model), run.model
    generation = {"bos_token_id": 1, "eos_token_id": [2, 7], "temperature": 0.5}
    hugging_face.export(
        params, cfg, tmp_path / "m", run=run, generation=generation, files={"tokenizer.model": b"\x00t"}
    )
    values = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (values["bos_token_id"], values["eos_token_id"], values["pad_token_id"]) == (1, [2, 7], None)
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text()) == generation
    assert (tmp_path / "m" / "tokenizer.model").read_bytes() == b"\x00t"
    card = (tmp_path / "m" / "README.md").read_text()
    assert "2 segment(s) of 3 `ahead` noise tokens" in card and "40 steps of 8 rows of 32 tokens" in card
    stored = json.loads(card.split("```json\n")[1].split("```")[0])
    assert config.from_dict(stored) == run
    assert "read clean too" not in card
    run.noise.keep_clean = True
    assert "Every batch was read clean too" in model_card(cfg, run)
    run.noise.kind = "none"
    assert "read clean too" not in model_card(cfg, run)
    assert "Supervised fine-tuning" in model_card(cfg, run)
    assert "not known" in model_card(cfg, None)


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    cfg = LlamaConfig(**CONFIGS["llama2"])

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(save, "_to_host", fail)
    with pytest.raises(OSError, match="no space"):
        hugging_face.export(random_params.stacked(cfg), cfg, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


# --- config.json


def test_both_spellings_are_one_config(tmp_path):
    values = json.loads((REFERENCES / "llama3" / "config.json").read_text())
    rope = values.pop("rope_parameters")
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    for type_key in ("type", "rope_type"):
        old = values | {"rope_theta": theta, "rope_scaling": {type_key: kind, **rope}, "torch_dtype": "float16"}
        del old["dtype"]
        (tmp_path / "config.json").write_text(json.dumps(old))
        assert hugging_face.read_config(tmp_path) == LlamaConfig(**CONFIGS["llama3"])


def test_an_absent_key_means_what_it_means_to_transformers(tmp_path):
    shutil.copy(REFERENCES / "llama2" / "model.safetensors", tmp_path)
    values = json.loads((REFERENCES / "llama2" / "config.json").read_text())
    for key in ("rope_parameters", "dtype", "head_dim", "num_key_value_heads", "tie_word_embeddings", "architectures"):
        del values[key]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert hugging_face.read_config(tmp_path) == LlamaConfig(**CONFIGS["llama2"] | {"rope_theta": 10_000.0})


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_read_again(family, tmp_path):
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
        ("qwen3", {"layer_types": 2}, "key 'layer_types' is 2: must be a list of texts"),
        ("qwen3", {"layer_types": [["full_attention"]]}, "must be a list of texts"),
    ],
)
def test_refuses_what_the_model_does_not_have(family, change, words, tmp_path):
    values = json.loads((REFERENCES / family / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError) as refusal:
        hugging_face.read_config(tmp_path)
    assert str(refusal.value).startswith(f"{tmp_path}/config.json: ") and "\n" not in str(refusal.value)
    assert words in str(refusal.value)


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


def test_export_removes_nothing_of_its_neighbours_and_follows_a_link(tmp_path):
    cfg = LlamaConfig(**CONFIGS["llama2"])
    for name in ("m.partial", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "m.partial" / "notes").write_text("mine")
    (tmp_path / "link").symlink_to("empty")
    for name in ("m", "link"):
        hugging_face.export(random_params.stacked(cfg), cfg, tmp_path / name)
        assert hugging_face.read_config(tmp_path / name) == cfg
    assert (tmp_path / "m.partial" / "notes").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"m", "m.partial", "empty", "link"}


def test_a_prompt_in_place_of_a_model_is_refused():
    with pytest.raises(InputError, match="too long for the name of a directory"):
        pretrained.directory("Once upon a time " * 20)


def test_a_run_does_not_replace_a_hugging_face_directory(tmp_path):
    directory = Path(shutil.copytree(REFERENCES / "llama2", tmp_path / "llama2"))
    tiny_config.write_data(tmp_path / "train.jsonl")
    with pytest.raises(InputError, match="llama2: holds a Hugging Face model, whose files a run would replace"):
        train.train(tiny_config.config_in(tmp_path, steps=1), directory)
    assert not (directory / "checkpoints").exists()


def test_export_refuses_a_directory_in_use(tmp_path):
    cfg = LlamaConfig(**CONFIGS["llama2"])
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes").write_text("mine")
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}/m: exists and is not an empty directory")):
        hugging_face.export(random_params.stacked(cfg), cfg, tmp_path / "m")
    assert (tmp_path / "m" / "notes").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(InputError, match="cannot be written in 'float64'"):
        hugging_face.export(random_params.stacked(cfg), cfg, tmp_path / "n", dtype="float64")


# --- Live, where torch and transformers are installed


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", [{}, LLAMA3, {"head_dim": 20, "d_model": 36}, {"n_kv_heads": 1}])
def test_transformers_reads_what_we_write(family, change, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    cfg = LlamaConfig(**CONFIGS[family] | {"dtype": "float32", "param_dtype": "float32"} | change)
    params = random_params.stacked(cfg, gain=1.2)
    hugging_face.export(params, cfg, tmp_path / "ours", max_shard_bytes=50_000)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert type(model).__name__ == config_json.architecture(cfg) and model.dtype == torch.float32
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 40), np.int32)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
    positions = np.broadcast_to(np.arange(40, dtype=np.int32), tokens.shape)
    hidden = jax.jit(functools.partial(llama.forward, cfg=cfg))
    hidden = hidden(params, tokens=tokens, positions=positions, mask=masks.causal(40)).hidden
    ours = llama.unembed(params, cfg, hidden)
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(ours.argmax(-1), theirs.argmax(-1))
    model.save_pretrained(tmp_path / "theirs")
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
    assert hugging_face.read_config(tmp_path / "theirs") == cfg
