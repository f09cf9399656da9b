"""GSM8K: prompts, extracted answers, and an evaluation that is interrupted."""

import dataclasses
import random

import pytest
import refusals
import runs
import tiny

from msn_jax.evals import gsm8k

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def data(tmp_path):
    train = [{"question": f"q{i}", "answer": f"because\n#### {i}"} for i in range(7)]
    runs.write_lines(tmp_path / "data" / "train.jsonl", train)
    test = [{"question": f"the cat {i}", "answer": f"a\n#### 1,00{i}"} for i in range(5)]
    runs.write_lines(tmp_path / "data" / "test.jsonl", test)
    return str(tmp_path / "data")


def test_a_prompt_has_five_shots_and_ends_with_the_question(data):
    questions = gsm8k.read(data)
    drawn = random.Random(1234)
    for number, question in enumerate(questions):
        *shots, last = question.prompt.split("\n\n")
        numbers = drawn.sample(range(7), 5)
        assert shots == [f"Question: q{i}\nAnswer: because\n#### {i}" for i in numbers]
        assert last == f"Question: the cat {number}\nAnswer:"
        assert (question.id, question.reference) == (number, {"answer": f"100{number}"})


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("3 + 4\n#### 7", "7", "7"),
        ("#### 1,234.\n#### 5", "1234", "5"),
        ("#### -3", "-3", "-3"),
        ("it costs $1,500.", None, "1500"),
        ("#### $12", None, "12"),  # as in the harness, the strict pattern has no $
        ("12 of 5", None, "5"),
        ("none", None, None),
    ],
)
def test_the_two_extracted_answers(text, strict, flexible):
    assert (gsm8k.strict_answer(text), gsm8k.flexible_answer(text)) == (strict, flexible)


def test_scores(data):
    texts = {0: "#### 1000", 1: "1001", 2: "#### 2", 3: "x", 4: "#### 1004."}
    question = gsm8k.read(data)
    scores = [gsm8k.score(question[i], texts[i]) for i in texts]
    assert [score["strict_match"] for score in scores] == [True, False, False, False, True]
    assert [score["flexible_match"] for score in scores] == [True, True, False, False, True]


def test_an_interrupted_evaluation_continues(data, tmp_path, monkeypatch):
    model = tiny.model(max_length=512)
    decoders = ("autoregressive", "tr_jacobi")
    whole = runs.run("gsm8k", data, model, tmp_path / "whole", decoders, batch_size=2)
    assert [row["decoder"] for row in whole] == list(decoders)
    assert {row["questions"] for row in whole} == {5}
    assert whole[0]["strict_match"] == 0 == whole[0]["strict_match_stderr"]
    assert whole[1]["mean_accepted_tokens"] >= whole[0]["mean_accepted_tokens"] == 1

    for sample in runs.samples(tmp_path / "whole"):
        assert "".join(sample["passes"]) == sample["text"]
        assert len(sample["passes"]) == len(sample["accept_lengths"]) == sample["forward_passes"]
        assert sum(sample["accept_lengths"]) == len(sample["tokens"])

    output = tmp_path / "killed"
    arguments = ("gsm8k", data, model, output, decoders)
    runs.killed_after(3, monkeypatch, runs.run, *arguments, batch_size=2)
    assert (output / "samples.jsonl").read_text().count("\n") == 1 + 3  # the header, and no newline after a half sample
    assert runs.run(*arguments, batch_size=3) == whole
    assert _texts(output) == _texts(tmp_path / "whole")
    before = (output / "samples.jsonl").read_bytes()
    assert runs.run(*arguments) == whole
    assert (output / "samples.jsonl").read_bytes() == before


def _texts(output):
    return {(s["decoder"], s["question_id"]): s["text"] for s in runs.samples(output)}


def test_a_higher_limit_extends_an_evaluation_and_other_settings_are_refused(data, tmp_path):
    model, output = tiny.model(max_length=512), tmp_path / "out"
    assert runs.run("gsm8k", data, model, output, limit=2)[0]["questions"] == 2
    first = runs.samples(output)
    assert runs.run("gsm8k", data, model, output, limit=3)[0]["questions"] == 3
    assert runs.samples(output)[:2] == first and len(runs.samples(output)) == 3
    message = refusals.refusal(lambda: runs.run("gsm8k", data, model, output, max_new_tokens=9))
    assert "another evaluation (different: max_new_tokens)" in message
    message = refusals.refusal(lambda: runs.run("gsm8k", data, tiny.model(512, seed=1), output))
    assert "another evaluation (different: decoders)" in message


def test_samples_of_an_earlier_protocol_are_refused(data, tmp_path, monkeypatch):
    model = tiny.model(max_length=512)
    runs.run("gsm8k", data, model, tmp_path / "out", limit=1)
    monkeypatch.setattr(gsm8k, "SUITE", dataclasses.replace(gsm8k.SUITE, protocol=gsm8k.SUITE.protocol + 1))
    message = refusals.refusal(lambda: runs.run("gsm8k", data, model, tmp_path / "out", limit=1))
    assert "another evaluation (different: protocol)" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "test.jsonl: is empty: expected GSM8K's test.jsonl"),
        ('{"question": "q"}\n', "test.jsonl:1: has no field 'answer': expected GSM8K's test.jsonl"),
        ('{"question": "q", "answer": 3}\n', "test.jsonl:1: field 'answer' must be a text"),
        ('{"question": "q", "answer": "3"}\n', "test.jsonl:1: the answer has no number after '####'"),
        ('{"question"\n', "test.jsonl:1: line 1: broken JSON"),
        ("[1]\n", "test.jsonl: item 1: must be a JSON object, not int"),
        ('{"question_id": 1, "category": "qa", "turns": ["a"]}\n', "test.jsonl:1: has no field 'question'"),
    ],
)
def test_a_bad_file_is_refused(data, tmp_path, content, words):
    (tmp_path / "data" / "test.jsonl").write_text(content)
    assert words in refusals.refusal(gsm8k.read, data)


def test_a_missing_or_short_file_is_refused(data, tmp_path):
    train = tmp_path / "data" / "train.jsonl"
    runs.write_lines(train, [{"question": "q", "answer": "#### 1"}] * 4)
    assert "train.jsonl: has 4 questions; 5 shots need as many" in refusals.refusal(gsm8k.read, data)
    train.unlink()
    assert "train.jsonl: cannot be read (No such file or directory)" in refusals.refusal(gsm8k.read, data)
