"""Spec-Bench: turns, answer files, the table, and an evaluation that is interrupted."""

import json

import jax
import pytest
import refusals
import runs
import tiny

import msn_jax
from msn_jax.decode import programs
from msn_jax.decode.engine import Decoder
from msn_jax.evals import spec_bench

pytestmark = pytest.mark.usefixtures("quick_compilation")

DECODERS = ("autoregressive", "tr_jacobi", "prompt_lookup")


@pytest.fixture
def data(tmp_path):
    lines = [
        runs.line(81, "writing", ["the cat", "sat on"]),
        runs.line(90, "math", ["three and four", "is seven"]),
        runs.line(161, "qa", ["a dog"]),
        runs.line(162, "qa", ["a cat"]),
        runs.line(163, "qa", ["a mat"]),
    ]
    return runs.write_lines(tmp_path / "question.jsonl", lines)


def test_groups(data):
    questions = spec_bench.read(data)
    assert [question.group for question in questions] == ["mt_bench", "mt_bench", "qa", "qa", "qa"]
    assert questions[1].reference == {"category": "math"}


def test_answer_files_have_the_format_of_the_benchmark(data, tmp_path):
    model = tiny.model()
    rows = runs.run("spec_bench", data, model, tmp_path / "out", DECODERS, limit=2)
    for name in DECODERS:
        lines = (tmp_path / "out" / "answers" / f"{name}.jsonl").read_text().splitlines()
        answers = [json.loads(text) for text in lines]
        assert [answer["question_id"] for answer in answers] == [81, 90, 161, 162]
        for answer in answers:
            assert list(answer) == ["question_id", "category", "answer_id", "model_id", "choices", "tstamp"]
            [choice] = answer["choices"]
            names = ["index", "turns", "decoding_steps", "new_tokens", "wall_time", "accept_lengths"]
            assert list(choice) == names
            count = 2 if answer["question_id"] < 100 else 1
            assert [len(choice[name]) for name in names[1:-1]] == [count] * 4
            assert len(choice["accept_lengths"]) == sum(choice["decoding_steps"])
            assert sum(choice["accept_lengths"]) == sum(choice["new_tokens"])
            assert min(choice["wall_time"]) > 0
        assert answers[0]["category"] == "writing"
    groups = [(row["group"], row["decoder"]) for row in rows]
    assert groups == [(group, name) for group in ("mt_bench", "qa", "all") for name in DECODERS]
    assert all(row["exact"] == 1 for row in rows)
    assert all(row["speedup"] == 1 for row in rows if row["decoder"] == "autoregressive")
    assert [row["questions"] for row in rows[::3]] == [2, 2, 4]


def test_turn_2_follows_the_own_answer_to_turn_1(data):
    model = tiny.model()
    question = spec_bench.read(data)[0]
    sample = spec_bench.answer(Decoder(model, "tr_jacobi"), question, 8)
    messages = [{"role": "user", "content": "the cat"}]
    [first] = msn_jax.generate(model, [messages], max_new_tokens=8)
    messages += [{"role": "assistant", "content": first.text.strip()}, {"role": "user", "content": "sat on"}]
    [second] = msn_jax.generate(model, [messages], max_new_tokens=8)
    assert sample["tokens"] == [first.tokens, second.tokens]
    assert sample["turns"] == [first.text.strip(), second.text.strip()]
    assert ["".join(parts) for parts in sample["passes"]] == [first.text, second.text]
    assert list(map(len, sample["passes"])) == sample["decoding_steps"]


def test_a_conversation_that_fills_the_context_has_an_empty_last_turn(tmp_path):
    data = runs.write_lines(tmp_path / "question.jsonl", [runs.line(1, "qa", ["the cat", "sat on the mat " * 30])])
    model = tiny.endless(tiny.model(max_length=64))
    [row] = runs.run("spec_bench", data, model, tmp_path / "out", max_new_tokens=40)
    [sample] = runs.samples(tmp_path / "out")
    assert (sample["new_tokens"], sample["turns"][1], row["questions"]) == ([40, 0], "", 1)
    assert sample["wall_time"][1] == 0
    data = runs.write_lines(tmp_path / "question.jsonl", [runs.line(1, "qa", ["sat on the mat " * 30])])
    message = refusals.refusal(lambda: runs.run("spec_bench", data, model, tmp_path / "other"))
    assert "question.jsonl:1: " in message and "leave no space" in message


def test_seconds_without_compilation(data):
    """A run with compilation takes many times as long as one without."""
    model = tiny.model(seed=5)
    question = spec_bench.read(data)[2]
    jax.clear_caches()
    with programs.recorded() as compiled:
        first = spec_bench.answer(Decoder(model, "jacobi"), question, 8)
    assert compiled
    with programs.recorded() as compiled:
        second = spec_bench.answer(Decoder(model, "jacobi"), question, 8)
    assert not compiled
    assert first["wall_time"][0] < 10 * second["wall_time"][0]


def sample(group, tokens, seconds, accept_lengths):
    return {
        "question_id": 7,
        "group": group,
        "tokens": tokens,
        "new_tokens": [len(turn) for turn in tokens],
        "wall_time": seconds,
        "accept_lengths": accept_lengths,
    }


