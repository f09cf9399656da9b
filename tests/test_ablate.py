"""Ablations: a tiny grid from training to report, interruptions, refusals, and the grids of configs/ablations/."""

import dataclasses
import importlib
import json
import shutil
from pathlib import Path

import commands
import jax
import pytest
import random_params
import test_configs
import tiny_config
from refusals import refusal

from msn_jax import ablate, ablation, ablation_report, checkpoint, config, metrics, outputs, train
from msn_jax.ablation import OWN, Ablation, Decoding, Prompts, Setting
from msn_jax.config import AdapterConfig, NoiseConfig
from msn_jax.data import tokenizer as tokenizers
from msn_jax.decode import tree as trees
from msn_jax.decode.tree import JACOBI
from msn_jax.evals.statistics import repeated_4_grams

pytestmark = pytest.mark.usefixtures("quick_compilation")

FIGURES = {"mean_accepted_tokens", "exact_share", "repeated_4_grams"}
GATED = "training-gated_length-2"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ablate")
    tiny_config.write_data(directory / "train.jsonl")
    return directory


def grid_of(directory, **fields):
    """A gated adapter for a base that is trained first."""
    base, gated = (tiny_config.config_in(directory, steps=steps, log_every=100) for steps in (4, 2))
    gated.noise, gated.adapter = NoiseConfig(blocks=4, length=2), AdapterConfig(rank=2)
    grid = Ablation(
        name="tiny",
        factors=("training", "length"),
        settings=(Setting({"training": "gated", "length": 2}, gated, base="base"),),
        seeds=(3,),
        decodings=(Decoding("jacobi", trees.chain(JACOBI, 2), "chain"),),
        prompts=Prompts(count=3),
        max_new_tokens=8,
        batch_size=2,
        bases={"base": base},
    )
    return dataclasses.replace(grid, **fields)


def run(grid, workdir):
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        return ablate.ablate(grid, workdir)


@pytest.fixture(scope="module")
def report(directory):
    """Of a real training; but the base is a random model."""
    trained, real = [], train.train

    def train_all_but_the_base(cfg, workdir):
        trained.append(workdir.relative_to(directory / "undisturbed").as_posix())
        if trained[1:]:
            return real(cfg, workdir)
        checkpoint.save_model(workdir, random_params.stacked(cfg.model), cfg.model)
        texts = (directory / "train.jsonl").read_text().splitlines()
        tokenizers.save(tokenizers.train(texts, cfg.model.vocab_size, directory / "tokenizer.model"), workdir)
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train", train_all_but_the_base)
        report = run(grid_of(directory), directory / "undisturbed")
    assert trained == ["base", f"{GATED}/seed-3"]
    return report


def test_the_report_has_every_run_and_row(report, directory):
    assert json.loads((directory / "undisturbed" / "report.json").read_text()) == report
    assert (directory / "undisturbed" / "report.png").stat().st_size > 10_000
    assert {"hardware", "versions", "commit", "command"} <= report.keys()
    assert (report["ablation"], report["factors"]) == ("tiny", ["training", "length"])
    [one] = report["runs"]
    assert (one["setting"], one["seed"]) == ({"training": "gated", "length": 2}, 3)
    final = metrics.final_metrics(directory / "undisturbed" / GATED / "seed-3")
    assert (one["clean_loss"], one["noise_accuracy"]) == (final["eval_clean_loss"], final["eval_noise_accuracy"])
    assert len(one["noise_accuracy"]) == 2
    [decoding] = one["decoding"]
    assert set(decoding) == {"decoder", "tree", "new_tokens", "forward_passes", *FIGURES}
    assert (decoding["decoder"], decoding["tree"], decoding["exact_share"]) == ("jacobi", "chain", 1)
    assert 3 <= decoding["forward_passes"] <= decoding["new_tokens"] <= 24
    assert decoding["mean_accepted_tokens"] == decoding["new_tokens"] / decoding["forward_passes"]
    [row] = report["rows"]
    expected = {"training": "gated", "length": 2, "decoder": "jacobi", "tree": "chain", "seeds": 1}
    expected |= {"clean_loss": one["clean_loss"], "clean_loss_stderr": None, "mean_accepted_tokens_stderr": None}
    assert row == expected | {name: decoding[name] for name in FIGURES}
    assert ablation_report.to_table(report).row_count == 1


