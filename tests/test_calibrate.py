"""Calibration: from prompts to a tree.json that generate reads, its measurements and picture, and invalid input."""

import json

import commands
import numpy as np
import pytest
import tiny

import msn_jax
from msn_jax import calibrate
from msn_jax.cli import InputError
from msn_jax.decode import tree as trees
from msn_jax.decode import tree_benchmark, tree_search
from msn_jax.decode.draft_traces import Completion
from msn_jax.decode.request import Request, encode_prompt
from msn_jax.decode.tree import JACOBI, RETRIEVAL_OR_JACOBI
from msn_jax.decode.tree_benchmark import Estimate

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPTS = ["the cat", "a", "mat sat on", "one and two"]


def no_progress(items, title):
    return items


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("calibrate") / "model"
    tiny.write_model(directory, max_length=64, n_layers=1)
    return directory


@pytest.fixture(scope="module")
def model(workdir):
    return msn_jax.load(workdir)


@pytest.fixture(scope="module")
def result(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_benchmark, "_REPEATS", 1)
        patch.setattr(tree_benchmark, "_RUN_TOKENS", 16)  # keeps the compiled programs small
        patch.setattr(tree_benchmark, "_ROUNDS", 1)
        prompts = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
        requests = [Request(prompt, max_new_tokens=30) for prompt in PROMPTS]
        return calibrate.calibrate(model, prompts, requests, "tr_jacobi", 2, no_progress)


def test_candidates_are_estimated_and_measured(result):
    names = [candidate.name for candidate in result.candidates]
    assert {"autoregressive", "default"} < set(names)
    assert [candidate.rate for candidate in result.candidates] == sorted(
        (candidate.rate for candidate in result.candidates), reverse=True
    )
    for candidate in result.candidates:
        assert candidate.exact_share == 1
        assert candidate.mean_accepted_tokens == pytest.approx(candidate.estimate.mean_accepted_tokens, rel=0.3)
        assert candidate.rate > 0 and candidate.estimate.rate > 0 and candidate.estimate.seconds > 0
    assert list(result.widths) == [1, 2]
    assert all(best.tree.width == width for width, best in result.widths.items())
    assert result.widths[1].mean_accepted_tokens == 1


def test_generate_uses_the_written_tree(result, model, workdir, tmp_path):
    path = workdir / "tree.json"
    calibrate.write(result, model, "tr_jacobi", {"prompts": 4}, path)
    tree = result.candidates[0].estimate.tree
    assert trees.load(path) == tree
    assert trees.find(workdir, "tr_jacobi") == tree
    written = json.loads(path.read_text())
    assert written["decoder"] == "tr_jacobi"
    assert written["measured_tokens_per_second"] == pytest.approx(result.candidates[0].rate, abs=0.1)
    assert [entry["width"] for entry in written["widths"]] == [1, 2]
    assert {"model", "dtype", "hardware", "versions", "command", "commit", "benchmark", "prompts"} < set(written)
    assert written["draft_accuracy"] == calibrate.draft_accuracy(result.traces)
    assert (workdir / "tree.png").read_bytes()[:4] == b"\x89PNG"
    [expected] = msn_jax.generate(model, PROMPTS[:1], "autoregressive", max_new_tokens=12)
    code, out, error = commands.run(
        "msn_jax.generate",
        [[f"--model={workdir}", "--prompt=the cat", f"--tree={path}", "--max_new_tokens=12"]],
        tmp_path,
    )[0]
    assert code == 0, error
    assert out == expected.text + "\n"


@pytest.mark.parametrize(
    "tree", [trees.build([]), tree_search.make_some_noise_tree(), trees.chain(RETRIEVAL_OR_JACOBI, 3, 2)]
)
def test_any_tree_can_be_written_and_drawn(result, model, tree, tmp_path):
    winner = result.candidates[0]
    winner = type(winner)("winner", Estimate(tree, 1e-3, 1.0, 1.0), 1.0, 1.0, 1.0)
    changed = type(result)(result.widths, [winner, *result.candidates], result.traces)
    calibrate.write(changed, model, "tr_jacobi", {}, tmp_path / "tree.json")
    assert trees.load(tmp_path / "tree.json") == tree
    for node in json.loads((tmp_path / "tree.json").read_text())["nodes"]:
        assert 0 <= node["acceptance"] <= 1
    assert (tmp_path / "tree.png").stat().st_size > 10_000


def test_the_best_estimates_and_the_baselines_are_benchmarked():
    def best(width, rate):
        return Estimate(trees.chain(JACOBI, width - 1), 1.0, 1.0, rate)

    widths = {width: best(width, rate) for width, rate in [(1, 9), (2, 5), (3, 7), (4, 6), (6, 8), (8, 1), (64, 2)]}
    candidates = tree_benchmark.select_candidates(widths, "jacobi", 64)
    assert {name: tree.width for name, tree in candidates.items()} == {
        "width 6": 6,
        "width 3": 3,
        "width 4": 4,  # also the default tree
        "width 8": 8,
        "autoregressive": 1,
    }
    assert "authors' 69 nodes" in tree_benchmark.select_candidates(widths, "tr_jacobi", 64)
    assert "default" in tree_benchmark.select_candidates(widths, "tr_jacobi", 64)


