"""SPEED-Bench: its file, its groups, and acceptance by position."""

import pyarrow
import pytest
import refusals
import runs
import tiny
from pyarrow import parquet

from msn_jax.evals import speed_bench

pytestmark = pytest.mark.usefixtures("quick_compilation")


def record(number: int, category: str, turns: list[str]) -> dict:
    other = {"sub_category": "x", "source": "y", "src_id": "z", "difficulty": None, "multiturn": len(turns) > 1}
    return {"question_id": f"id{number}", "category": category, "turns": turns, **other}


RECORDS = [record(1, "math", ["three and four", "is seven"]), record(2, "rag", ["a dog"]), record(3, "rag", ["a mat"])]


def test_the_report_has_the_acceptance_by_position(tmp_path):
    path = tmp_path / "test.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    model = tiny.endless(tiny.model())
    rows = runs.run("speed_bench", str(path), model, tmp_path / "out", ("jacobi",), limit=1)
    assert [(row["group"], row["questions"]) for row in rows] == [("math", 1), ("rag", 1), ("all", 2)]
    samples = runs.samples(tmp_path / "out")
    lengths = [length for sample in samples for length in sample["accept_lengths"]]
    shares = rows[-1]["accepted_by_position"]
    assert len(shares) == max(lengths) - 1 and sum(shares) + 1 == pytest.approx(sum(lengths) / len(lengths))
    answers = (tmp_path / "out" / "answers" / "jacobi.jsonl").read_text().splitlines()
    assert len(answers) == 2 and '"question_id": "id1", "category": "math"' in answers[0]


def test_json_lines_are_the_same(tmp_path):
    path = tmp_path / "test.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    lines = speed_bench.read(runs.write_lines(tmp_path / "test.jsonl", RECORDS))
    for ours, theirs in zip(lines, speed_bench.read(str(path)), strict=True):
        assert (ours.id, ours.group, ours.prompt) == (theirs.id, theirs.group, theirs.prompt)
    assert lines[2].location.endswith("test.jsonl:3")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([runs.line(1, "qa", ["a"])], "test.jsonl:1: field 'question_id' must be a text: expected SPEED-Bench's"),
        ([record(1, "qa", ["FULL BENCHMARK DATA SHOULD BE FETCHED FROM X"])], "test.jsonl:1: has no text yet: make"),
        ([RECORDS[0], RECORDS[0]], "test.jsonl:2: has the id 'id1' of"),
        ([], "test.jsonl: is empty: expected SPEED-Bench's test.parquet"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, lines, words):
    data = runs.write_lines(tmp_path / "test.jsonl", lines)
    assert words in refusals.refusal(speed_bench.read, data)
