"""`python -m msn_jax.evaluate`: the program, its files and the flags that it refuses."""

import html
import json

import commands
import pytest
import runs
import tiny

from msn_jax.evals import statistics
from msn_jax.report import write as write_report

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("evaluate")
    tiny.write_model(directory / "model", max_length=512, n_layers=1)
    records = [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(6)]
    for split in ("train", "test"):
        runs.write_lines(directory / "data" / f"{split}.jsonl", records)
    (directory / "file").write_text("x")
    return directory


def test_the_program_writes_samples_and_a_report(directory):
    flags = ["--model=model", "--suite=gsm8k", "--data=data", "--max_new_tokens=4", "--limit=2", "--output=out"]
    [(code, out, error)] = commands.run("msn_jax.evaluate", [flags], directory)
    assert (code, error) == (0, "")
    assert "gsm8k: 2 of 6 questions" in out and "strict match" in out
    report = json.loads((directory / "out" / "report.json").read_text())
    assert (report["suite"], report["questions"], report["of"], report["model"]) == ("gsm8k", 2, 6, "model")
    assert report["rows"][0]["decoder"] == "auto" and report["hardware"]
    samples = runs.samples(directory / "out")
    assert [sample["question_id"] for sample in samples] == [0, 1]

    write_report([str(directory / "out")], str(directory / "page.html"))
    page = (directory / "page.html").read_text()
    assert "GSM8K, model" in page and "2 of 6 questions" in page and report["hardware"] in page
    assert html.escape("".join(samples[0]["passes"])) in page.replace("<i>", "").replace("</i>", "")


def test_bad_flags_are_refused(directory):
    flags = ["--model=model", "--suite=gsm8k", "--data=data", "--output=refused"]
    cases = [
        ([*flags, "--decoders=auto,fast"], "--decoders: auto, fast: name different ones of auto, autoregressive"),
        ([*flags, "--decoders=auto,auto"], "--decoders: auto, auto: name different ones"),
        ([*flags, "--decoders="], "--decoders: is empty: name some of auto, autoregressive"),
        ([*flags, "--seed=1"], "--seed: has no effect on --suite=gsm8k"),
        ([*flags, "--limit=0"], "limit"),
        ([*flags, "--shard=3/2"], "--shard=3/2: must be I/N, with I from 1 to N"),
        ([*flags, "--shard=7/7"], "--shard=7/7: there are only 6 questions"),
        ([*flags, "--suite=spec_bench", "--shard=1/2"], "--shard: a suite that measures time needs one process"),
        ([*flags, "--data=file"], "cannot be read (Not a directory): expected GSM8K's train.jsonl"),
        ([*flags, "--output=file"], "file, not a directory"),
        ([*flags, "--model=file"], "not a training workdir"),
        ([*flags, "--suite=gsm"], "gsm"),
    ]
    commands.assert_refused("msn_jax.evaluate", cases, directory)


def test_statistics():
    assert statistics.mean([1, 0, 0, 1]) == (0.5, pytest.approx((1 / 3) ** 0.5 / 2))
    assert statistics.mean([0.25]) == (0.25, None)
    assert statistics.ratio_of_means([4, 8], [2, 4]) == (2.0, 0.0)
    ratio, error = statistics.ratio_of_means([1, 2, 4], [1, 1, 1])
    assert (ratio, error) == (pytest.approx(7 / 3), pytest.approx(statistics.mean([1, 2, 4])[1]))
