"""MT-bench: turns, temperatures, answer files, and an evaluation that is interrupted."""

import json

import pytest
import refusals
import runs
import tiny

import msn_jax
from msn_jax.decode.request import Request
from msn_jax.evals import mt_bench

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def data(tmp_path):
    lines = [
        runs.line(82, "math", ["three and", "is seven"]),
        runs.line(81, "writing", ["the cat", "sat on"]),
        runs.line(83, "math", ["five and", "is eleven"]),
    ]
    return runs.write_lines(tmp_path / "question.jsonl", lines)


def answers(output, decoder):
    lines = (output / "answers" / f"{decoder}.jsonl").read_text().splitlines()
    return {answer["question_id"]: answer for answer in map(json.loads, lines)}


def test_answer_files_have_the_format_of_fastchat(data, tmp_path):
    output = tmp_path / "out"
    rows = runs.run("mt_bench", data, tiny.model(), output, ("autoregressive", "auto"), seed=3, batch_size=2)
    written = answers(output, "auto")
    assert list(written) == [81, 82, 83]
    for answer in written.values():
        assert list(answer) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
        [choice] = answer["choices"]
        assert list(choice) == ["index", "turns"] and len(choice["turns"]) == 2
    choices = {name: [one["choices"] for one in answers(output, name).values()] for name in ("auto", "autoregressive")}
    assert choices["auto"] == choices["autoregressive"]
    groups = [(row["decoder"], row["category"], row["turns"]) for row in rows]
    assert groups[:3] == [("autoregressive", "math", 4), ("autoregressive", "writing", 2), ("autoregressive", "all", 6)]
    assert rows[2]["mean_accepted_tokens"] == 1


@pytest.mark.parametrize(("number", "temperature"), [(81, 0.7), (82, 0.0)])
def test_turn_2_follows_the_answer_to_turn_1_at_the_temperature_of_the_category(data, tmp_path, number, temperature):
    model = tiny.model()
    runs.run("mt_bench", data, model, tmp_path / "out", seed=3)
    first, second = answers(tmp_path / "out", "autoregressive")[number]["choices"][0]["turns"]
    turns = {81: ["the cat", "sat on"], 82: ["three and", "is seven"]}[number]
    messages = [{"role": "user", "content": turns[0]}]
    settings = {"max_new_tokens": 8, "temperature": temperature, "seed": 3, "sample": number}
    [generation] = msn_jax.generate(model, [Request(messages, **settings)])
    assert first == generation.text.strip()
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": turns[1]}]
    [generation] = msn_jax.generate(model, [Request(messages, **settings)])
    assert second == generation.text.strip()


def test_a_conversation_that_fills_the_context_has_an_empty_last_turn(tmp_path):
    data = runs.write_lines(tmp_path / "question.jsonl", [runs.line(1, "stem", ["the cat", "sat on the mat " * 30])])
    [row] = runs.run("mt_bench", data, tiny.model(max_length=64), tmp_path / "out")
    assert row["turns"] == 1
    assert answers(tmp_path / "out", "autoregressive")[1]["choices"][0]["turns"][1] == ""


def test_an_interrupted_evaluation_continues(data, tmp_path, monkeypatch):
    model, names = tiny.model(), ("autoregressive", "tr_jacobi")
    whole = runs.run("mt_bench", data, model, tmp_path / "whole", names)
    arguments = ("mt_bench", data, model, tmp_path / "killed", names)
    for count in (1, 3, 4):
        runs.killed_after(count, monkeypatch, runs.run, *arguments)
    assert runs.run(*arguments) == whole
    texts = [
        {(s["question_id"], s["decoder"], s["turn"]): s["text"] for s in runs.samples(tmp_path / name)}
        for name in ("whole", "killed")
    ]
    assert texts[0] == texts[1] and len(texts[0]) == 12


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([runs.line(1, "qa", ["a"])], "question.jsonl:1: category 'qa' is not one of writing, roleplay,"),
        ([runs.line(1, "math", ["a"]), runs.line(1, "math", ["b"])], "question.jsonl:2: has the id 1 of"),
        ([{"question_id": 1, "turns": ["a"]}], "question.jsonl:1: has no field 'category': expected MT-bench's"),
        ([], "question.jsonl: is empty: expected MT-bench's question.jsonl"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, lines, words):
    data = runs.write_lines(tmp_path / "question.jsonl", lines)
    assert words in refusals.refusal(mt_bench.read, data)
