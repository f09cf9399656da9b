"""HumanEval and MBPP: prompts, programs, pass@k, and evaluations with and without the execution of programs."""

import gzip
import itertools
import json

import pyarrow
import pytest
import refusals
import runs
import tiny
from pyarrow import parquet

import msn_jax
from msn_jax.decode.request import Request, encode_prompt
from msn_jax.evals import code_execution, human_eval, mbpp, programs
from msn_jax.evals.code_execution import Outcome

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": 'def cat(n):\n    """ the cat """\n',
    "entry_point": "cat",
    "canonical_solution": "    return n + 1\n",
    "test": "\n\ndef check(candidate):\n    assert candidate(1) == 2\n",
}


def task(number):
    tests = [f"assert f({i}) == {i + number}" for i in range(4)]
    return {"task_id": number, "text": f"add {number}", "code": f"def f(n): return n + {number}", "test_list": tests}


@pytest.fixture
def human_eval_data(tmp_path):
    lines = [json.dumps(PROBLEM | {"task_id": f"HumanEval/{i}"}) + "\n" for i in range(4)]
    path = tmp_path / "HumanEval.jsonl.gz"
    path.write_bytes(gzip.compress("".join(lines).encode()))
    return str(path)


@pytest.fixture
def mbpp_data(tmp_path):
    return runs.write_lines(tmp_path / "mbpp.jsonl", [task(i) for i in (1, 2, 3, 4, 10, 11, 510, 511)])


def test_a_completed_function_passes_and_a_wrong_one_does_not(human_eval_data):
    question = human_eval.read(human_eval_data)[2]
    assert human_eval.raw_request(question).prompt == PROBLEM["prompt"]
    for text, passed in (("    return n + 1", True), ("    return n", False), ("    import os; os._exit(0)", False)):
        outcome = code_execution.run(human_eval.to_program(question, text), 5.0)
        assert outcome.passed == passed, outcome


def test_the_answer_of_a_chat_model_is_begun(human_eval_data):
    request = human_eval.chat_request(human_eval.read(human_eval_data)[0])
    [message] = request.prompt
    task = "Write a solution to the following problem and make sure that it passes the tests:"
    assert message["content"] == f"{task}\n```python\n{PROBLEM['prompt']}\n```\n"
    assert request.response_prefix == f"Here is the completed function:\n```python\n{PROBLEM['prompt']}\n"
    assert request.stop == ("```",)


def test_a_begun_answer_continues():
    model = tiny.model()
    messages = [{"role": "user", "content": "the cat"}]
    plain = encode_prompt(model.tokenizer, Request(messages), 256, "")
    begun = Request(messages, 8, response_prefix="sat on")
    ids = encode_prompt(model.tokenizer, begun, 256, "")
    assert ids == [*plain, *model.tokenizer.encode("sat on")]
    [generation] = msn_jax.generate(model, [begun])
    assert generation.text == model.tokenizer.decode(generation.tokens, start=False)


def test_mbpp_prompts_have_three_shots(mbpp_data):
    questions = mbpp.read(mbpp_data)
    assert [question.id for question in questions] == [11, 510]
    *shots, asked = questions[0].prompt.split("\n[DONE]\n\n")
    assert len(shots) == 3
    for number, shot in zip((2, 3, 4), shots, strict=True):
        tests = "\n".join(task(number)["test_list"][:3])
        expected = (
            f"You are an expert Python programmer, and here is your task: add {number} Your code should pass these"
        )
        assert shot == f"{expected} tests:\n\n{tests}\n[BEGIN]\n{task(number)['code']}"
    assert asked.endswith("assert f(2) == 13\n[BEGIN]\n")
    for text, passed in ((task(11)["code"], True), (task(2)["code"], False)):
        assert code_execution.run(mbpp.to_program(questions[0], text + "\n"), 5.0).passed == passed


def test_sanitized_mbpp_is_a_list_with_imports_and_any_number_of_tests(tmp_path):
    records = [sanitized(number) for number in (2, 3, 4, 11, 600)]
    path = tmp_path / "sanitized-mbpp.json"
    path.write_text(json.dumps(records))
    [question] = mbpp.read(str(path))
    assert (question.id, question.location) == (11, f"{path}: item 4")
    assert question.prompt.endswith("here is your task: add 11 Your code should pass these tests:\n\n" + SHOWN_TESTS)
    assert question.prompt.count("[BEGIN]") == 4 and "import math" not in question.prompt
    code = task(11)["code"]
    assert code_execution.run(mbpp.to_program(question, code), 5.0).passed
    wrong = code.replace("n + 11", "n + 11 if n < 3 else 0")  # the fourth test, which the prompt does not show
    assert not code_execution.run(mbpp.to_program(question, wrong), 5.0).passed


def sanitized(number):
    record = task(number)
    tests = {"test_imports": ["import math"], "test_list": [*record["test_list"][:3], f"assert f(math.pi) > {number}"]}
    return {"task_id": number, "prompt": record["text"], "code": record["code"], **tests}


SHOWN_TESTS = "assert f(0) == 11\nassert f(1) == 12\nassert f(2) == 13\n[BEGIN]\n"


def test_mbpp_plus_runs_its_own_tests(tmp_path):
    test = "for n in range(9):\n    assert f(n) == n + {}\n"
    records = [{**sanitized(number), "test": test.format(number)} for number in (2, 3, 4)]
    path = tmp_path / "test.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    questions = mbpp.read(str(path))
    assert [question.id for question in questions] == [2, 3, 4]
    assert questions[0].reference == {"tests": [test.format(2)]}
    path.write_bytes(b"PAR1")
    assert "test.parquet: not a Parquet file, or damaged: expected mbpp.jsonl" in refusals.refusal(mbpp.read, str(path))


@pytest.mark.parametrize(
    ("name", "solution", "inputs", "right", "wrong"),
    [
        ("cat", "    return n + 1\n", [[1], [10**20]], "    return 1 + n", "    return n + 1 if n < 5 else n"),
        ("cat", "    return n / 3\n", [[1], [2]], "    return n * (1 / 3) + 1e-9", "    return n / 3 + 1e-3"),
        ("cat", "    return [n / 3]\n", [[1]], "    return [n * (1 / 3) + 1e-9]", "    return [n / 3, 0]"),
        ("find_zero", "    return 1.0\n", [[[-2, 1]]], "    return 2 + 1e-8", "    return 1.0"),
    ],
)
def test_human_eval_plus_compares_with_the_solution(tmp_path, name, solution, inputs, right, wrong):
    plus = {"canonical_solution": solution, "entry_point": name, "prompt": f"def {name}(n):\n"}
    record = {**PROBLEM, **plus, "base_input": inputs[:1], "plus_input": inputs[1:], "atol": 0, "contract": ""}
    [question] = human_eval.read(runs.write_lines(tmp_path / "HumanEvalPlus.jsonl", [record]))
    for text, passed in ((right, True), (wrong, False)):
        outcome = code_execution.run(human_eval.to_program(question, text), 5.0)
        assert outcome.passed == passed, outcome


def test_pass_at_k_is_the_share_of_draws_with_a_correct_sample():
    for count, correct, k in ((5, 2, 3), (4, 0, 2), (4, 4, 1), (6, 1, 6)):
        draws = list(itertools.combinations(range(count), k))
        share = sum(min(draw) < correct for draw in draws) / len(draws)
        assert programs.pass_at_k(count, correct, k) == pytest.approx(share)


def test_programs_run_only_if_that_is_allowed(human_eval_data, tmp_path, monkeypatch):
    model, output = tiny.model(), tmp_path / "out"
    monkeypatch.setattr(code_execution, "run", lambda *_: pytest.fail("ran a program"))
    [row] = runs.run("human_eval", human_eval_data, model, output, chat=False)
    assert row == {"decoder": "autoregressive", "questions": 4, "prompt": "raw"}
    for sample in runs.samples(output):
        assert sample["program"].startswith(PROBLEM["prompt"] + sample["text"])
    ran = []
    monkeypatch.setattr(code_execution, "run", lambda source, _: ran.append(source) or Outcome(len(ran) < 2, "", {}))
    [row] = runs.run("human_eval", human_eval_data, model, output, chat=False, allow_code_execution=True)
    assert (row["pass@1"], row["samples"], len(ran)) == (0.25, 1, 4)
    assert [outcome["passed"] for outcome in runs.samples(output, "outcomes.jsonl")] == [True, False, False, False]


@pytest.mark.parametrize("suite", ["human_eval", "mbpp"])
def test_an_interrupted_evaluation_continues(suite, human_eval_data, mbpp_data, tmp_path, monkeypatch):
    data = {"human_eval": human_eval_data, "mbpp": mbpp_data}[suite]
    model, output = tiny.model(1024), tmp_path / "killed"
    settings = {"num_samples": 3, "temperature": 1.0, "seed": 5, "allow_code_execution": True, "batch_size": 2}
    whole = runs.run(suite, data, model, tmp_path / "whole", **settings)
    total = 3 * whole[0]["questions"]
    arguments = (suite, data, model, output)
    runs.killed_after(2, monkeypatch, runs.run, *arguments, **settings)  # between two samples
    runs.killed_after(total, monkeypatch, runs.run, *arguments, **settings)  # between two outcomes
    assert runs.run(*arguments, **settings) == whole
    assert len(runs.samples(output)) == len(runs.samples(output, "outcomes.jsonl")) == total
    texts = [
        {(s["question_id"], s["sample"]): s["text"] for s in runs.samples(tmp_path / n)} for n in ("whole", "killed")
    ]
    assert texts[0] == texts[1] and len(set(texts[0].values())) > total // 2
    assert whole[0]["pass@1"] == 0 and whole[0]["samples"] == 3
    more = runs.run(*arguments, **settings | {"num_samples": 4})
    assert more[0]["samples"] == 4
    shards = tmp_path / "shards"  # by other processes
    for i in (1, 2):
        directory = shards / f"shard-{i}-of-2"
        directory.mkdir(parents=True)
        [row] = runs.run(suite, data, model, directory, shard=(i, 2), **settings)
        assert row["questions"] == whole[0]["questions"] // 2
    with monkeypatch.context() as patch:
        patch.setattr(code_execution, "run", lambda *_: pytest.fail("ran a program again"))
        assert runs.run(suite, data, model, shards, **settings) == whole
    assert {(s["question_id"], s["sample"]): s["text"] for s in runs.samples(shards)} == texts[0]


def test_the_table(human_eval_data, tmp_path, monkeypatch):
    passed = iter([1, 1, 0, 0, 0, 0, 0, 1])  # two samples of each question
    monkeypatch.setattr(code_execution, "run", lambda *_: Outcome(bool(next(passed)), "timed out", {}))
    monkeypatch.setattr(programs, "_KS", (1, 2, 3))
    settings = {"num_samples": 2, "temperature": 1.0, "allow_code_execution": True}
    [row] = runs.run("human_eval", human_eval_data, tiny.model(), tmp_path / "out", **settings)
    assert row["prompt"] == "chat"  # the tokenizer has role symbols
    assert (row["pass@1"], row["pass@2"], row["timed_out"]) == (3 / 8, 1 / 2, 8)
    assert "pass@3" not in row


def test_several_greedy_samples_are_refused(human_eval_data, tmp_path):
    call = lambda: runs.run("human_eval", human_eval_data, tiny.model(), tmp_path / "out", num_samples=2)  # noqa: E731
    assert "--num_samples=2: greedy samples are equal; set --temperature" in refusals.refusal(call)


@pytest.mark.parametrize(
    ("read", "lines", "words"),
    [
        (human_eval.read, [], "is empty: expected HumanEval.jsonl.gz"),
        (human_eval.read, [task(11)], ":1: field 'task_id' must be a text: expected HumanEval.jsonl.gz"),
        (human_eval.read, [PROBLEM, PROBLEM], ":2: has the id 'HumanEval/0' of"),
        (mbpp.read, [PROBLEM], ":1: field 'task_id' must be an integer: expected mbpp.jsonl"),
        (mbpp.read, [task(2), task(3), task(11)], "has no task 4, one of the shots: expected mbpp.jsonl"),
        (mbpp.read, [task(2), task(3), task(4)], "has no task from 11 to 510"),
        (mbpp.read, [{**task(2), "test_list": []}], ":1: field 'test_list' must be a list of texts"),
        (mbpp.read, [{**task(2), "text": 3}], ":1: field 'text' must be a text"),
        (
            human_eval.read,
            [{**PROBLEM, "plus_input": []}],
            ":1: has no field 'base_input'",
        ),
    ],
)
def test_a_bad_file_is_refused(tmp_path, read, lines, words):
    data = runs.write_lines(tmp_path / "data.jsonl", lines)
    assert words in refusals.refusal(read, data)


def test_a_damaged_gzip_file_is_refused(tmp_path):
    path = tmp_path / "HumanEval.jsonl.gz"
    path.write_text("{}")
    assert "not a gzip file, or damaged: expected HumanEval.jsonl.gz" in refusals.refusal(human_eval.read, str(path))
    path.write_bytes(gzip.compress(b"{}" * 100)[:-12])
    assert "not a gzip file, or damaged" in refusals.refusal(human_eval.read, str(path))
    damaged = bytearray(gzip.compress(b"{}" * 100))
    damaged[10] ^= 0xFF  # the first byte after the header
    path.write_bytes(damaged)
    assert "not a gzip file, or damaged" in refusals.refusal(human_eval.read, str(path))


def test_a_parquet_file_that_is_not_utf_8_is_refused(tmp_path):
    path = tmp_path / "test.parquet"
    column = pyarrow.array([b"\xff"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"task_id": column}), path)
    message = refusals.refusal(human_eval.read, str(path))
    assert "test.parquet: not a Parquet file, or damaged: expected HumanEval.jsonl.gz" in message


def test_test_imports_may_be_null(tmp_path):
    records = [task(number) | {"test_imports": None} for number in (2, 3, 4, 11)]
    [question] = mbpp.read(runs.write_lines(tmp_path / "mbpp.jsonl", records))
    assert question.reference["tests"] == task(11)["test_list"]
