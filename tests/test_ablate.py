"""Ablations: a tiny grid from training to report, interruptions, refusals, and the grids of configs/ablations/."""

import dataclasses
import importlib
import json
import os
import signal
from pathlib import Path

import commands
import jax
import pytest
import test_configs
import tiny_config
from refusals import refusal

from msn_jax import ablate, ablation, ablation_report, config, outputs, train
from msn_jax.ablation import OWN, Ablation, Decoding, Prompts, Setting
from msn_jax.config import AdapterConfig, NoiseConfig
from msn_jax.decode import tree as trees
from msn_jax.decode.tree import JACOBI
from msn_jax.evals.statistics import repeated_4_grams

pytestmark = pytest.mark.usefixtures("quick_compilation")

FIGURES = {"mean_accepted_tokens", "exact_share", "repeated_4_grams"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ablate")
    tiny_config.write_data(directory / "train.jsonl")
    return directory


def grid_of(directory, **fields):
    """Two settings from one base: the control, and a gated adapter."""
    base, sft, gated = (tiny_config.config_in(directory, steps=steps, log_every=100) for steps in (4, 3, 3))
    sft.noise = NoiseConfig("none", length=2)
    gated.noise, gated.adapter = NoiseConfig(blocks=4, length=2), AdapterConfig(rank=2)
    grid = Ablation(
        name="tiny",
        factors=("training", "length"),
        settings=(
            Setting({"training": "sft", "length": 0}, sft, base="base"),
            Setting({"training": "gated", "length": 2}, gated, base="base"),
        ),
        seeds=(0, 1),
        decodings=(
            Decoding("jacobi", trees.build([(0, JACOBI, 0), (0, JACOBI, 1)]), "branches"),
            Decoding("tr_jacobi"),
        ),
        prompts=Prompts(count=3),
        max_new_tokens=8,
        batch_size=2,
        bases={"base": base},
    )
    return dataclasses.replace(grid, **fields)


def run(grid, workdir):
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        return ablate.ablate(grid, workdir, limit=3)


@pytest.fixture(scope="module")
def report(directory):
    return run(grid_of(directory), directory / "undisturbed")


def test_the_report_has_every_run_and_row(report, directory):
    assert json.loads((directory / "undisturbed" / "report.json").read_text()) == report
    assert (directory / "undisturbed" / "report.png").stat().st_size > 10_000
    assert {"hardware", "versions", "commit", "command"} <= report.keys()
    assert (report["ablation"], report["factors"]) == ("tiny", ["training", "length"])
    sft, gated = {"training": "sft", "length": 0}, {"training": "gated", "length": 2}
    assert [(one["setting"], one["seed"]) for one in report["runs"]] == [(sft, 0), (gated, 0), (sft, 1)]
    for one in report["runs"]:
        assert 0 < one["clean_loss"] < 10 and len(one["noise_accuracy"]) == 2
        assert [(d["decoder"], d["tree"]) for d in one["decoding"]] == [("jacobi", "branches"), ("tr_jacobi", None)]
        for decoding in one["decoding"]:
            assert set(decoding) == {"decoder", "tree", "new_tokens", "forward_passes", *FIGURES}
            assert decoding["exact_share"] == 1 and 3 <= decoding["forward_passes"] <= decoding["new_tokens"] <= 24
            assert decoding["mean_accepted_tokens"] == decoding["new_tokens"] / decoding["forward_passes"]
    assert [(row["training"], row["decoder"], row["tree"], row["seeds"]) for row in report["rows"]] == [
        ("sft", "jacobi", "branches", 2),
        ("sft", "tr_jacobi", None, 2),
        ("gated", "jacobi", "branches", 1),
        ("gated", "tr_jacobi", None, 1),
    ]
    errors = [row["clean_loss_stderr"] for row in report["rows"]]
    assert errors[0] == errors[1] > 0 and errors[2:] == [None, None]  # the seeds of sft differ
    assert ablation_report.to_table(report).row_count == 4


def test_a_gated_adapter_keeps_the_loss_of_its_base_and_sft_does_not(report, directory):
    [base] = [
        json.loads(line)
        for line in (directory / "undisturbed" / "base" / "metrics.jsonl").read_text().splitlines()
        if json.loads(line)["step"] == 4
    ]
    losses = [one["clean_loss"] for one in report["runs"]]
    assert losses[1] == pytest.approx(base["eval_clean_loss"], rel=1e-5)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_an_interrupted_ablation_repeats_nothing_and_ends_like_an_undisturbed_one(report, directory, monkeypatch):
    grid, workdir = grid_of(directory), directory / "interrupted"
    batches, decoded = [], []
    to_devices, write_generations = train.to_devices, outputs.write_generations

    def terminated(batch, rows):
        batches.append(batch)
        if len(batches) == 8:  # two evaluation batches and four steps of the base, two evaluation batches of sft
            os.kill(os.getpid(), signal.SIGTERM)
        return to_devices(batch, rows)

    def killed(decoder, requests, batch_size, path, **options):
        decoded.append(path.removeprefix(f"{workdir}/"))
        if len(decoded) == 2:
            raise KeyboardInterrupt
        write_generations(decoder, requests, batch_size, path, **options)

    monkeypatch.setattr(train, "to_devices", terminated)
    monkeypatch.setattr(outputs, "write_generations", killed)
    assert run(grid, workdir) is None  # SIGTERM in training
    with pytest.raises(KeyboardInterrupt):  # in the second decoding of the first run
        run(grid, workdir)
    second = len(batches)
    assert run(grid, workdir)["runs"] == report["runs"]
    assert second == 8 + 2 + 2  # the rest of sft
    assert len(batches) == second + 2 * (2 + 3)  # two further runs
    names = ["autoregressive.jsonl", "jacobi_branches.jsonl", "tr_jacobi.jsonl"]
    of_run = [[f"training-{name}/seed-{seed}/{file}" for file in names] for name, seed in RUNS]
    assert decoded == [*of_run[0][:2], *of_run[0][1:], *of_run[1], *of_run[2]]
    assert run(grid, workdir)["rows"] == report["rows"]
    assert len(decoded) == 10 and len(batches) == second + 10


RUNS = [("sft_length-0", 0), ("gated_length-2", 0), ("sft_length-0", 1)]


def test_a_workdir_keeps_its_grid_but_takes_more_seeds(report, directory):
    grid, workdir = grid_of(directory), directory / "undisturbed"
    message = refusal(run, dataclasses.replace(grid, max_new_tokens=9), workdir)
    assert message.endswith("with max_new_tokens=8 where this one has 9: choose another directory")
    settings = grid_of(directory).settings
    settings[1].config.noise.length = 3
    message = refusal(run, dataclasses.replace(grid, settings=settings), workdir)
    assert "settings.1.config.noise.length=2 where this one has 3" in message
    assert "decodings (number)=2 where" in refusal(
        run, dataclasses.replace(grid, decodings=grid.decodings[:1]), workdir
    )
    assert run(dataclasses.replace(grid, seeds=(0, 1, 2)), workdir)["rows"] == report["rows"]


def test_finished_models_are_decoded_without_training(directory, report, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "two and five"}\n{"prompt": "one and"}\n{"prompt": "six"}\n')
    model = str(directory / "undisturbed" / "base")
    other = str(directory / "undisturbed" / "training-sft_length-0" / "seed-0")
    grid = Ablation(
        name="decoding",
        factors=("limit",),
        settings=tuple(Setting({"limit": limit}, model=model, max_new_tokens=limit) for limit in (3, 6)),
        seeds=(0, 1),
        decodings=(
            Decoding("draft_model", name="another drafts", draft=other),
            Decoding("draft_model", name="it drafts itself", draft=OWN),
            Decoding("draft_model", name="it drafts for another", model=other, draft=OWN),
        ),
        prompts=Prompts(str(tmp_path / "prompts.jsonl"), count=2),
        max_new_tokens=100,
    )
    result = run(grid, tmp_path / "grid")
    assert [one["clean_loss"] for one in result["runs"]] == [None, None]  # seeds make no difference
    assert [(row["limit"], row["seeds"], row["exact_share"]) for row in result["rows"]] == [(3, 1, 1)] * 3 + [
        (6, 1, 1)
    ] * 3
    best = [row["mean_accepted_tokens"] for row in result["rows"] if row["decoder"] == "it drafts itself"]
    tokens = [decoding["new_tokens"] for one in result["runs"] for decoding in one["decoding"]]
    assert max(tokens[:3]) <= 6 and best[0] == pytest.approx(3)  # all drafts are accepted
    assert (tmp_path / "grid" / "report.png").exists()


def test_inconsistent_grids_are_refused(directory, tmp_path):
    grid = grid_of(directory)
    first, second = grid.settings

    def message(**fields):
        return refusal(run, dataclasses.replace(grid, **fields), tmp_path / "none")

    assert "has no seeds" in message(seeds=())
    assert "seeds: 1 occurs twice" in message(seeds=(1, 0, 1))
    assert "names of bases and settings: 'training-sft_length-0' occurs twice" in message(settings=(first, first))
    assert "its factors must be length, training" in message(factors=("length", "training"))
    assert "unknown base 'x': known are base" in message(settings=(dataclasses.replace(first, base="x"),))
    assert "give either a config to train or a model" in message(settings=(dataclasses.replace(first, model="m"),))
    only_decoding = dataclasses.replace(first, config=None, model="m")
    assert "name a file of prompts" in message(settings=(only_decoding,))
    assert "unknown decoder 'medusa'" in message(decodings=(Decoding("medusa"),))
    assert "needs a draft" in message(decodings=(Decoding("draft_model"),))
    assert "needs a draft" in message(decodings=(Decoding("jacobi", draft=OWN),))
    assert "decodings: ('jacobi', None) occurs twice" in message(decodings=(Decoding("jacobi"), Decoding("jacobi")))
    assert "missing.jsonl: cannot be read" in message(prompts=Prompts("missing.jsonl"))
    cfg = dataclasses.replace(second.config, train=dataclasses.replace(second.config.train, steps=0))
    assert "setting 'training-gated_length-2': config.train.steps=0" in message(
        settings=(dataclasses.replace(second, config=cfg),)
    )
    assert not (tmp_path / "none" / "base").exists()


def test_means_and_standard_errors_over_seeds():
    def result(seed, loss, accepted):
        decoding = {"decoder": "jacobi", "tree": "chain", "mean_accepted_tokens": accepted, "exact_share": 1.0}
        decoding |= {"repeated_4_grams": accepted / 10, "new_tokens": 100, "forward_passes": 50}
        return {"setting": {"length": 4}, "seed": seed, "clean_loss": loss, "decoding": [decoding]}

    [row] = ablation_report.rows([result(0, 1.0, 2.0), result(1, 2.0, 4.0), result(2, 3.0, 3.0)])
    assert row == {
        **{"length": 4, "decoder": "jacobi", "tree": "chain", "seeds": 3, "clean_loss": 2.0},
        **{"clean_loss_stderr": pytest.approx(3**-0.5), "mean_accepted_tokens": 3.0},
        **{
            "mean_accepted_tokens_stderr": pytest.approx(3**-0.5),
            "exact_share": 1.0,
            "repeated_4_grams": pytest.approx(0.3),
        },
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


@pytest.mark.parametrize("experiment", CONFIGS)
def test_every_grid_of_configs_is_consistent(experiment, directory, monkeypatch):
    adapters = importlib.import_module("configs.adapter")
    monkeypatch.setattr(adapters.pretrained, "read_config", lambda model: test_configs.SMOLLM2_135M)
    monkeypatch.setattr(adapters, "_unused_special_token", lambda model: 5)
    file, _, arg = experiment.replace("FILE", str(directory / "train.jsonl")).partition(":")
    grid = importlib.import_module(f"configs.ablations.{file}").get_config(arg)
    ablation.check(grid)
    json.dumps(ablation.identity(grid))
    assert len(grid.runs()) == CONFIGS[experiment]
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
    cases = [
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
