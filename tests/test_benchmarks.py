"""The benchmarks of decoding: sizes and counts are correct, and every report is complete."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refusals
import tiny_config

from benchmarks import decode, lm_eval_peer, passes, precision, questions, report, shapes
from benchmarks.passes import Setting
from msn_jax.cli import InputError
from msn_jax.decode import drafters
from msn_jax.decode.models import Model

ROOT = Path(__file__).parents[1]
CFG = dataclasses.replace(tiny_config.get_config().model, max_length=512)
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(shapes.random_params(CFG), CFG, passes.NoTokenizer())


def test_shapes_have_the_published_parameter_counts():
    parameters = {
        name: sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(functools.partial(shapes.random_params, cfg))))
        for name, cfg in shapes.SHAPES.items()
    }
    assert parameters["260k"] == 260_032
    assert parameters["110m"] == 109_529_856  # stories110M
    assert parameters["1b"] == 1_235_814_400  # Llama 3.2 1B
    assert parameters["8b"] == 8_030_261_248  # Llama 3 8B


def test_random_weights_are_scaled_by_fan_in(model):
    layer = model.params["layer_0"]
    assert np.std(model.params["embed"]) == pytest.approx(CFG.d_model**-0.5, rel=0.05)
    assert np.std(layer["attention"]["q"]) == pytest.approx(CFG.d_model**-0.5, rel=0.1)
    assert np.std(layer["mlp"]["down"]) == pytest.approx(CFG.d_mlp**-0.5, rel=0.1)
    assert abs(np.corrcoef(layer["mlp"]["gate"].ravel(), layer["mlp"]["up"].ravel())[0, 1]) < 0.1


def test_bytes_per_forward_pass():
    cfg = shapes.config("8b", "bfloat16")
    assert shapes.weight_bytes(cfg) == 2 * (8_030_261_248 - 128_256 * 4096)  # without the embedding
    assert shapes.cache_bytes(cfg, batch_size=3, length=100) == 3 * 100 * 131_072  # 128 KiB per token
    tied = shapes.config("110m", "float32")
    assert shapes.weight_bytes(tied) == 4 * 109_529_856


def test_every_timed_pass_commits_one_token(model):
    setting = Setting(batch_size=2, length=20, capacity=64, passes=5)
    timed_loop = passes.compile_loop(model, passes.drafter("tr_jacobi", "binary", 7), setting)
    assert timed_loop.run() > 0
    assert timed_loop.run() > 0  # every run starts from the same length
    assert np.asarray(timed_loop.state.lengths).tolist() == [25, 25]
    assert np.asarray(timed_loop.state.accept_lengths)[:, :5].tolist() == [[1] * 5] * 2


def test_a_loop_that_ends_early_is_an_error(model):
    setting = Setting(batch_size=1, length=60, capacity=64, passes=16)
    with pytest.raises(RuntimeError, match="of 16 forward passes"):
        passes.compile_loop(model, passes.drafter("jacobi", "chain", 2), setting)


def test_the_bare_loop_computes_the_target_tokens(model):
    drafter = passes.drafter("jacobi", "chain", 3)
    cache = passes.initial_state(model, drafter, Setting(batch_size=1, length=20, capacity=64, passes=1)).cache
    tokens = jnp.array([[1, 2, 3]], jnp.int32)
    targets = passes.bare(model.params, CFG, drafter.tree.parents, cache, tokens, 1)
    assert targets.shape == (1, 3)
    root_alone = passes.bare(model.params, CFG, (-1,), cache, tokens[:, :1], 1)
    assert targets[0, 0] == root_alone[0, 0]


def test_binary_trees():
    tree = passes.drafter("jacobi", "binary", 6).tree
    assert tree.parents == (-1, 0, 0, 1, 1, 2)
    assert tree.ranks == (0, 0, 1, 0, 1, 0)


def test_alternate_reverses_the_order_and_returns_medians():
    order = []

    def run(name: str) -> float:
        order.append(name)
        return float(len(order))

    medians = report.alternate({"a": lambda: run("a"), "b": lambda: run("b")}, 3)
    assert "".join(order) == "abbaab"
    assert medians == {"a": 4.0, "b": 3.0}


def test_precision_reports_first_differences_and_logit_gaps(model):
    prompts = [[1, 2, 3], [4, 5, 6, 7]]
    rows = precision.compare(model, {name: drafters.get(name) for name in ("autoregressive", "jacobi")}, prompts, 12)
    assert [(row["decoder"], row["exact_share"], row["first_differences"]) for row in rows] == [("jacobi", 1.0, [])]
    completion = precision.greedy(model, drafters.get("autoregressive"), prompts, 12)[0]
    assert precision.first_difference(completion, completion) is None
    assert precision.first_difference([1, 2, 3], [1, 5]) == 1
    assert precision.first_difference([1, 2, 3], [1, 2]) == 2
    [gap] = precision.logit_gaps(model, [[*prompts[0], *completion]], [len(prompts[0]) + 2])
    assert gap > 0


def test_precision_in_bfloat16_has_two_references():
    cfg = dataclasses.replace(CFG, dtype="bfloat16", param_dtype="bfloat16")
    model = Model(shapes.random_params(cfg), cfg, passes.NoTokenizer())
    decoders = {name: drafters.get(name) for name in ("autoregressive", "jacobi")}
    rows = precision.compare(model, decoders, np.arange(48).reshape(8, 6).tolist(), 24)
    assert [(row["decoder"], row["reference"]) for row in rows] == [
        ("jacobi", "autoregressive bfloat16"),
        ("autoregressive", "autoregressive float32"),
        ("jacobi", "autoregressive float32"),
    ]
    for row in rows:
        assert len(row["first_differences"]) == round((1 - row["exact_share"]) * 8)
        for difference in row["first_differences"]:
            assert difference["gap"] >= 0 and difference["gap_float32"] < 0.2


def test_spec_bench_groups(tmp_path):
    path = tmp_path / "question.jsonl"
    lines = [("writing", "a"), ("stem", "b"), ("rag", "c"), ("rag", "d"), ("math_reasoning", "e")]
    path.write_text("".join(json.dumps({"category": group, "turns": [turn, "x"]}) + "\n" for group, turn in lines))
    assert questions.read_spec_bench(str(path), 1) == [("mt_bench", "a"), ("rag", "c"), ("math_reasoning", "e")]
    assert len(questions.read_spec_bench(str(path), 0)) == 5
    with pytest.raises(InputError, match="not Spec-Bench's"):
        questions.read_spec_bench(__file__, 0)


def test_the_report_has_all_parts(model):
    args = types.SimpleNamespace(
        **{"widths": ["3", "1"], "lengths": ["100"], "batch_sizes": ["2"], "decoders": ["jacobi"], "topology": "chain"},
        **{"parts": decode.PARTS, "passes": 2, "repeats": 1, "num_prompts": 2, "new_tokens": 4, "prompts": None},
    )
    result = json.loads(json.dumps(decode.measure(model, args)))
    assert [row["decoder"] for row in result["width"]] == ["autoregressive/chain", "jacobi/chain"]
    assert [row["width"] for row in result["width"]] == [1, 3]
    weights = 4 * sum(leaf.size for leaf in jax.tree.leaves(model.params))
    cache = 2 * CFG.n_layers * 2 * 100 * CFG.n_kv_heads * CFG.head_dim * 4
    for row in result["width"]:
        assert row["bytes_per_pass"] == weights + cache
        assert row["bytes_per_second"] == pytest.approx((weights + cache) / row["seconds"])
        assert row["bandwidth_share"] == pytest.approx(row["bytes_per_second"] / result["copy_bytes_per_second"])
        assert row["capacity"] == 128 and row["compile_seconds"] > 0 and row["temporary_bytes"] > 0
    assert result["width"][0]["ratio"] == 1
    assert [row["maximum"] for row in result["capacity"]] == 2 * [512, 8192, 8192]
    assert [row["capacity"] for row in result["capacity"]] == 2 * [512, 512, 8192]
    assert [row["is_engine_capacity"] for row in result["capacity"]] == 2 * [True, True, False]
    assert min(row["ratio"] for part in ("width", "capacity", "overhead") for row in result[part]) > 0
    assert all(row["ratio"] == row["seconds"] / row["bare_seconds"] for row in result["overhead"])
    assert [row["exact_share"] for row in result["precision"]] == [1.0]


def test_decode_command(tmp_path):
    invalid = [
        ([], "--shape="),
        (["--shape=demo", "--parts=speed"], "speed"),
        (["--shape=demo", "--decoders=medusa"], "medusa"),
        (["--shape=demo", "--widths=1,x"], "--widths=1,x"),
        (["--shape=demo", "--parts=precision", "--prompts=p.jsonl"], "--prompts"),
    ]
    valid = ["--shape=260k", "--parts=bandwidth", "--repeats=1", "--output=report.json"]
    (code, out, error), *errors = commands.run("benchmarks.decode", [valid, *(flags for flags, _ in invalid)], tmp_path)
    assert (code, out) == (0, ""), error
    for (code, _, error), (_, expected) in zip(errors, invalid, strict=True):
        assert code == 2 and error.count("\n") == 1 and expected in error, error
    result = json.loads((tmp_path / "report.json").read_text())
    assert {"hardware", "load_average", "versions", "commit", "date", "peak_memory_bytes"} <= result.keys()
    assert result["command"].endswith(" ".join(valid))
    assert result["parameters"] == 260_032 and result["weight_bytes_per_pass"] == 4 * 260_032
    assert result["copy_bytes_per_second"] > 0


def test_parts_of_the_peer_of_the_harness():
    assert lm_eval_peer.ordered_parts(["gsm8k", "prompts"]) == ["prompts", "gsm8k"]
    for names in ([], ["gsm8k", "mmul"]):
        assert "--parts=" + ",".join(names) in refusals.refusal(lm_eval_peer.ordered_parts, names)


def test_peers_command_without_peers(tmp_path):
    valid = ["--shape=260k", "--nopeers", "--questions=2", "--max_new_tokens=12", "--repeats=1", "--output=report.json"]
    (code, out, error), invalid = commands.run("benchmarks.peers", [valid, [*valid, "--model=x"]], tmp_path)
    assert (code, out) == (0, ""), error
    code, _, error = invalid
    assert code == 2 and error.count("\n") == 1 and "either --model=HF_DIR or --shape" in error
    result = json.loads((tmp_path / "report.json").read_text())
    assert [row["decoder"] for row in result["rows"]] == ["autoregressive", "prompt_lookup", "tr_jacobi", "auto"]
    assert all(row["new_tokens"] == 24 and row["exact_share"] == 1 for row in result["rows"])
    autoregressive, prompt_lookup, tr_jacobi, auto = (row["tokens_per_second"] for row in result["rows"])
    assert result["speed_ratios"] == {
        "tr_jacobi_over_prompt_lookup_worst_group": tr_jacobi / prompt_lookup,
        "auto_over_autoregressive": auto / autoregressive,
    }


@pytest.mark.slow
def test_peers_command(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    output = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.peers", "--shape=260k", "--questions=2", "--max_new_tokens=12"]
    subprocess.run([*command, "--repeats=1", f"--output={output}"], cwd=ROOT, env=os.environ, check=True)
    result = json.loads(output.read_text())
    assert {"torch", "transformers", "jax"} <= result["versions"].keys()
    assert set(result["speed_ratios"]) == {
        "autoregressive_over_transformers",
        "tr_jacobi_over_transformers_prompt_lookup",
        "tr_jacobi_over_prompt_lookup_worst_group",
        "auto_over_autoregressive",
        "auto_over_transformers",
        "auto_over_transformers_prompt_lookup",
    }
    assert [row["decoder"] for row in result["rows"]] == [
        *("autoregressive", "prompt_lookup", "tr_jacobi", "auto", "transformers", "transformers_prompt_lookup")
    ]
    for row in result["rows"]:
        assert row["new_tokens"] == 24 and row["exact_share"] == 1 and row["tokens_per_second"] > 0, row
    assert result["rows"][0]["mean_accepted_tokens"] == result["rows"][4]["mean_accepted_tokens"] == 1
