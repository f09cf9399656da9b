"""Exports of a model with an adapter merged into its weights."""

import dataclasses
import json
import shutil

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_adapter
import random_params
import tiny_config
from refusals import refusal

import msn_jax
from msn_jax import adapter, checkpoint, hugging_face, llama, masks, pretrained, train, workdirs
from msn_jax.cli import InputError
from msn_jax.config import AdapterConfig, NoiseConfig
from msn_jax.convert import convert
from msn_jax.data import tokenizer as tokenizers

pytestmark = pytest.mark.usefixtures("quick_compilation")

MODEL = dataclasses.replace(tiny_config.get_config().model, n_layers=3, n_heads=4, n_kv_heads=2, tie_embeddings=False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory with one random model as a workdir (`workdir`) and as a Hugging Face directory (`hf`)."""
    directory = tmp_path_factory.mktemp("merged")
    tiny_config.write_data(directory / "train.jsonl")
    checkpoint.save_model(directory / "workdir", random_params.stacked(MODEL), MODEL)
    texts = (directory / "train.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizers.train(texts, MODEL.vocab_size, directory / "workdir" / "tokenizer.model")
    convert(str(directory / "workdir"), str(directory / "hf"))
    return directory


def save_adapter(path, model=MODEL, **options):
    return random_adapter.save(path, model, **options)


def logits(model, adapter_directory=None):
    """[T, V] of some tokens, with the adapter active at every token."""
    loaded = pretrained.load(model, stacked=False)
    factors = None
    if adapter_directory is not None:
        read = adapter.load(adapter_directory, loaded.cfg)
        factors = adapter.decode_layout(read.params, read.cfg)
    tokens = jax.random.randint(jax.random.key(2), (1, 24), 0, loaded.cfg.vocab_size)
    inputs = (loaded.params, loaded.cfg, tokens, jnp.arange(24)[None], masks.causal(24))
    return llama.unembed(loaded.params, loaded.cfg, llama.forward(*inputs, adapter=factors).hidden)[0]


@pytest.mark.parametrize("first_layer", [0, 1, 2])
@pytest.mark.parametrize("source", ["hf", "workdir"])
def test_a_merged_export_equals_the_adapted_model(directory, source, first_layer, tmp_path):
    adapter_directory = save_adapter(tmp_path / "adapter", first_layer=first_layer)
    convert(str(directory / source), str(tmp_path / "merged"), adapter=str(adapter_directory))
    adapted = logits(directory / source, adapter_directory)
    np.testing.assert_allclose(logits(tmp_path / "merged"), adapted, rtol=0, atol=1e-5)
    assert jnp.abs(adapted - logits(directory / source)).max() > 0.1


def test_the_sum_is_rounded_once_to_the_dtype_of_the_weights(directory, tmp_path):
    adapter_directory = save_adapter(tmp_path / "adapter", scale=0.01)
    convert(str(directory / "hf"), str(tmp_path / "merged"), "bfloat16", str(adapter_directory))
    ours = pretrained.load(tmp_path / "merged", stacked=True)
    assert ours.cfg.param_dtype == "bfloat16"
    base = pretrained.load(directory / "hf", stacked=True, dtype="bfloat16").params["layers"]["mlp"]["up"]
    read = adapter.load(adapter_directory, MODEL)
    a, b = read.params["up"]
    exact = np.asarray(base, np.float64) + np.einsum("lir,lro->lio", a, b, dtype=np.float64) * 2
    error = np.abs(np.asarray(ours.params["layers"]["mlp"]["up"], np.float64) - exact)
    # Half a unit in the last of the 8 bits of bfloat16.
    np.testing.assert_array_less(error, np.exp2(np.floor(np.log2(np.abs(exact))) - 8) * 1.001 + 1e-9)


def test_weights_that_overflow_with_the_adapter_are_refused(directory, tmp_path):
    adapter_directory = save_adapter(tmp_path / "adapter", scale=1e5)
    words = refusal(convert, str(directory / "hf"), str(tmp_path / "merged"), "float16", str(adapter_directory))
    assert words.startswith(f"--adapter={adapter_directory}: merged: parameter 'layers/") and "as float16" in words
    assert not (tmp_path / "merged").exists()


def test_tokenizer_chat_template_and_generation_config_go_along(directory, tmp_path):
    source = shutil.copytree(directory / "hf", tmp_path / "source")
    (source / "generation_config.json").write_text('{"eos_token_id": 7, "temperature": 0.6}')
    (source / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] }}!{% endfor %}")
    convert(str(source), str(tmp_path / "merged"), adapter=str(save_adapter(tmp_path / "adapter")))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "merged" / name).read_bytes() == (source / name).read_bytes()
    generation = json.loads((tmp_path / "merged" / "generation_config.json").read_text())
    stops = list(tokenizers.load(source).stop_ids)
    assert (generation["temperature"], generation["eos_token_id"]) == (0.6, stops) and 7 in stops


def run_config(directory, gate):
    cfg = tiny_config.config_in(directory, steps=3, init_from=str(directory / "hf"))
    cfg.model, cfg.adapter = MODEL, AdapterConfig(rank=4, alpha=8.0, first_layer=1, gate=gate)
    cfg.noise = NoiseConfig(kind="ahead", length=2, blocks=4 if gate == "noise" else 0)
    cfg.optim = dataclasses.replace(cfg.optim, learning_rate=0.1, warmup_steps=0)
    return cfg


@pytest.fixture(scope="module")
def runs(directory):
    """`all` and `noise`: the workdirs of runs with this gate for the model `hf`. The latter has only the files."""
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        assert train.train(run_config(directory, "all"), directory / "all")
    save_adapter(directory / "noise" / workdirs.ADAPTER, gate="noise")
    shutil.copy(directory / "all" / "tokenizer.json", directory / "noise")
    shutil.copy(directory / "all" / "tokenizer_config.json", directory / "noise")
    with checkpoint.open_manager(directory / "noise", 1) as manager:
        checkpoint.save(manager, 3, {"a": np.zeros(1)}, {"b": np.zeros(1)}, {}, run_config(directory, "noise"))
    return directory


def test_the_workdir_of_an_ungated_adapter_becomes_its_model_with_the_adapter_merged(runs, tmp_path):
    convert(str(runs / "all"), str(tmp_path / "merged"))
    adapted = logits(runs / "hf", runs / "all" / workdirs.ADAPTER)
    np.testing.assert_allclose(logits(tmp_path / "merged"), adapted, rtol=0, atol=1e-5)
    assert jnp.abs(adapted - logits(runs / "hf")).max() > 0.1
    assert "1 segment(s) of 2 `ahead` noise tokens" in (tmp_path / "merged" / "README.md").read_text()
    settings = {"decoder": "autoregressive", "max_new_tokens": 12}
    adapted = msn_jax.load(runs / "hf", adapter=runs / "all" / workdirs.ADAPTER)
    expected, ours = (
        msn_jax.generate(model, ["two and five"], **settings)[0]
        for model in (adapted, msn_jax.load(tmp_path / "merged"))
    )
    assert ours.tokens == expected.tokens


def test_what_cannot_be_merged_is_refused_in_one_line(runs, tmp_path):
    save_adapter(tmp_path / "wide", model=dataclasses.replace(MODEL, d_mlp=48))
    good, gated = save_adapter(tmp_path / "good"), runs / "noise" / workdirs.ADAPTER
    moved = shutil.copytree(runs / "all", tmp_path / "moved", ignore=lambda *_: [workdirs.ADAPTER])
    is_gated = (
        f"--adapter={gated}: is active at noise tokens only, so it cannot be merged into the weights: convert the "
        f"model alone, and decode with --model={runs / 'hf'} --adapter={gated}"
    )
    cases = [
        (runs / "hf", gated, "new", is_gated),
        (runs / "noise", None, "new", is_gated),
        (runs / "all", good, "new", f"leave out --adapter, or use --source={runs / 'hf'}"),
        (runs / "hf", tmp_path / "wide", "new", "/wide: tensor base_model.model.model.layers.0.mlp.gate_proj.lora_B"),
        (runs / "hf", tmp_path / "none", "new", "/none: has no adapter_config.json"),
        (runs / "hf", good, "good/new", f"/good/new: is inside --adapter={good}: name a directory outside of it"),
        (moved, None, "new", "/moved/adapter: has no adapter_config.json"),
    ]
    for source, adapter_directory, target, words in cases:
        given = None if adapter_directory is None else str(adapter_directory)
        assert words in refusal(convert, str(source), str(tmp_path / target), None, given)
        assert not (tmp_path / target).exists()


def test_the_program_merges(runs, tmp_path):
    save_adapter(tmp_path / "good")
    flags = [f"--source={runs / 'hf'}", "--target=new"]
    gated = f"--adapter={runs / 'noise' / workdirs.ADAPTER}"
    commands.assert_refused("msn_jax.convert", [([*flags, gated], "is active at noise tokens only")], tmp_path)
    results = commands.run("msn_jax.convert", [[*flags, "--adapter=good"]], tmp_path)
    assert results == [(0, "new: written\n", "")]
    assert hugging_face.is_checkpoint(tmp_path / "new")


def test_an_adapter_whose_model_is_gone_names_the_flags_that_help(runs, tmp_path, monkeypatch):
    directory = pretrained.directory

    def gone(name):
        if str(name) == str(runs / "hf"):
            raise InputError("gone")
        return directory(name)

    monkeypatch.setattr(pretrained, "directory", gone)
    words = refusal(convert, str(runs / "all"), str(tmp_path / "merged"))
    assert words == (
        f"{runs / 'all'}: holds an adapter, whose model is not there (gone): use --source=MODEL "
        f"--adapter={runs / 'all' / workdirs.ADAPTER}"
    )


def test_a_program_that_needs_a_model_says_how_to_merge(runs):
    with pytest.raises(
        InputError, match=rf"or python -m msn_jax.convert --source={runs / 'all'} --target=DIR to merge"
    ):
        msn_jax.load(runs / "all")
