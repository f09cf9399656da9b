"""The demo's report, on models trained for two steps, and the check of the report."""

import importlib.util
import json
import shutil
from pathlib import Path
from unittest import mock

import jax
import pytest
import random_adapter
import tiny_config

import msn_jax
from msn_jax import comparison, demo, held_out, smollm, train
from msn_jax.cli import InputError
from msn_jax.decode import engine

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    tiny_config.write_data(directory / "train.jsonl")
    cfg = tiny_config.config_in(directory, steps=2)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        train.train(cfg, directory / demo.MODELS[0])
    for name in demo.MODELS[1:]:  # the report does not depend on how the models differ
        shutil.copytree(directory / demo.MODELS[0], directory / name)
    return cfg


@pytest.fixture(scope="module")
def result(cfg):
    workdir = Path(cfg.data.path).parent
    rows = []
    for name in demo.MODELS:
        model = msn_jax.load(workdir / name)
        prompts = held_out.prompts(model, cfg.data, 3, 16)
        comparison.compile_decoders(model, prompts, 16)
        model_rows, generations = comparison.measure(name, model, prompts, 16, rounds=2)
        assert [len(by_decoder) for by_decoder in generations.values()] == [3] * 5
        rows += model_rows
    answers = [demo.to_answer(name, model, comparison.typical(generations["tr_jacobi"]))]
    return demo.report(12.5, 2, workdir, rows, answers)


def test_the_report_has_the_documented_schema(result):
    about = {"command", "date", "hardware", "versions", "seconds", "steps"}
    assert set(result) == about | {"models", "rows", "answers"}
    assert result["seconds"] == 12.5
    assert set(result["models"]) == {"sft", "msn"}
    for values in result["models"].values():
        assert set(values) == {"clean_loss", "noise_accuracy"}
        assert values["clean_loss"] > 0
        assert len(values["noise_accuracy"]) == 3
    fields = ("mean_accepted_tokens", "tokens_per_second", "speedup", "exact_share", "new_tokens", "forward_passes")
    for row in result["rows"]:
        assert set(row) == {"model", "decoder", *fields}
        assert row["exact_share"] == 1.0
        assert row["mean_accepted_tokens"] == row["new_tokens"] / row["forward_passes"]
    [answer] = result["answers"]
    assert (answer["model"], answer["decoder"]) == ("msn", "tr_jacobi")
    assert answer["prompt"] and answer["passes"]
    assert [(row["model"], row["decoder"]) for row in result["rows"]] == [
        (model, decoder)
        for model in ("sft", "msn")
        for decoder in ("autoregressive", "jacobi", "prompt_lookup", "tr_jacobi", "auto")
    ]
    for row in result["rows"][::5]:
        assert (row["speedup"], row["mean_accepted_tokens"]) == (1.0, 1.0)
    assert json.loads(json.dumps(result)) == result


def test_tables_show_every_row(result):
    assert comparison.to_table(result["rows"]).row_count == 10
    lines = demo.to_markdown(result).splitlines()
    assert sum(line.startswith(("| sft", "| msn")) for line in lines) == 10
    assert "12 s on" in lines[-1] or "13 s on" in lines[-1]


def test_no_repetition_begins_after_the_time_limit(cfg):
    model = msn_jax.load(Path(cfg.data.path).parent / "sft")
    prompts = held_out.prompts(model, cfg.data, 1, 16)
    with mock.patch.object(engine, "generate", wraps=engine.generate) as generate:
        comparison.measure("sft", model, prompts, 16, rounds=3, seconds=0.0)
    assert generate.call_count == len(comparison.DECODERS)


