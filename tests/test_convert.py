"""Conversion between workdirs and Hugging Face directories, and loading models by every kind of name."""

import dataclasses
import json
import os
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
    """A directory with data, `run` (a training workdir) and `export` (the same model as a Hugging Face directory)."""
    directory = tmp_path_factory.mktemp("convert")
    tiny_config.write_data(directory / "train.jsonl")
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        train.train(tiny_config.config_in(directory, steps=2), directory / "run")
    convert(str(directory / "run"), str(directory / "export"))
    return directory


def assert_same_tree(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_an_export_generates_the_same_as_its_workdir(directory):
    run, export = (msn_jax.load(directory / name) for name in ("run", "export"))
    assert_same_tree(export.params, run.params)
    assert export.cfg == run.cfg
    for prompt in PROMPTS:
        assert chat.encode_prompt(export.tokenizer, prompt) == chat.encode_prompt(run.tokenizer, prompt)
    assert export.tokenizer.stop_ids == run.tokenizer.stop_ids
    expected = msn_jax.generate(run, PROMPTS, max_new_tokens=20)
    actual = msn_jax.generate(export, PROMPTS, max_new_tokens=20)
    assert [(generation.tokens, generation.text) for generation in actual] == [
        (generation.tokens, generation.text) for generation in expected
    ]


def test_the_files_of_an_export_and_its_model_card(directory):
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


def test_round_trip_is_exact(directory, tmp_path):
    convert(str(directory / "export"), str(tmp_path / "workdir"))
    params, cfg, run = checkpoint.load_params(tmp_path / "workdir")
    original, original_cfg, _ = checkpoint.load_params(directory / "run")
    assert_same_tree(params, original)
    assert (cfg, run) == (original_cfg, None)
    convert(str(tmp_path / "workdir"), str(tmp_path / "again"))
    weights = [(model / "model.safetensors").read_bytes() for model in (directory / "export", tmp_path / "again")]
    assert weights[0] == weights[1]
    assert "not known" in (tmp_path / "again" / "README.md").read_text()


def test_dtype_rounds_the_export(directory, tmp_path):
    convert(str(directory / "run"), str(tmp_path / "half"), "bfloat16")
    half = pretrained.load(tmp_path / "half", stacked=True)
    whole = pretrained.load(directory / "run", stacked=True, dtype="bfloat16")
    assert half.cfg.param_dtype == whole.cfg.dtype == "bfloat16"
    assert_same_tree(half.params, whole.params)


def converted(directory):
    """Makes the workdir `converted` from `export`, unless it exists."""
    if not (directory / "converted").exists():
        convert(str(directory / "export"), str(directory / "converted"))


@pytest.mark.parametrize("source", ["run", "export", "converted"])
def test_a_run_starts_from_any_kind_of_model(directory, source, tmp_path):
    converted(directory)
    cfg = tiny_config.config_in(directory, steps=1, init_from=str(directory / source))
    cfg.model.param_dtype = "bfloat16"  # differs from the source's
    cfg.optim.learning_rate = 1e-30
    with jax.numpy_dtype_promotion("standard"):
        train.train(cfg, tmp_path / "child")
    params, child_cfg, _ = checkpoint.load_params(tmp_path / "child")
    parent = pretrained.load(directory / "run", stacked=True, dtype="bfloat16").params
    assert child_cfg.param_dtype == "bfloat16"
    assert_same_tree(params, parent)
    files = [tokenizers.load(path).files for path in (directory / source, tmp_path / "child")]
    assert files[0] == files[1]


@pytest.mark.parametrize("source", ["run", "export", "converted"])
def test_a_different_model_in_init_from_is_refused_before_weights_are_read(directory, source, tmp_path, monkeypatch):
    converted(directory)
    monkeypatch.setattr(checkpoint, "load_params", None)
    monkeypatch.setattr(hugging_face, "load_params", None)
    cfg = tiny_config.config_in(directory, steps=1, init_from=str(directory / source))
    cfg.model.rope_theta = 7.0
    with pytest.raises(InputError, match=r"its model has rope_theta=1000\.0, config\.model\.rope_theta is 7\.0"):
        train.train(cfg, tmp_path / "child")


def test_a_run_does_not_resume_a_converted_model(directory, tmp_path):
    convert(str(directory / "export"), str(tmp_path / "workdir"))
    with pytest.raises(InputError, match="is a converted model, not a run"):
        train.train(tiny_config.config_in(directory, steps=1), tmp_path / "workdir")


def test_a_model_of_the_hub_is_downloaded(directory, monkeypatch):
    requests = []

    def snapshot_download(name, allow_patterns):
        requests.append((name, allow_patterns))
        if name == "owner/missing":
            raise OSError("404: no such repository\nand more")
        return str(directory / "export")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert pretrained.directory("owner/model") == directory / "export"
    assert not any("bin" in pattern or "pt" in pattern for pattern in requests[0][1])
    with pytest.raises(InputError, match=r"owner/missing: no such directory, .*\(404: no such repository\)"):
        pretrained.directory("owner/missing")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"owner/model: no such directory.*pip install huggingface_hub"):
        pretrained.directory("owner/model")


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

    def change_config(model, **values):
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | values))

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
        ("pickled", "pickled/pytorch_model.bin: pickles are never read"),
        ("small", "small: the tokenizer has a vocabulary of 320, the model one of 300"),
        ("mute", "mute: no tokenizer"),
        ("broken", "broken/config.json: line 1: broken JSON"),
    ]
    commands.assert_refused(
        "msn_jax.generate", [([f"--model={name}", "--prompt=a"], words) for name, words in cases], tmp_path
    )


