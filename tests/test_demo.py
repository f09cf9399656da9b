"""The demo's report, on models trained for two steps, and the check of the report."""

import importlib.util
import json
import shutil
from pathlib import Path

import jax
import pytest
import tiny_config

import msn_jax
from msn_jax import demo, train
from msn_jax.cli import InputError

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
        prompts = demo.held_out_prompts(model, cfg, 3, 16)
        model_rows, generations = demo.measure(name, model, prompts, 16)
        assert len(prompts) == len(generations) == 3
        rows += model_rows
    return demo.report(12.5, workdir, rows)


def test_the_report_has_the_documented_schema(result):
    assert set(result) == {"hardware", "versions", "seconds", "models", "rows"}
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
    assert [(row["model"], row["decoder"]) for row in result["rows"]] == [
        (model, decoder)
        for model in ("sft", "msn")
        for decoder in ("autoregressive", "jacobi", "prompt_lookup", "tr_jacobi")
    ]
    for row in result["rows"][::4]:
        assert (row["speedup"], row["mean_accepted_tokens"]) == (1.0, 1.0)
    assert json.loads(json.dumps(result)) == result


def test_tables_show_every_row(result):
    assert demo.to_table(result).row_count == 8
    lines = demo.to_markdown(result).splitlines()
    assert sum(line.startswith(("| sft", "| msn")) for line in lines) == 8
    assert "12 s on" in lines[-1] or "13 s on" in lines[-1]


def test_max_new_tokens_that_leave_no_space_for_a_prompt_are_refused(cfg):
    model = msn_jax.load(Path(cfg.data.path).parent / "sft")
    with pytest.raises(InputError, match="--max_new_tokens=64: leaves no space for a prompt"):
        demo.held_out_prompts(model, cfg, 3, 64)


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
    assert demo.typical([*truncated, *ended]) == ended[4]
    assert demo.typical(truncated[::-1]) == truncated[1]


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