def test_the_table():
    answers = {
        "autoregressive": [
            [sample("mt_bench", [[1, 2], [3, 4]], [1.0, 1.0], [1] * 4), sample("qa", [[5]], [1.0], [1])]
        ],
        "jacobi": [[sample("mt_bench", [[1, 2], [3, 4]], [0.5, 0.5], [2, 1, 1]), sample("qa", [[6]], [0.5], [1])]],
    }
    rows = {(row["group"], row["decoder"]): row for row in spec_bench.summarize(answers)}
    assert rows["mt_bench", "jacobi"]["speedup"] == 2
    assert rows["all", "jacobi"]["tokens_per_second"] == 3  # the mean of 4 and 2
    assert rows["all", "jacobi"]["speedup"] == 2
    assert rows["all", "jacobi"]["mean_accepted_tokens"] == 5 / 4  # the mean of all accept lengths
    assert [rows[group, "jacobi"]["exact"] for group in ("mt_bench", "qa", "all")] == [1, 0, 0.5]
    differences = [rows[group, "jacobi"]["first_difference"] for group in ("mt_bench", "qa", "all")]
    assert differences == [None, "question 7, turn 1, token 0", "question 7, turn 1, token 0"]
    del answers["autoregressive"]
    assert "speedup" not in spec_bench.summarize(answers)[0]


def test_runs_are_joined_by_question():
    """Seconds and passes of all runs count, and one run with another output is a difference."""
    reference = [[sample("qa", [[1], [2, 3]], [2.0, 4.0], [1, 1, 1])] for _ in range(2)]
    ours = [
        [sample("qa", [[1], [2, 3]], [1.0, 1.0], [1, 2])],
        [sample("qa", [[1], [2, 4]], [1.0, 3.0], [1, 1, 1])],
    ]
    [_, row] = spec_bench.summarize({"autoregressive": reference, "auto": ours})
    assert row["tokens_per_second"] == 1
    assert (row["speedup"], row["speedup_by_run"]) == (2, [3, 1.5])
    assert row["mean_accepted_tokens"] == 6 / 5
    assert (row["exact"], row["first_difference"]) == (0, "question 7, turn 2, token 1")


def test_three_runs(data, tmp_path):
    model, output = tiny.model(), tmp_path / "out"
    runs.run("spec_bench", data, model, output, DECODERS[:2], limit=1)
    rows = runs.run("spec_bench", data, model, output, DECODERS[:2], limit=1, runs=3)
    ids = [81, 161]
    logged = [(one["run"], one["question_id"]) for one in runs.samples(output) if one["decoder"] == "tr_jacobi"]
    assert logged == [(run, i) for run in range(3) for i in ids]
    assert all(len(row["speedup_by_run"]) == 3 and row["exact"] == 1 for row in rows)
    for run, name in enumerate(("tr_jacobi", "tr_jacobi-run-2", "tr_jacobi-run-3")):
        answers = [json.loads(text) for text in (output / "answers" / f"{name}.jsonl").read_text().splitlines()]
        times = [one["wall_time"] for one in runs.samples(output) if (one["run"], one["decoder"]) == (run, DECODERS[1])]
        assert [answer["choices"][0]["wall_time"] for answer in answers] == times


def test_an_interrupted_evaluation_continues(data, tmp_path, monkeypatch):
    model = tiny.model()
    runs.run("spec_bench", data, model, tmp_path / "whole", DECODERS)
    arguments = ("spec_bench", data, model, tmp_path / "killed", DECODERS)
    runs.killed_after(5, monkeypatch, runs.run, *arguments)
    runs.run(*arguments)
    orders = [
        [(one["question_id"], one["decoder"], one["tokens"]) for one in runs.samples(tmp_path / name)]
        for name in ("whole", "killed")
    ]
    assert orders[0] == orders[1] and len(orders[0]) == 15
    names = [name for _, name, _ in orders[0]]
    assert names[:6] == [*DECODERS, *reversed(DECODERS)]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([runs.line(1, "writing", ["a", "b"])], "has MT-bench's questions alone: expected Spec-Bench's question.jsonl"),
        ([runs.line(1, "poems", ["a"])], "question.jsonl:1: category 'poems' is not one of writing, roleplay,"),
        ([runs.line(1, "qa", ["a"]), runs.line(1, "qa", ["b"])], "question.jsonl:2: has the id 1 of"),
        ([runs.line("1", "qa", ["a"])], "question.jsonl:1: field 'question_id' must be an integer"),
        ([runs.line(1, "qa", [])], "question.jsonl:1: field 'turns' must be a list of texts"),
        ([runs.line(1, "qa", "a")], "question.jsonl:1: field 'turns' must be a list of texts"),
        ([{"question": "q", "answer": "#### 1"}], "question.jsonl:1: has no field 'question_id'"),
        ([], "question.jsonl: is empty"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, lines, words):
    data = runs.write_lines(tmp_path / "question.jsonl", lines)
    assert words in refusals.refusal(spec_bench.read, data)