def test_invalid_flags_are_refused_and_the_program_converts(directory, tmp_path):
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
        (["--source=mute", "--target=new"], "mute: no tokenizer"),
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


@pytest.mark.parametrize("source", ["run", "export"])
def test_an_impossible_target_is_refused_before_the_model_is_read(directory, source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("kept")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("full")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.rglob("*")), sorted((directory / source).rglob("*"))
    monkeypatch.setattr(pretrained, "load", None)
    monkeypatch.setattr(tokenizers, "load", None)
    in_use = "exists and is not an empty directory"
    cases = [
        (tmp_path / "file", "is a file, not a directory"),
        (tmp_path / "file" / "sub", "file is a file, not a directory"),
        (tmp_path / "file" / "sub" / "deeper", "file is a file, not a directory"),
        (tmp_path / "full", in_use),
        (tmp_path / "link", in_use),
        (tmp_path / "new" / ("n" * 300), "File name too long"),
        (tmp_path / "loop", "cannot make this directory (Too many levels of symbolic links)"),
        (tmp_path / "loop" / "new", "cannot make this directory (Too many levels of symbolic links)"),
        ("/", "is the root of the file system: name a directory in it"),
        ("/proc/new", "cannot make this directory ("),
        ("/proc/new/deeper", "cannot make this directory ("),
        (directory / source, in_use),
        (directory / source / "new", "is inside --source"),
        (directory / source / "checkpoints" / "new" / "deeper", "is inside --source"),
    ]
    for target, words in cases:
        with pytest.raises(InputError) as refusal:
            convert(str(directory / source), str(target))
        assert str(refusal.value).startswith(f"--target={target}: ") and words in str(refusal.value), target
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for target in ("empty", "new", "new/deeper"):
        with pytest.raises(InputError, match=f"--target={tmp_path}/{target}: no permission to write in {tmp_path}"):
            convert(str(directory / source), str(tmp_path / target))
    assert (sorted(tmp_path.rglob("*")), sorted((directory / source).rglob("*"))) == before


def test_an_impossible_target_is_refused_before_a_model_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "directory", None)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match="is a file, not a directory"):
        convert("owner/model", str(tmp_path / "file"))


@pytest.mark.parametrize("generation", [None, {"temperature": 0.6}, {"temperature": 0.6, "eos_token_id": None}])
def test_stop_ids_listed_in_config_json_survive_a_round_trip(directory, generation, tmp_path):
    source = shutil.copytree(directory / "export", tmp_path / "source")
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(values | {"eos_token_id": [2, 11, 12]}))
    (source / "generation_config.json").unlink()
    if generation is not None:
        (source / "generation_config.json").write_text(json.dumps(generation))
    stops = [2, 11, 12]
    assert sorted(msn_jax.load(source).tokenizer.stop_ids) == stops
    convert(str(source), str(tmp_path / "workdir"))
    assert sorted(tokenizers.load(tmp_path / "workdir").stop_ids) == stops
    convert(str(tmp_path / "workdir"), str(tmp_path / "again"))
    for name in ("config.json", "generation_config.json"):
        assert sorted(json.loads((tmp_path / "again" / name).read_text())["eos_token_id"]) == stops
    written = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert written.get("temperature") == (generation or {}).get("temperature")
    assert sorted(msn_jax.load(tmp_path / "again").tokenizer.stop_ids) == stops


@pytest.mark.parametrize("source", ["run", "export", "converted"])
def test_weights_that_are_not_finite_are_refused_wherever_a_model_is_read(directory, source, tmp_path):
    converted(directory)
    bad = shutil.copytree(directory / source, tmp_path / "bad")
    if source == "export":
        tensors = safetensors.numpy.load_file(bad / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
        safetensors.numpy.save_file(tensors, bad / "model.safetensors")
        words = f"{bad}/model.safetensors: tensor 'model.layers.1.mlp.up_proj.weight' has values that are NaN or inf"
    else:
        params, cfg, run = checkpoint.load_params(bad)
        params["layers"]["mlp"]["up"] = params["layers"]["mlp"]["up"].at[1, 4, 3].set(np.nan)
        shutil.rmtree(bad / "checkpoints")
        if run is None:
            checkpoint.save_model(bad, params, cfg)
        else:
            with checkpoint.open_manager(bad, 1) as manager:
                checkpoint.save(manager, 2, params, {"count": np.zeros((), np.int32)}, {}, run)
        step = 0 if run is None else 2
        words = f"{bad}/checkpoints/{step}: parameter 'layers/mlp/up' has values that are NaN or infinite"
    child = tiny_config.config_in(directory, steps=1, init_from=str(bad))
    for read in (
        lambda: msn_jax.load(bad),
        lambda: convert(str(bad), str(tmp_path / "target")),
        lambda: train.train(child, tmp_path / "child"),
    ):
        with jax.numpy_dtype_promotion("standard"), pytest.raises(InputError) as refusal:
            read()
        assert str(refusal.value).startswith(words) and "\n" not in str(refusal.value)
    assert not (tmp_path / "target").exists()


def test_weights_that_overflow_the_requested_dtype_are_refused(directory, tmp_path):
    params, cfg, _ = checkpoint.load_params(directory / "run")
    params["norm"]["scale"] = params["norm"]["scale"].at[3].set(1e5)
    checkpoint.save_model(tmp_path / "large", params, cfg)
    pretrained.load(tmp_path / "large", stacked=False)
    with pytest.raises(InputError, match=r"large: parameter 'norm/scale' .* as float16"):
        pretrained.load(tmp_path / "large", stacked=False, dtype="float16")