def test_an_interrupted_ablation_repeats_nothing_and_ends_like_an_undisturbed_one(report, directory, monkeypatch):
    grid, workdir = grid_of(directory), directory / "interrupted"
    shutil.copytree(directory / "undisturbed", workdir)
    for name in ("report.json", f"{GATED}/seed-3/result.json", f"{GATED}/seed-3/jacobi_chain.jsonl"):
        (workdir / name).unlink()  # as if killed before the second decoding
    monkeypatch.setattr(train, "train", lambda cfg, workdir: False)
    assert run(grid, workdir) is None  # SIGTERM in training
    assert not (workdir / "report.json").exists()

    monkeypatch.setattr(train, "train", lambda cfg, workdir: True)
    decoded, write_generations, to_json_line = [], outputs.write_generations, outputs.to_json_line

    def recorded(decoder, requests, batch_size, path, **options):
        decoded.append(Path(path).name)
        write_generations(decoder, requests, batch_size, path, **options)

    def killed(generation):
        if generation.index == last:
            raise KeyboardInterrupt
        return to_json_line(generation)

    lines = [
        json.loads(line) for line in (workdir / GATED / "seed-3" / "autoregressive.jsonl").read_text().splitlines()
    ]
    last = len(lines) - 1
    monkeypatch.setattr(outputs, "write_generations", recorded)
    monkeypatch.setattr(outputs, "to_json_line", killed)
    with pytest.raises(KeyboardInterrupt):
        run(grid, workdir)
    assert decoded == ["jacobi_chain.jsonl"]  # what was decoded before is not decoded again
    monkeypatch.setattr(outputs, "to_json_line", to_json_line)
    assert run(grid, workdir)["runs"] == report["runs"]
    assert decoded == ["jacobi_chain.jsonl"] * 2
    monkeypatch.setattr(ablate, "run", None)  # nothing is left to run
    assert run(grid, workdir)["rows"] == report["rows"]


def test_a_workdir_keeps_its_grid_but_may_take_more_seeds(report, directory):
    grid, workdir = grid_of(directory), directory / "undisturbed"
    message = refusal(run, dataclasses.replace(grid, max_new_tokens=9), workdir)
    assert message.endswith("with max_new_tokens=8 where this one has 9: choose another directory")
    other = grid_of(directory)
    other.settings[0].config.noise.length = 3
    assert "settings.0.config.noise.length=2 where this one has 3" in refusal(run, other, workdir)
    more = dataclasses.replace(grid, decodings=(*grid.decodings, Decoding("jacobi")))
    assert "decodings (number)=1 where this one has 2" in refusal(run, more, workdir)
    assert ablation.identity(dataclasses.replace(grid, seeds=(3, 4))) == ablation.identity(grid)


def test_a_changed_model_makes_another_grid(directory, tmp_path):
    model, prompts = tmp_path / "model", Prompts(str(directory / "train.jsonl"))
    model.mkdir()
    (model / "weights").write_bytes(b"1")
    setting = Setting({"limit": 5}, model=str(model))
    grid = grid_of(directory, factors=("limit",), settings=(setting,), prompts=prompts)
    before = ablation.identity(grid)
    assert before == ablation.identity(grid)
    (model / "weights").write_bytes(b"2")
    assert before != ablation.identity(grid)


def test_finished_models_decode_without_training(report, directory, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "two and five"}\n{"prompt": "one and"}\n{"prompt": "six"}\n')
    setting = Setting({"limit": 5}, model=str(directory / "undisturbed" / "base"), max_new_tokens=5)
    drafts = Decoding("draft_model", trees.chain(JACOBI, 2), "chain", name="it drafts itself", draft=OWN)
    grid = grid_of(
        directory, factors=("limit",), settings=(setting,), decodings=(drafts,), prompts=Prompts(str(prompts), 2)
    )
    result = run(grid, tmp_path / "grid")
    [one] = result["runs"]  # a seed makes no difference
    [decoding] = one["decoding"]
    assert (one["clean_loss"], one["noise_accuracy"], result["rows"][0]["clean_loss"]) == (None, None, None)
    assert (decoding["decoder"], decoding["exact_share"]) == ("it drafts itself", 1)
    assert 2 <= decoding["new_tokens"] <= 10
    assert decoding["forward_passes"] <= 4  # all drafts are accepted: 3 and 2 tokens
    assert (tmp_path / "grid" / "report.png").exists()


def test_inconsistent_grids_are_refused(directory, tmp_path):
    grid = grid_of(directory)
    [first] = grid.settings

    def message(**fields):
        return refusal(run, dataclasses.replace(grid, **fields), tmp_path / "none")

    assert "has no seeds" in message(seeds=())
    assert "seeds: 1 occurs twice" in message(seeds=(1, 0, 1))
    assert "names of bases and settings: 'training-gated_length-2' occurs twice" in message(settings=(first, first))
    assert "its factors must be length, training" in message(factors=("length", "training"))
    assert "unknown base 'x': known are base" in message(settings=(dataclasses.replace(first, base="x"),))
    assert "give either a config to train or a model" in message(settings=(dataclasses.replace(first, model="m"),))
    only_decoding = dataclasses.replace(first, config=None, model="m")
    assert "name a file of prompts" in message(settings=(only_decoding,))
    assert "unknown decoder 'medusa'" in message(decodings=(Decoding("medusa"),))
    assert "needs a draft" in message(decodings=(Decoding("draft_model"),))
    assert "needs a draft" in message(decodings=(Decoding("jacobi", draft=OWN),))
    assert "files of decodings: 'jacobi.jsonl' occurs twice" in message(decodings=(Decoding("jacobi"),) * 2)
    same_file = (Decoding("jacobi", name="a b"), Decoding("tr_jacobi", name="a-b"))
    assert "files of decodings: 'a-b.jsonl' occurs twice" in message(decodings=same_file)
    assert "max_new_tokens is 0; must be at least 1" in message(max_new_tokens=0)
    assert "batch_size is 0; must be at least 1" in message(batch_size=0)
    assert "prompts is 0; must be at least 1" in message(prompts=Prompts(count=0))
    text = tmp_path / "text.jsonl"
    text.write_text("no JSON\n")
    assert "text.jsonl" in message(prompts=Prompts(str(text)))
    assert "missing.jsonl: cannot be read" in message(prompts=Prompts("missing.jsonl"))
    cfg = dataclasses.replace(first.config, train=dataclasses.replace(first.config.train, steps=0))
    wrong = dataclasses.replace(first, config=cfg)
    assert "setting 'training-gated_length-2': config.train.steps=0" in message(settings=(wrong,))
    assert not (tmp_path / "none" / "base").exists()


