"""Workdir <-> Hugging Face directory, as users do it, and every way a model can be named."""

import dataclasses
import json
import shutil
import sys
import types

import commands
import jax
import numpy as np
import pytest
import random_params
import safetensors.numpy
import tiny_config

import msn_jax
from msn_jax import checkpoint, hugging_face, pretrained, train
from msn_jax.cli import InputError
from msn_jax.convert import convert
from msn_jax.data import chat
from msn_jax.data import tokenizer as tokenizers

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPTS = ["the cat", [{"role": "user", "content": "sat on"}]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Holds data, `run`: a training workdir, and `export`: the same model as a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("convert")
    tiny_config.write_data(directory / "train.jsonl")
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        train.train(tiny_config.config_in(directory, steps=2), directory / "run")
    convert(str(directory / "run"), str(directory / "export"))
    return directory


def assert_same_tree(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_an_export_answers_as_its_workdir(directory):
    ours, theirs = (msn_jax.load(directory / name) for name in ("run", "export"))
    assert_same_tree(ours.params, theirs.params)
    assert ours.cfg == theirs.cfg
    for prompt in PROMPTS:
        assert chat.encode_prompt(ours.tokenizer, prompt) == chat.encode_prompt(theirs.tokenizer, prompt)
    assert theirs.tokenizer.stop_ids == ours.tokenizer.stop_ids
    expected = msn_jax.generate(ours, PROMPTS, max_new_tokens=20)
    answers = msn_jax.generate(theirs, PROMPTS, max_new_tokens=20)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]
    assert [answer.text for answer in answers] == [answer.text for answer in expected]


def test_an_export_says_how_it_was_trained(directory):
    names = {path.name for path in (directory / "export").iterdir()}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert "2 segment(s) of 3 `ahead` noise tokens" in (directory / "export" / "README.md").read_text()
    generation = json.loads((directory / "export" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == list(msn_jax.load(directory / "run").tokenizer.stop_ids)


def test_there_and_back_changes_no_bit(directory, tmp_path):
    convert(str(directory / "export"), str(tmp_path / "workdir"))
    params, cfg, run = checkpoint.load_params(tmp_path / "workdir")
    original, original_cfg, _ = checkpoint.load_params(directory / "run")
    assert_same_tree(params, original)
    assert (cfg, run) == (original_cfg, None)
    convert(str(tmp_path / "workdir"), str(tmp_path / "again"))
    weights = [(place / "model.safetensors").read_bytes() for place in (directory / "export", tmp_path / "again")]
    assert weights[0] == weights[1]
    assert "not known" in (tmp_path / "again" / "README.md").read_text()


def test_dtype_rounds_the_export(directory, tmp_path):
    convert(str(directory / "run"), str(tmp_path / "half"), "bfloat16")
    half = pretrained.load(tmp_path / "half", stacked=True)
    whole = pretrained.load(directory / "run", stacked=True, dtype="bfloat16")
    assert half.cfg.param_dtype == whole.cfg.dtype == "bfloat16"
    assert_same_tree(half.params, whole.params)


def converted(directory):
    """Makes the workdir `converted`, which no run of ours wrote."""
    if not (directory / "converted").exists():
        convert(str(directory / "export"), str(directory / "converted"))


@pytest.mark.parametrize("source", ["run", "export", "converted"])
def test_a_run_starts_from_any_of_them(directory, source, tmp_path):
    converted(directory)
    cfg = tiny_config.config_in(directory, steps=1, init_from=str(directory / source))
    cfg.model.param_dtype = "bfloat16"  # the run's own, whatever the source has
    cfg.optim.learning_rate = 1e-30
    with jax.numpy_dtype_promotion("standard"):
        train.train(cfg, tmp_path / "child")
    params, child_cfg, _ = checkpoint.load_params(tmp_path / "child")
    parent = pretrained.load(directory / "run", stacked=True, dtype="bfloat16").params
    assert child_cfg.param_dtype == "bfloat16"
    assert_same_tree(params, parent)
    files = [tokenizers.load(place).files for place in (directory / source, tmp_path / "child")]
    assert files[0] == files[1]


@pytest.mark.parametrize("source", ["run", "export", "converted"])
def test_a_run_from_another_shape_is_refused_before_a_weight_is_read(directory, source, tmp_path, monkeypatch):
    converted(directory)
    monkeypatch.setattr(checkpoint, "load_params", None)
    monkeypatch.setattr(hugging_face, "load_params", None)
    cfg = tiny_config.config_in(directory, steps=1, init_from=str(directory / source))
    cfg.model.rope_theta = 7.0
    with pytest.raises(InputError, match=r"its model has rope_theta=1000\.0, config\.model\.rope_theta is 7\.0"):
        train.train(cfg, tmp_path / "child")


def test_a_converted_model_is_no_run(directory, tmp_path):
    convert(str(directory / "export"), str(tmp_path / "workdir"))
    with pytest.raises(InputError, match="holds a converted model and no run"):
        train.train(tiny_config.config_in(directory, steps=1), tmp_path / "workdir")


def test_a_name_of_the_hub_is_fetched(directory, monkeypatch):
    requests = []

    def snapshot_download(name, allow_patterns):
        requests.append((name, allow_patterns))
        if name == "nobody/nothing":
            raise OSError("404: no such repository\nand more")
        return str(directory / "export")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert pretrained.directory("somebody/model") == directory / "export"
    assert not any("bin" in pattern or "pt" in pattern for pattern in requests[0][1])
    with pytest.raises(InputError, match=r"nobody/nothing: no such directory, .*\(404: no such repository\)"):
        pretrained.directory("nobody/nothing")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"somebody/model: no such directory.*pip install huggingface_hub"):
        pretrained.directory("somebody/model")


@pytest.mark.parametrize("source", ["run", "export"])
def test_a_conversion_that_fails_leaves_nothing(directory, source, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_model", fail)  # the tokenizer is there by then
    monkeypatch.setattr(hugging_face.directory.save, "save", fail)  # and so is config.json
    with pytest.raises(OSError, match="no space left"):
        convert(str(directory / source), str(tmp_path / "target"))
    assert list(tmp_path.iterdir()) == []


def test_an_export_keeps_the_settings_of_generation_and_names_every_stop(directory, tmp_path):
    source = shutil.copytree(directory / "export", tmp_path / "source")
    (source / "generation_config.json").write_text('{"eos_token_id": 7, "temperature": 0.6}')
    convert(str(source), str(tmp_path / "workdir"))
    convert(str(tmp_path / "workdir"), str(tmp_path / "again"))
    written = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    stops = list(msn_jax.load(source).tokenizer.stop_ids)
    assert (written["eos_token_id"], written["temperature"]) == (stops, 0.6)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["eos_token_id"] == stops
    assert len(stops) > 1


def test_a_damaged_export_is_one_line_and_exit_code_2(directory, tmp_path):
    def damaged(name):
        return shutil.copytree(directory / "export", tmp_path / name)

    def change_config(place, **values):
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(config | values))

    weights = damaged("truncated") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    change_config(damaged("wrong_shape"), intermediate_size=48)
    tensors = safetensors.numpy.load_file(directory / "export" / "model.safetensors")
    removed = tensors.pop("model.layers.1.mlp.up_proj.weight")
    safetensors.numpy.save_file(tensors, damaged("missing") / "model.safetensors")
    tensors |= {"model.layers.1.mlp.up_proj.weight": removed, "model.layers.2.mlp.up_proj.weight": removed}
    safetensors.numpy.save_file(tensors, damaged("extra") / "model.safetensors")
    change_config(damaged("unknown"), architectures=["MambaForCausalLM"], model_type="mamba")
    pickled = damaged("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    small = dataclasses.replace(tiny_config.get_config().model, vocab_size=300)
    hugging_face.export(random_params.stacked(small), small, tmp_path / "small")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(directory / "export" / name, tmp_path / "small")
    (damaged("mute") / "tokenizer.json").unlink()
    (damaged("broken") / "config.json").write_text('{"architectures": [')
    cases = [
        ("truncated", "truncated/model.safetensors: truncated or not a safetensors file"),
        ("wrong_shape", "wrong_shape/model.safetensors: tensor 'model.layers.0.mlp.down_proj.weight'"),
        ("missing", "model.layers.1.mlp.up_proj.weight"),
        ("extra", "model.layers.2.mlp.up_proj.weight"),
        ("unknown", "unknown/config.json: key 'architectures' is ['MambaForCausalLM']"),
        ("pickled", "pickled/pytorch_model.bin: a pickle"),
        ("small", "small: the tokenizer has a vocabulary of 320, the model one of 300"),
        ("mute", "mute: no tokenizer here"),
        ("broken", "broken/config.json: line 1: broken JSON"),
    ]
    commands.assert_refused(
        "msn_jax.generate", [([f"--model={name}", "--prompt=a"], words) for name, words in cases], tmp_path
    )


def test_the_program_and_what_it_refuses(directory, tmp_path):
    run, export = (f"--source={directory / name}" for name in ("run", "export"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("kept")
    cfg = tiny_config.get_config().model
    wide = dataclasses.replace(cfg, vocab_size=328)
    checkpoint.save_model(tmp_path / "wide", random_params.stacked(wide), wide)
    tokenizers.save(tokenizers.load(directory / "run"), tmp_path / "wide")
    checkpoint.save_model(tmp_path / "mute", random_params.stacked(cfg), cfg)
    cases = [
        ([run, "--target=full"], "--target=full: exists and is not an empty directory"),
        ([export, "--target=full"], "--target=full: exists and is not an empty directory"),
        (["--source=nowhere", "--target=new"], "nowhere: not a training workdir"),
        ([run], "--target"),
        (["--source=wide", "--target=new"], "the tokenizer has a vocabulary of 320, the model one of 328"),
        (["--source=mute", "--target=new"], "mute: no tokenizer here"),
        ([run, "--target=new", "--dtype=int8"], "--dtype"),
        ([run, f"--target={'n' * 300}"], "n: cannot make this directory (File name too long)"),
        ([export, f"--target={'n' * 300}"], "n: cannot make this directory (File name too long)"),
        ([run, f"--target={'n' * 250}"], "n: cannot make this directory (File name too long)"),
        ([f"--source={'n' * 300}/run", "--target=new"], "run: too long for the name of a directory"),
    ]
    commands.assert_refused("msn_jax.convert", cases, tmp_path)
    assert (tmp_path / "full" / "precious").read_text() == "kept"
    assert not (tmp_path / "new").exists()
    ((code, out, _),) = commands.run("msn_jax.convert", [[run, "--target=new"]], tmp_path)
    assert (code, out) == (0, "new: written\n")
    assert hugging_face.is_checkpoint(tmp_path / "new")
