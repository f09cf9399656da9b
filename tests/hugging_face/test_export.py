"""Exporting Hugging Face directories: exact round trips, atomic writes, and no user file is replaced."""

import functools
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_params
import tiny_config
from families import CONFIGS, FAMILIES, LLAMA3, REFERENCES, assert_same_tensors, tensors_in
from safetensors.numpy import load_file

from msn_jax import config, hugging_face, llama, masks, sharding, train
from msn_jax.cli import InputError
from msn_jax.config import LlamaConfig, MeshConfig
from msn_jax.hugging_face import config_json, names, save
from msn_jax.hugging_face.directory import model_card

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_exact(family, tmp_path):
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


def test_dtype_casts_the_export(tmp_path):
    source, cfg = REFERENCES / "deepseek_coder", hugging_face.read_config(REFERENCES / "deepseek_coder")
    params = hugging_face.load_params(source, cfg)
    hugging_face.export(params, cfg, tmp_path / "half", dtype="bfloat16")
    expected = {name: value.astype(jnp.bfloat16) for name, value in tensors_in(source).items()}
    jax.tree.map(np.testing.assert_array_equal, tensors_in(tmp_path / "half"), expected)
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
        assert int.from_bytes(content[:8], "little") % 8 == 0  # so that memory-mapped values are aligned
        assert json.loads(content[8:].split(b"}")[0] + b"}}")["__metadata__"] == {"format": "pt"}
    assert max(sizes.values()) <= 20_000 and sum(sizes.values()) == index["metadata"]["total_size"]
    assert list(sizes) == [f"model-{i:05d}-of-{len(sizes):05d}.safetensors" for i in range(1, len(sizes) + 1)]


def test_the_tables_of_names_are_inverse():
    for family in FAMILIES:
        for name in tensors_in(REFERENCES / family):
            parameter = names.rename(name, names.FROM_HUGGING_FACE)
            assert names.rename(parameter, names.TO_HUGGING_FACE) == name
    assert names.rename("model.layers.0.mlp.gate_proj.bias", names.FROM_HUGGING_FACE) is None


def test_configs_model_card_and_tokenizer_files(tmp_path):
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
    assert "# A model fine-tuned with msn_jax" in card and "tags: [make-some-noise" in card
    run.noise.blocks = 7
    assert "7 blocks of 3 `ahead` noise tokens appended to every row" in model_card(cfg, run)
    run.noise.kind = "none"
    assert "noise tokens" not in model_card(cfg, run)
    assert "Supervised fine-tuning" in model_card(cfg, run)
    assert "make-some-noise" not in model_card(cfg, run)
    unknown = model_card(cfg, None)
    assert "# A model converted by msn_jax" in unknown and "not known" in unknown
    assert "fine-tuned" not in unknown and "make-some-noise" not in unknown


# --- Atomicity


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    cfg = LlamaConfig(**CONFIGS["llama2"])

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(save, "_to_host", fail)
    with pytest.raises(OSError, match="no space"):
        hugging_face.export(random_params.stacked(cfg), cfg, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_export_keeps_sibling_directories_and_follows_a_link(tmp_path):
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


def test_export_refuses_a_directory_in_use(tmp_path):
    cfg = LlamaConfig(**CONFIGS["llama2"])
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes").write_text("mine")
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}/m: exists and is not an empty directory")):
        hugging_face.export(random_params.stacked(cfg), cfg, tmp_path / "m")
    assert (tmp_path / "m" / "notes").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(InputError, match="cannot be written in 'float64'"):
        hugging_face.export(random_params.stacked(cfg), cfg, tmp_path / "n", dtype="float64")


def test_a_run_does_not_replace_a_hugging_face_directory(tmp_path):
    directory = Path(shutil.copytree(REFERENCES / "llama2", tmp_path / "llama2"))
    tiny_config.write_data(tmp_path / "train.jsonl")
    with pytest.raises(InputError, match="llama2: holds a Hugging Face model, whose files a run would replace"):
        train.train(tiny_config.config_in(tmp_path, steps=1), directory)
    assert not (directory / "checkpoints").exists()


# --- Against transformers, where it is installed


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", [{}, LLAMA3, {"head_dim": 20, "d_model": 36}, {"n_kv_heads": 1}])
def test_transformers_computes_the_same_logits_from_an_export(family, change, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    cfg = LlamaConfig(**CONFIGS[family] | {"dtype": "float32", "param_dtype": "float32"} | change)
    params = random_params.stacked(cfg, gain=1.2)
    hugging_face.export(params, cfg, tmp_path / "export", max_shard_bytes=50_000)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", attn_implementation="eager").eval()
    assert type(model).__name__ == config_json.architecture(cfg) and model.dtype == torch.float32
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 40), np.int32)
    with torch.no_grad():
        expected = model(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
    positions = np.broadcast_to(np.arange(40, dtype=np.int32), tokens.shape)
    hidden = jax.jit(functools.partial(llama.forward, cfg=cfg))
    hidden = hidden(params, tokens=tokens, positions=positions, mask=masks.causal(40)).hidden
    logits = llama.unembed(params, cfg, hidden)
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    np.testing.assert_array_equal(logits.argmax(-1), expected.argmax(-1))
    model.save_pretrained(tmp_path / "saved")
    assert_same_tensors(tmp_path / "export", tmp_path / "saved")
    assert hugging_face.read_config(tmp_path / "saved") == cfg
