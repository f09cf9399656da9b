"""The benchmarks of decoding: what they count is right; what they measure is there."""

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
import tiny_config

from benchmarks import decode, passes, precision, questions, report, shapes
from benchmarks.passes import Setting
from msn_jax.cli import InputError
from msn_jax.decode import drafters
from msn_jax.decode.session import Model

ROOT = Path(__file__).parents[1]
CFG = dataclasses.replace(tiny_config.get_config().model, max_length=512)
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(shapes.random_params(CFG), CFG, passes.NoTokenizer())


def test_shapes_have_the_sizes_of_their_names():
    parameters = {
        name: sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(functools.partial(shapes.random_params, cfg))))
        for name, cfg in shapes.SHAPES.items()
    }
    assert parameters["260k"] == 260_032
    assert parameters["110m"] == 109_529_856  # stories110M
    assert parameters["1b"] == 1_235_814_400  # Llama 3.2 1B
    assert parameters["8b"] == 8_030_261_248  # Llama 3 8B


def test_random_weights_are_as_spread_as_trained_ones(model):
    layer = model.params["layer_0"]
    assert np.std(model.params["embed"]) == pytest.approx(CFG.d_model**-0.5, rel=0.05)
    assert np.std(layer["attention"]["q"]) == pytest.approx(CFG.d_model**-0.5, rel=0.1)
    assert np.std(layer["mlp"]["down"]) == pytest.approx(CFG.d_mlp**-0.5, rel=0.1)
    assert abs(np.corrcoef(layer["mlp"]["gate"].ravel(), layer["mlp"]["up"].ravel())[0, 1]) < 0.1


def test_bytes_of_a_pass():
    cfg = shapes.config("8b", "bfloat16")
    assert shapes.weight_bytes(cfg) == 2 * (8_030_261_248 - 128_256 * 4096)  # of the embedding, a few rows
    assert shapes.cache_bytes(cfg, batch_size=3, length=100) == 3 * 100 * 131_072  # 128 KiB a token
    tied = shapes.config("110m", "float32")
    assert shapes.weight_bytes(tied) == 4 * 109_529_856


def test_spoiled_guesses_commit_one_token_a_pass(model):
    setting = Setting(batch_size=2, length=20, capacity=64, passes=5)
    timed = passes.compiled(model, passes.drafter("tr_jacobi", "binary", 7), setting)
    assert timed.run() > 0
    assert timed.run() > 0  # from the same length again
    assert np.asarray(timed.state.lengths).tolist() == [25, 25]
    assert np.asarray(timed.state.accept_lengths)[:, :5].tolist() == [[1] * 5] * 2


def test_a_loop_that_ends_early_is_an_error(model):
    setting = Setting(batch_size=1, length=60, capacity=64, passes=16)
    with pytest.raises(RuntimeError, match="of 16 passes"):
        passes.compiled(model, passes.drafter("jacobi", "chain", 2), setting)


def test_the_bare_loop_computes_the_models_choices(model):
    drafter = passes.drafter("jacobi", "chain", 3)
    begun = passes.state(model, drafter, Setting(batch_size=1, length=20, capacity=64, passes=1))
    tokens = jnp.array([[1, 2, 3]], jnp.int32)
    found = passes.bare(model.params, CFG, drafter.tree.parents, begun.cache, tokens, 1)
    assert found.shape == (1, 3)
    one_by_one = passes.bare(model.params, CFG, (-1,), begun.cache, tokens[:, :1], 1)
    assert found[0, 0] == one_by_one[0, 0]


def test_binary_trees():
    tree = passes.drafter("jacobi", "binary", 6).tree
    assert tree.parents == (-1, 0, 0, 1, 1, 2)
    assert tree.ranks == (0, 0, 1, 0, 1, 0)


def test_alternate_takes_turns_and_medians():
    order = []

    def run(name: str) -> float:
        order.append(name)
        return float(len(order))

    medians = report.alternate({"a": lambda: run("a"), "b": lambda: run("b")}, 3)
    assert "".join(order) == "abbaab"
    assert medians == {"a": 4.0, "b": 3.0}


def test_precision_names_the_first_difference_and_its_gap(model):
    prompts = [[1, 2, 3], [4, 5, 6, 7]]
    rows = precision.compare(model, {name: drafters.get(name) for name in ("autoregressive", "jacobi")}, prompts, 12)
    assert [(row["decoder"], row["exact_share"], row["first_differences"]) for row in rows] == [("jacobi", 1.0, [])]
    answer = precision.greedy(model, drafters.get("autoregressive"), prompts, 12)
    assert precision.first_difference(answer[0], answer[0]) is None
    assert precision.first_difference([1, 2, 3], [1, 5]) == 1
    assert precision.first_difference([1, 2, 3], [1, 2]) == 2
    [gap] = precision.gaps(model, [[*prompts[0], *answer[0]]], [len(prompts[0]) + 2])
    assert gap > 0


