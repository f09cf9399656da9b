"""Bad data for every suite: another suite's, empty, binary, without a field, a directory instead of a file."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import refusals
import runs

from msn_jax import evaluate

MMLU = "question,choice0,choice1,choice2,choice3,answer\n" + "q,a,b,c,d,1\n" * 5
PROBLEM = {"task_id": "HumanEval/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f): f()\n"}
BROKEN = (b"", b"\n \n", bytes(range(256)), b"\x1f\x8b\x08garbage", b"{", b"[]", b"[1]", b"3")
DIRECTORIES = ("gsm8k", "mmlu")


def task(number: int) -> dict:
    return {"task_id": number, "text": "add", "code": "def f(): pass", "test_list": ["assert f() is None"] * 3}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    """Valid data of every suite."""
    root = tmp_path_factory.mktemp("good")
    for split in ("train", "test"):
        runs.write_lines(root / "gsm8k" / f"{split}.jsonl", [{"question": "q", "answer": "#### 1"}] * 5)
    for split in ("dev", "test"):
        (root / "mmlu" / split).mkdir(parents=True)
        (root / "mmlu" / split / f"a_{split}.csv").write_text(MMLU)
    lines = {
        "human_eval": [PROBLEM],
        "mbpp": [task(number) for number in (2, 3, 4, 11)],
        "mt_bench": [runs.line(1, "math", ["a", "b"])],
        "spec_bench": [runs.line(1, "math", ["a", "b"]), runs.line(2, "qa", ["a"])],
        "speed_bench": [runs.line("x", "math", ["a", "b"])],
    }
    for suite, records in lines.items():
        runs.write_lines(root / f"{suite}.jsonl", records)
    return {suite: root / (suite if suite in DIRECTORIES else f"{suite}.jsonl") for suite in evaluate.SUITES}


def refusal(suite: str, path: Path) -> str:
    """The message for bad data, which names a path, and says what was expected or what is wrong."""
    message = refusals.refusal(evaluate.load_suite(suite).read, str(path))
    assert str(path) in message
    return message


@pytest.mark.parametrize("suite", evaluate.SUITES)
def test_valid_data_is_read(suite, good):
    assert evaluate.load_suite(suite).read(str(good[suite]))


@pytest.mark.parametrize(("suite", "other"), itertools.permutations(evaluate.SUITES, 2))
def test_data_of_another_suite_is_refused(suite, other, good):
    assert "expected" in refusal(suite, good[other])


@pytest.mark.parametrize("suite", evaluate.SUITES)
@pytest.mark.parametrize("content", BROKEN)
def test_broken_content_is_refused(suite, content, good, tmp_path):
    path = tmp_path / good[suite].name
    if suite in DIRECTORIES:
        shutil.copytree(good[suite], path)
        bad = next(path.rglob("*test.*"))
    else:
        bad = path
    bad.write_bytes(content)
    assert str(bad) in refusal(suite, path)


@pytest.mark.parametrize("suite", evaluate.SUITES)
def test_a_directory_for_a_file_and_a_file_for_a_directory_are_refused(suite, good, tmp_path):
    if suite in DIRECTORIES:
        refusal(suite, good["mbpp"])
        for file in [path for path in good[suite].rglob("*") if path.is_file()]:
            copy = tmp_path / file.stem
            shutil.copytree(good[suite], copy)
            bad = copy / file.relative_to(good[suite])
            bad.unlink()
            bad.mkdir()
            refusal(suite, copy)
    else:
        assert "cannot be read (Is a directory)" in refusal(suite, tmp_path)
        assert "cannot be read (No such file or directory)" in refusal(suite, tmp_path / "nothing.jsonl")


@pytest.mark.parametrize("suite", [suite for suite in evaluate.SUITES if suite not in DIRECTORIES])
def test_a_missing_field_is_refused(suite, good, tmp_path):
    records = [json.loads(line) for line in good[suite].read_text().splitlines()]
    path = tmp_path / "data.jsonl"
    for field in records[-1]:
        for bad in ({**records[-1], field: None}, {k: v for k, v in records[-1].items() if k != field}):
            runs.write_lines(path, [*records[:-1], bad])
            assert f"{path}:{len(records)}: " in refusal(suite, path)
            assert repr(field) in refusal(suite, path)
