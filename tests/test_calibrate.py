"""From prompts to a tree that generate reads, with its figures and its picture; and what is refused."""

import json

import commands
import jax
import numpy as np
import pytest
import tiny_config

import msn_jax
from msn_jax import calibrate, train
from msn_jax.cli import InputError
from msn_jax.decode import tree as trees
from msn_jax.decode import tree_race, tree_search
from msn_jax.decode.tree import EITHER, JACOBI
from msn_jax.decode.tree_race import Expected

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPTS = ["the cat", "a", "mat sat on", "one and two"]


def show(items, title):
    return items


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("calibrate")
    tiny_config.write_data(directory / "train.jsonl")
    cfg = tiny_config.config_in(directory, steps=2)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        train.train(cfg, directory / "run")
    return directory / "run"


@pytest.fixture(scope="module")
def model(workdir):
    return msn_jax.load(workdir)


@pytest.fixture(scope="module")
def result(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_race, "_REPEATS", 1)
        patch.setattr(tree_race, "_ROOM", 16)  # the programs of the race
        patch.setattr(tree_race, "_ROUNDS", 1)
        prompts = [model.tokenizer.encode(prompt) for prompt in PROMPTS]
        return calibrate.calibrate(model, prompts, "tr_jacobi", 30, 2, show)


def test_the_race_is_between_trees_with_figures(result):
    names = [racer.name for racer in result.racers]
    assert {"autoregressive", "default"} < set(names)
    assert [racer.rate for racer in result.racers] == sorted((racer.rate for racer in result.racers), reverse=True)
    for racer in result.racers:
        assert racer.exact_share == 1
        assert racer.tokens_per_pass == pytest.approx(racer.expected.tokens_per_pass, rel=0.3)
        assert racer.rate > 0 and racer.expected.rate > 0 and racer.expected.seconds > 0
    assert list(result.widths) == [1, 2]
    assert all(best.tree.width == width for width, best in result.widths.items())
    assert result.widths[1].tokens_per_pass == 1


def test_what_is_written_is_read_by_generate(result, model, workdir, tmp_path):
    path = workdir / "tree.json"
    calibrate.write(result, model, "tr_jacobi", {"prompts": 4}, path)
    tree = result.racers[0].expected.tree
    assert trees.load(path) == tree
    assert trees.find(workdir, "tr_jacobi") == tree
    written = json.loads(path.read_text())
    assert written["decoder"] == "tr_jacobi"
    assert written["measured_tokens_per_second"] == pytest.approx(result.racers[0].rate, abs=0.1)
    assert [entry["width"] for entry in written["widths"]] == [1, 2]
    assert {"model", "dtype", "hardware", "versions", "race", "prompts"} < set(written)
    assert (workdir / "tree.png").read_bytes()[:4] == b"\x89PNG"
    [expected] = msn_jax.generate(model, PROMPTS[:1], "autoregressive", max_new_tokens=12)
    code, out, error = commands.run(
        "msn_jax.generate",
        [[f"--model={workdir}", "--prompt=the cat", f"--tree={path}", "--max_new_tokens=12"]],
        tmp_path,
    )[0]
    assert code == 0, error
    assert out == expected.text + "\n"


@pytest.mark.parametrize("tree", [trees.build([]), tree_search.authors_tree(), trees.chain(EITHER, 3, 2)])
def test_any_winner_can_be_written_and_drawn(result, model, tree, tmp_path):
    winner = result.racers[0]
    winner = type(winner)("it", Expected(tree, 1e-3, 1.0, 1.0), 1.0, 1.0, 1.0)
    changed = type(result)(result.widths, [winner, *result.racers], result.known)
    calibrate.write(changed, model, "tr_jacobi", {}, tmp_path / "tree.json")
    assert trees.load(tmp_path / "tree.json") == tree
    for node in json.loads((tmp_path / "tree.json").read_text())["nodes"]:
        assert 0 <= node["acceptance"] <= 1
    assert (tmp_path / "tree.png").stat().st_size > 10_000


def test_who_races():
    def best(width, rate):
        return Expected(trees.chain(JACOBI, width - 1), 1.0, 1.0, rate)

    widths = {width: best(width, rate) for width, rate in [(1, 9), (2, 5), (3, 7), (4, 6), (6, 8), (8, 1), (64, 2)]}
    lined_up = tree_race.line_up(widths, "jacobi", 64)
    assert {name: tree.width for name, tree in lined_up.items()} == {
        "width 6": 6,
        "width 3": 3,
        "width 4": 4,  # which is the default as well
        "width 8": 8,
        "autoregressive": 1,
    }
    assert "authors' 69 nodes" in tree_race.line_up(widths, "tr_jacobi", 64)
    assert "default" in tree_race.line_up(widths, "tr_jacobi", 64)


def test_expected_speed_is_tokens_over_time(result):
    tree = trees.chain(EITHER, 2)
    guess = tree_race._expected(tree, 0.5, result.known, 10.0)
    seen = tree_search.replay(tree, result.known)
    assert guess.rate == pytest.approx(result.known.sizes.sum() / (0.5 * len(seen.count) + 10))
    assert guess.tokens_per_pass == pytest.approx(seen.tokens_per_pass)


def test_passes_are_timed_one_by_one(model, monkeypatch):
    monkeypatch.setattr(tree_race, "_REPEATS", 3)
    monkeypatch.setattr(tree_race, "_ROOM", 16)
    timers = tree_race.pass_timers(model, "tr_jacobi", {"root": trees.build([])}, [5, 6, 7] * 20, 30)
    seconds = tree_race.pass_seconds(timers, show)
    assert 1e-6 < seconds["root"] < 1


def test_marginal_shares(result):
    table = calibrate.marginal_table(result.known)
    cells = list(table.columns[2].cells)  # depth 1
    known = result.known
    right = sum(
        int(np.sum(known.rows[text, :size, 0, 0] == known.answers[text, :size]))
        for text, size in enumerate(known.sizes)
    )
    assert cells[0] == f"{right / known.sizes.sum():.1%}"


def test_too_little_text(model):
    with pytest.raises(InputError, match="2 answers of 8 tokens in all"):
        calibrate.calibrate(model, [[5], [6]], "jacobi", 4, 4, show)


def test_bad_input_exits_2(workdir, tmp_path):
    good, few = tmp_path / "prompts.jsonl", tmp_path / "few.jsonl"
    good.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    few.write_text('{"prompt": "a"}\n')
    model, prompts = f"--model={workdir}", f"--prompts={good}"
    cases = [
        ([model], "--prompts"),
        ([prompts], "--model"),
        ([model, "--prompts=nowhere.jsonl"], "nowhere.jsonl"),
        ([model, f"--prompts={few}"], "give at least 4"),
        ([model, prompts, "--output=nowhere/tree.json"], "no such folder"),
        ([model, prompts, f"--output={tmp_path}"], "is a folder"),
        ([model, prompts, "--output=tree.png"], "name the JSON file"),
        ([model, prompts, "--decoder=autoregressive"], "decoder"),
        ([model, prompts, "--max_width=1"], "max_width"),
        ([model, prompts, "--max_new_tokens=0"], "max_new_tokens"),
        (["--model=nowhere", prompts], "nowhere"),
        ([model, prompts, "--max_new_tokens=1"], "4 answers of 4 tokens in all"),
    ]
    commands.assert_refused("msn_jax.calibrate", cases, tmp_path)