def test_precision_in_bfloat16_has_two_references():
    cfg = dataclasses.replace(CFG, dtype="bfloat16", param_dtype="bfloat16")
    coarse = Model(shapes.random_params(cfg), cfg, passes.NoTokenizer())
    decoders = {name: drafters.get(name) for name in ("autoregressive", "jacobi")}
    rows = precision.compare(coarse, decoders, np.arange(48).reshape(8, 6).tolist(), 24)
    assert [(row["decoder"], row["against"]) for row in rows] == [
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
    path.write_text("".join(json.dumps({"category": group, "turns": [text, "x"]}) + "\n" for group, text in lines))
    assert questions.read_spec_bench(str(path), 1) == [("mt_bench", "a"), ("rag", "c"), ("math_reasoning", "e")]
    assert len(questions.read_spec_bench(str(path), 0)) == 5
    with pytest.raises(InputError, match="not the questions"):
        questions.read_spec_bench(__file__, 0)


def test_all_parts(model):
    args = types.SimpleNamespace(
        **{"widths": ["3", "1"], "lengths": ["100"], "batch_sizes": ["2"], "decoders": ["jacobi"], "topology": "chain"},
        **{"parts": decode.PARTS, "passes": 2, "repeats": 1, "texts": 2, "new_tokens": 4, "prompts": None},
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
    assert [row["as_the_engine"] for row in result["capacity"]] == 2 * [True, True, False]
    assert min(row["ratio"] for part in ("width", "capacity", "overhead") for row in result[part]) > 0
    assert all(row["ratio"] == row["seconds"] / row["bare_seconds"] for row in result["overhead"])
    assert [row["exact_share"] for row in result["precision"]] == [1.0]


def test_the_program(tmp_path):
    refused = [
        ([], "--shape="),
        (["--shape=demo", "--parts=speed"], "speed"),
        (["--shape=demo", "--decoders=medusa"], "medusa"),
        (["--shape=demo", "--widths=1,x"], "--widths=1,x"),
        (["--shape=demo", "--parts=precision", "--prompts=p.jsonl"], "--prompts"),
    ]
    good = ["--shape=260k", "--parts=bandwidth", "--repeats=1", "--output=report.json"]
    (code, out, error), *others = commands.run("benchmarks.decode", [good, *(flags for flags, _ in refused)], tmp_path)
    assert (code, out) == (0, ""), error
    for (other, _, said), (_, words) in zip(others, refused, strict=True):
        assert other == 2 and said.count("\n") == 1 and words in said, said
    result = json.loads((tmp_path / "report.json").read_text())
    assert {"hardware", "load_average", "versions", "commit", "date", "peak_memory_bytes"} <= result.keys()
    assert result["command"].endswith(" ".join(good))
    assert result["parameters"] == 260_032 and result["weight_bytes_per_pass"] == 4 * 260_032
    assert result["copy_bytes_per_second"] > 0


def test_our_decoders_alone(tmp_path):
    good = ["--shape=260k", "--nopeers", "--questions=2", "--max_new_tokens=12", "--repeats=1", "--output=report.json"]
    (code, out, error), (refused, _, said) = commands.run("benchmarks.peers", [good, [*good, "--model=x"]], tmp_path)
    assert (code, out) == (0, ""), error
    assert refused == 2 and said.count("\n") == 1 and "either --model=HF_DIR or --shape" in said
    result = json.loads((tmp_path / "report.json").read_text())
    assert [row["decoder"] for row in result["rows"]] == ["autoregressive", "prompt_lookup", "tr_jacobi"]
    assert all(row["new_tokens"] == 24 and row["same_text"] == 1 for row in result["rows"])
    lookup, ours = (row["tokens_per_second"] for row in result["rows"][1:])
    assert result["bounds"] == {"tr_jacobi_over_prompt_lookup_worst_group": ours / lookup}


@pytest.mark.slow
def test_peers(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    output = tmp_path / "report.json"
    command = [sys.executable, "-m", "benchmarks.peers", "--shape=260k", "--questions=2", "--max_new_tokens=12"]
    subprocess.run([*command, "--repeats=1", f"--output={output}"], cwd=ROOT, env=os.environ, check=True)
    result = json.loads(output.read_text())
    assert {"torch", "transformers", "jax"} <= result["versions"].keys()
    assert set(result["bounds"]) == {
        "autoregressive_over_transformers",
        "tr_jacobi_over_transformers_prompt_lookup",
        "tr_jacobi_over_prompt_lookup_worst_group",
    }
    assert [row["decoder"] for row in result["rows"]] == [
        *("autoregressive", "prompt_lookup", "tr_jacobi", "transformers", "transformers_prompt_lookup")
    ]
    for row in result["rows"]:
        assert row["new_tokens"] == 24 and row["same_text"] == 1 and row["tokens_per_second"] > 0, row
    assert result["rows"][0]["mean_accepted_tokens"] == result["rows"][3]["mean_accepted_tokens"] == 1
