"""The log of samples: whose file it continues, and that one process at a time writes to it."""

import json

import pytest
import refusals

from msn_jax.evals.sample_log import SampleLog

HEADER = {"suite": "x", "seed": 0}
LINE = json.dumps(HEADER).encode() + b"\n"
SAMPLE = {"question_id": 1, "text": "a"}


def log(path) -> SampleLog:
    return SampleLog(path, HEADER, ("question_id",))


@pytest.mark.parametrize("length", [0, 1, len(LINE) - 1, len(LINE)])
def test_an_unfinished_header_is_written_again(length, tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(LINE[:length])
    with log(path) as samples:
        samples.append(SAMPLE)
        assert path.read_bytes() == LINE + json.dumps(SAMPLE).encode() + b"\n"
    with log(path) as samples:
        assert samples[(1,)] == SAMPLE


@pytest.mark.parametrize(
    "content",
    [
        b"notes",
        b"\n",
        b"\nnotes\n",
        b"{}",
        b"3\n",
        pytest.param(b"[" * 100_000 + b"\n", id="nested"),
        LINE[:-2] + b"!",
        b"\xff\n",
        LINE[:9] + b"\n",
    ],
)
def test_a_file_that_is_not_a_log_is_refused_and_kept(content, tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_bytes(content)
    assert "not the log of an evaluation" in refusals.refusal(log, path)
    assert path.read_bytes() == content


def test_a_log_in_use_is_refused(tmp_path):
    path = tmp_path / "samples.jsonl"
    with log(path) as samples:
        samples.append(SAMPLE)
        assert "samples.jsonl: another evaluation is writing to it" in refusals.refusal(log, path)
        samples.append({**SAMPLE, "question_id": 2})
    with log(path) as samples:
        assert (1,) in samples and (2,) in samples
    path.write_bytes(b"notes")
    for _ in range(2):  # a refusal leaves it unlocked
        assert "not the log" in refusals.refusal(log, path)