@pytest.mark.parametrize(
    ("tokens_per_second", "base_seconds", "left", "steps"),
    [
        (3072 * 10, 20.0, 300.0, 700),  # 7 s of overhead per stage, 0.1 s per step: (0.7 * 300 - 14) / 0.28
        (3072 * 5, 40.0, 300.0, 325),  # a machine half as fast
        (3072 * 100, 2.0, 300.0, 1000),  # no more than the config has
        (3072, 200.0, 60.0, 100),  # too slow for the limit
    ],
)
def test_training_steps_follow_from_the_speed_of_the_machine(tmp_path, tokens_per_second, base_seconds, left, steps):
    (tmp_path / "base").mkdir()
    lines = [{"step": 1, "compile_seconds": 3.0}, {"step": 25, "tokens_per_second": tokens_per_second}]
    (tmp_path / "base" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert demo.plan_steps(tmp_path, base_seconds, left) == steps
    assert demo.plan_steps(tmp_path, 1.0, 1e6) == steps  # a later call continues the same runs


def test_the_number_of_tokens_follows_from_the_speed_of_the_machine():
    assert demo.real_tokens(0.03, 12, 108.0) == 26
    assert demo.real_tokens(0.06, 12, 108.0) == demo.real_tokens(9.0, 12, 108.0) == 16
    assert demo.real_tokens(0.001, 12, 108.0) == 64


def test_without_the_real_model_one_line_says_so(monkeypatch, capsys):
    def fail(target):
        raise InputError("pip cannot download it")

    monkeypatch.setattr(smollm, "prepare", fail)
    assert demo.compare_on_real_model(demo.Clock(600)) == ([], [])
    assert capsys.readouterr().out == "part 1, the real model, is left out: pip cannot download it\n"


def test_the_real_model_is_compared_too(cfg, monkeypatch, tmp_path, capsys):
    workdir = Path(cfg.data.path).parent
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "def mean"}\n{"prompt": "def area(width, height)"}\n')
    monkeypatch.setattr(smollm, "prepare", lambda target: None)
    monkeypatch.setattr(smollm, "DIRECTORY", str(workdir / "sft"))
    monkeypatch.setattr(demo, "QUESTIONS", questions)
    random_adapter.save(tmp_path / "adapter", cfg.model, gate="noise", token=5)
    monkeypatch.setattr(smollm, "ADAPTER", tmp_path / "adapter")
    rows, [answer] = demo.compare_on_real_model(demo.Clock(600))
    assert [(row.model, row.decoder, row.exact_share) for row in rows] == [
        *(("smollm2", decoder, 1.0) for decoder in comparison.DECODERS),
        *(("smollm2, adapter", decoder, 1.0) for decoder in ("autoregressive", "jacobi")),
    ]
    out = capsys.readouterr().out
    assert "decoding 2 questions, 64 tokens each" in out
    assert (answer["model"], answer["decoder"]) == ("smollm2", "auto")
    assert "".join(answer["passes"]) in out


def test_max_new_tokens_that_leave_no_space_for_a_prompt_are_refused(cfg):
    model = msn_jax.load(Path(cfg.data.path).parent / "sft")
    with pytest.raises(InputError, match="max_new_tokens=64: leaves no space for a held-out prompt"):
        held_out.prompts(model, cfg.data, 3, 64)


def test_the_typical_generation_has_the_median_acceptance_of_the_longer_ones():
    def generation(new_tokens, passes, reason="eos"):
        return msn_jax.Generation(0, "p", "t", [], new_tokens, passes, [], 1.0, "tr_jacobi", {4: passes}, reason)

    ended = [
        generation(4, 1),
        generation(5, 4),
        generation(6, 2),
        generation(100, 50),
        generation(90, 30),
        generation(80, 20),
    ]
    truncated = [generation(200, 60, "length"), generation(200, 50, "length"), generation(200, 40, "length")]
    assert comparison.typical([*truncated, *ended]) == ended[4]
    assert comparison.typical(truncated[::-1]) == truncated[1]


def check_report():
    spec = importlib.util.spec_from_file_location("check_report", ROOT / ".ci" / "check_report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_check_report(result, tmp_path, capsys):
    check = check_report()
    assert check.requirements(result)["every completion is exact"]
    assert not check.goals(result)["jacobi on msn: at least 1.5 mean accepted tokens"]
    inexact = json.loads(json.dumps(result))
    inexact["rows"][3]["exact_share"] = 0.99
    (tmp_path / "report.json").write_text(json.dumps(inexact))
    assert check.main(str(tmp_path / "report.json")) == 1
    assert "does not hold: every completion is exact" in capsys.readouterr().err