def test_means_and_standard_errors_over_seeds():
    def result(seed, loss, accepted):
        decoding = {"decoder": "jacobi", "tree": "chain", "mean_accepted_tokens": accepted, "exact_share": 1.0}
        decoding |= {"repeated_4_grams": accepted / 10, "new_tokens": 100, "forward_passes": 50}
        return {"setting": {"length": 4}, "seed": seed, "clean_loss": loss, "decoding": [decoding]}

    [row] = ablation_report.rows([result(0, 1.0, 2.0), result(1, 2.0, 4.0), result(2, 3.0, 3.0)])
    error = pytest.approx(3**-0.5)
    assert row == {
        **{"length": 4, "decoder": "jacobi", "tree": "chain", "seeds": 3},
        **{"clean_loss": 2.0, "clean_loss_stderr": error},
        **{"mean_accepted_tokens": 3.0, "mean_accepted_tokens_stderr": error},
        **{"exact_share": 1.0, "repeated_4_grams": pytest.approx(0.3)},
    }
    assert repeated_4_grams([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


CONFIGS = {
    "paper:demo": 21,
    "paper:demo:3:2:1": 7,
    "paper:stories:MODEL:FILE": 21,
    "adapter:MODEL:FILE:FILE": 18,
    "adapter:MODEL:FILE:FILE:7:2": 12,
    "questions:domains:FILE:FILE": 36,
    "questions:decoders:MODEL:FILE": 6,
    "questions:long_texts:MODEL:FILE:ADAPTER": 3,
}


@pytest.mark.parametrize(("experiment", "count"), CONFIGS.items(), ids=CONFIGS)
def test_every_grid_of_configs_is_consistent(experiment, count, directory, monkeypatch):
    adapters = importlib.import_module("configs.adapter")
    monkeypatch.setattr(adapters.pretrained, "read_config", lambda model: test_configs.SMOLLM2_135M)
    monkeypatch.setattr(adapters, "_unused_special_token", lambda model: 5)
    for name in ("FILE", "MODEL", "ADAPTER"):  # any file will do
        experiment = experiment.replace(name, str(directory / "train.jsonl"))
    file, _, arg = experiment.partition(":")
    grid = importlib.import_module(f"configs.ablations.{file}").get_config(arg)
    ablation.check(grid)
    json.dumps(ablation.identity(grid))
    assert len(grid.runs()) == count
    for setting, seed in grid.runs():
        if setting.config is not None:
            cfg = ablation.run_config(grid, setting, seed, Path("runs"))
            config.check(cfg)
            assert cfg.train.seed == seed and cfg.train.checkpoint_every >= cfg.train.steps
            assert setting.config.train.seed == 0  # the grid's own config is left alone


def test_every_file_of_configs_is_tested():
    files = {path.stem for path in (commands.ROOT / "configs" / "ablations").glob("*.py")}
    assert files == {experiment.partition(":")[0] for experiment in CONFIGS}


def test_the_command_refuses_bad_input_in_one_line(tmp_path):
    configs = commands.ROOT / "configs"
    (tmp_path / "file").touch()
    cases = [
        (["--workdir=file/x", f"--config={configs}/ablations/paper.py:demo"], "is a file, not a directory"),
        (["--workdir=x"], "--config is missing"),
        (["--workdir=x", "--config=missing.py"], "missing.py"),
        (["--workdir=x", f"--config={configs}/demo.py:base"], "must return a msn_jax.ablation.Ablation, not a Config"),
        (["--workdir=x", f"--config={configs}/ablations/paper.py:demo:0"], "expected at most 3 numbers above 0"),
        (["--workdir=x", f"--config={configs}/ablations/paper.py:stories:m"], "must be demo or stories:MODEL"),
        (["--workdir=x", f"--config={configs}/ablations/adapter.py:m:d"], "must be MODEL:DATA.jsonl:PROMPTS.jsonl"),
        (["--workdir=x", f"--config={configs}/ablations/questions.py:x:y:z"], "must be domains:STORIES.jsonl"),
    ]
    commands.assert_refused("msn_jax.ablate", cases, tmp_path)
    assert not (tmp_path / "x").exists()