def test_the_estimated_rate_is_tokens_over_time(result):
    tree = trees.chain(RETRIEVAL_OR_JACOBI, 2)
    estimate = tree_benchmark._estimate(tree, 0.5, result.traces, 10.0)
    replayed = tree_search.replay(tree, result.traces)
    assert estimate.rate == pytest.approx(result.traces.lengths.sum() / (0.5 * len(replayed.num_emitted) + 10))
    assert estimate.mean_accepted_tokens == pytest.approx(replayed.mean_accepted_tokens)


def test_forward_passes_are_timed(model, monkeypatch):
    monkeypatch.setattr(tree_benchmark, "_REPEATS", 3)
    monkeypatch.setattr(tree_benchmark, "_RUN_TOKENS", 16)
    timers = tree_benchmark.pass_timers(
        model, "tr_jacobi", {"root": trees.build([])}, Completion([5, 6, 7] * 20, []), 30
    )
    seconds = tree_benchmark.pass_seconds(timers, no_progress)
    assert 1e-6 < seconds["root"] < 1


def test_draft_accuracy_is_the_share_of_matching_drafts(result):
    rows = calibrate.draft_accuracy(result.traces)
    traces = result.traces
    correct = sum(
        int(np.sum(traces.jacobi[index, :length, 0, 0] == traces.completions[index, :length]))
        for index, length in enumerate(traces.lengths)
    )
    share = correct / traces.lengths.sum()
    assert (rows[0]["source"], rows[0]["rank"]) == ("jacobi", 0)
    assert rows[0]["accuracy"][0] == pytest.approx(share, abs=1e-4)
    assert [row["match_length"] for row in rows[-4:]] == ["1", "2-3", "4-7", "8+"]
    table = calibrate.accuracy_table(rows)
    assert next(iter(table.columns[2].cells)) == f"{rows[0]['accuracy'][0]:.1%}"  # depth 1


def test_too_few_tokens_are_refused(model):
    with pytest.raises(InputError, match="2 completions of 8 tokens in total"):
        calibrate.calibrate(model, [[5], [6]], [Request("", max_new_tokens=4)] * 2, "jacobi", 4, no_progress)


def test_every_prompt_keeps_its_own_settings(model, monkeypatch):
    monkeypatch.setattr(tree_benchmark, "_REPEATS", 1)
    monkeypatch.setattr(tree_benchmark, "_RUN_TOKENS", 16)
    monkeypatch.setattr(tree_benchmark, "_ROUNDS", 1)
    [plain] = msn_jax.generate(model, PROMPTS[:1], max_new_tokens=40)
    requests = [
        Request(PROMPTS[0], 40, stop=(plain.text[8:11],)),
        Request(PROMPTS[1], 45, temperature=1.0, seed=3),
        Request(PROMPTS[2], 31, temperature=0.7, top_k=9, sample=2),
        Request(PROMPTS[3], 37),
    ]
    encoded = [encode_prompt(model.tokenizer, request, 999, "here") for request in requests]
    expected = [generation.tokens for generation in msn_jax.generate(model, requests, "autoregressive")]
    for decoder in ("tr_jacobi", "jacobi"):
        result = calibrate.calibrate(model, encoded, requests, decoder, 3, no_progress)
        completions = [
            row[:length].tolist() for row, length in zip(result.traces.completions, result.traces.lengths, strict=True)
        ]
        assert completions == expected
        assert all(candidate.exact_share == 1 for candidate in result.candidates)


def test_the_limits_of_the_prompts_are_written():
    requests = [Request("a", max_new_tokens=limit) for limit in (9, 5, 9)]
    assert calibrate.settings(requests, 16) == {"prompts": 3, "max_new_tokens": [5, 9], "max_width": 16}
    assert calibrate.settings(requests[:1], 16) == {"prompts": 1, "max_new_tokens": 9, "max_width": 16}


def test_invalid_input_is_one_line_and_exit_code_2(workdir, tmp_path):
    valid, few = tmp_path / "prompts.jsonl", tmp_path / "few.jsonl"
    valid.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    few.write_text('{"prompt": "a"}\n')
    model, prompts = f"--model={workdir}", f"--prompts={valid}"
    cases = [
        ([model], "--prompts"),
        ([prompts], "--model"),
        ([model, "--prompts=nowhere.jsonl"], "nowhere.jsonl"),
        ([model, f"--prompts={few}"], "give at least 4"),
        ([model, prompts, "--output=nowhere/tree.json"], "nowhere is not a directory"),
        ([model, prompts, f"--output={tmp_path}"], "is a directory"),
        ([model, prompts, "--output=tree.png"], "name the JSON file"),
        ([model, prompts, "--decoder=autoregressive"], "decoder"),
        ([model, prompts, "--max_width=1"], "max_width"),
        ([model, prompts, "--max_new_tokens=0"], "max_new_tokens"),
        (["--model=nowhere", prompts], "nowhere"),
        ([model, prompts, "--max_new_tokens=1"], "4 completions of 4 tokens in total"),
    ]
    commands.assert_refused("msn_jax.calibrate", cases, tmp_path)
