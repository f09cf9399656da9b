"""Answers in files: in order, appended as they are finished, and gone on with after a kill at any moment."""

import dataclasses
import json
import os
import subprocess
import sys

import commands
import jax
import pytest
import tiny

from msn_jax import cli, outputs
from msn_jax.decode import engine
from msn_jax.decode import tree as trees
from msn_jax.decode.engine import Decoder
from msn_jax.decode.request import Request

pytestmark = pytest.mark.usefixtures("quick_compilation")

PROMPTS = ["cat " * (7 * number % 5 + 1) for number in range(7)]
REQUESTS = {f"p.jsonl:{i + 1}": Request(text, 4 + 3 * i, temperature=i % 2, sample=i) for i, text in enumerate(PROMPTS)}


@pytest.fixture(scope="module")
def decoder():
    return Decoder(tiny.model(), "tr_jacobi")


@pytest.fixture(scope="module")
def uninterrupted(decoder, tmp_path_factory):
    path = tmp_path_factory.mktemp("answers") / "whole.jsonl"
    outputs.write_generations(decoder, REQUESTS, 3, str(path))
    return timeless(path)


def timeless(path) -> list[dict]:
    """The lines of a file, without how long they took."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(line.pop("wall_time") > 0 for line in lines)
    return lines


def partial_of(path):
    return path.with_name(path.name + ".partial")


def interrupted(decoder, path, count: int, monkeypatch) -> None:
    """A run that dies after so many answers."""
    whole = engine.generate_iter

    def dying(*args, **kwargs):
        for number, generation in enumerate(whole(*args, **kwargs)):
            if number == count:
                raise KeyboardInterrupt
            yield generation

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "generate_iter", dying)
        outputs.write_generations(decoder, REQUESTS, 3, str(path))


def test_answers_are_in_the_order_of_their_prompts(decoder, uninterrupted):
    """Though texts of similar length share a batch."""
    assert [line["index"] for line in uninterrupted] == list(range(7))
    assert [line["prompt"] for line in uninterrupted] == PROMPTS
    finished = [g.index for g in engine.generate_iter(decoder, list(REQUESTS.values()), Request(""), 3, list(REQUESTS))]
    assert finished != sorted(finished)
    assert [g.index for g in outputs.in_order(iter_of(finished))] == list(range(7))


def iter_of(indices):
    blank = dict.fromkeys(("prompt", "text", "tokens", "new_tokens", "forward_passes", "accept_lengths"))
    blank |= dict.fromkeys(("wall_time", "decoder", "finish_reason"))
    return (engine.Generation(index=index, **blank) for index in indices)


@pytest.mark.parametrize("count", [0, 1, 4, 6])
def test_an_interrupted_run_goes_on(decoder, uninterrupted, tmp_path, monkeypatch, capsys, count):
    path = tmp_path / "out.jsonl"
    path.write_text("precious\n")
    interrupted(decoder, path, count, monkeypatch)
    assert path.read_text() == "precious\n"  # until the last answer is there
    kept = partial_of(path).read_text().splitlines()[1:]
    assert len(kept) == count
    outputs.write_generations(decoder, REQUESTS, 2, str(path))  # batches may be of another size
    assert timeless(path) == uninterrupted
    assert set(kept) <= set(path.read_text().splitlines())  # what was there was not decoded again
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.jsonl"]
    assert (f"resuming after {count} of 7 generations" in capsys.readouterr().out) == (count > 0)


@pytest.mark.parametrize("lost", [1, 30, 10_000])
def test_half_a_line_is_cut_off(decoder, uninterrupted, tmp_path, monkeypatch, lost):
    """A killed run was writing its third answer, or even the first line of all."""
    path = tmp_path / "out.jsonl"
    interrupted(decoder, path, 3, monkeypatch)
    content = partial_of(path).read_bytes()
    last = len(content) - content[:-1].rfind(b"\n") - 1
    partial_of(path).write_bytes(content[:20] if lost > last else content[:-lost])
    outputs.write_generations(decoder, REQUESTS, 3, str(path))
    assert timeless(path) == uninterrupted


def test_half_a_line_does_not_stay_in_the_file(decoder, uninterrupted, tmp_path, monkeypatch):
    """Killed twice: what the second run appends must not continue what the first one began."""
    path = tmp_path / "out.jsonl"
    interrupted(decoder, path, 3, monkeypatch)
    partial_of(path).write_bytes(partial_of(path).read_bytes()[:-9])
    interrupted(decoder, path, 2, monkeypatch)
    assert [json.loads(line)["index"] for line in partial_of(path).read_text().splitlines()[1:]]
    assert len(partial_of(path).read_text().splitlines()) == 1 + 2 + 2
    outputs.write_generations(decoder, REQUESTS, 3, str(path))
    assert timeless(path) == uninterrupted


def test_the_answers_of_another_run_are_kept(decoder, tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    interrupted(decoder, path, 3, monkeypatch)
    before = partial_of(path).read_bytes()
    fewer = dict(list(REQUESTS.items())[:-1])
    model = decoder.model
    retrained = dataclasses.replace(model, params=jax.tree.map(lambda weight: weight + 1e-3, model.params))
    others = [Decoder(retrained, "tr_jacobi"), Decoder(model, "jacobi"), Decoder(model, "tr_jacobi", trees.build([]))]
    for other_decoder, requests in [(decoder, fewer), *((other, REQUESTS) for other in others)]:
        with pytest.raises(cli.InputError, match=r"out\.jsonl\.partial: left by an interrupted run with other prompts"):
            outputs.write_generations(other_decoder, requests, 3, str(path))
    assert partial_of(path).read_bytes() == before and not path.exists()


@pytest.mark.parametrize(
    "line", ["garbage", "", "{}", "[1]", '{"index": "0"}', '{"index": 7}', '{"index": true}', None]
)
def test_a_changed_line_is_named(decoder, tmp_path, monkeypatch, line):
    path = tmp_path / "out.jsonl"
    interrupted(decoder, path, 3, monkeypatch)
    lines = partial_of(path).read_text().splitlines()
    lines[2:3] = [lines[1] if line is None else line]  # None: an answer twice
    partial_of(path).write_text("\n".join(lines) + "\n")
    with pytest.raises(cli.InputError, match=r"out\.jsonl\.partial:3: not a generation of the interrupted run"):
        outputs.write_generations(decoder, REQUESTS, 3, str(path))
    assert partial_of(path).read_text().splitlines() == lines


@pytest.mark.parametrize("suffix", ["", ".partial", ".complete"])
def test_what_cannot_be_written_is_refused_before_the_work(tmp_path, suffix):
    (tmp_path / f"out.jsonl{suffix}").mkdir()
    with pytest.raises(cli.InputError, match="is a directory"):
        outputs.check_output(str(tmp_path / "out.jsonl"))
    prompts = tmp_path / f"in.jsonl{suffix}"
    prompts.write_text("precious")
    with pytest.raises(cli.InputError, match=r"would replace the input .*in\.jsonl"):
        outputs.check_output(str(tmp_path / "in.jsonl"), keep=[str(prompts)])
    outputs.check_output(str(tmp_path / "other.jsonl"), keep=[str(prompts), "missing"])


def test_a_run_that_lacked_only_the_rename(decoder, uninterrupted, tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    outputs.write_generations(decoder, REQUESTS, 3, str(path))
    header = json.dumps({"provenance": outputs.provenance(decoder, REQUESTS.values())}) + "\n"
    partial_of(path).write_text(header + path.read_text())
    path.unlink()
    monkeypatch.setattr(Decoder, "generate_batch", None)  # nothing is left to decode
    outputs.write_generations(decoder, REQUESTS, 3, str(path))
    assert timeless(path) == uninterrupted


# A process that has imported everything runs the program in children, and kills each when its partial file has grown to
# a given number of bytes; the last one is left to finish.
_KILLER = """
import json, os, runpy, signal, sys, time
import grain, orbax.checkpoint
import msn_jax.generate
sys.modules.pop("msn_jax.generate")
sizes, arguments = json.loads(sys.argv[1]), sys.argv[2:]

def has_grown_to(size):
    return os.path.exists("out.jsonl.partial") and os.path.getsize("out.jsonl.partial") >= size

for size in [*sizes, None]:
    child = os.fork()
    if child == 0:
        sys.argv = ["generate", *arguments]
        runpy.run_module("msn_jax.generate", run_name="__main__")
        os._exit(0)
    while size is not None and not has_grown_to(size):
        if os.waitpid(child, os.WNOHANG)[0]:
            sys.exit("it was done before it was killed")
        time.sleep(0.0005)
    if size is not None:
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status, len(open("out.jsonl.partial").readlines()) - 1 if size is not None else "done", flush=True)
"""


def test_killed_at_any_moment_and_started_again(tmp_path):
    """`kill -9` of the program, three times: the file is that of a run which nobody disturbed, all but the times."""
    tiny.write_model(tmp_path / "model")
    lines = [{"prompt": "cat " * (i % 9 + 1), "max_new_tokens": 5 + i % 17, "temperature": i % 2} for i in range(40)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = [f"--model={tmp_path / 'model'}", "--prompts=prompts.jsonl", "--batch_size=2"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(commands.ROOT),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(sizes: list[int], output: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", _KILLER, json.dumps(sizes), *common, f"--output={output}"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return [line for line in done.stdout.splitlines() if line.startswith(("-9", "0"))]

    assert run([], "whole.jsonl") == ["0 done"]
    size = (tmp_path / "whole.jsonl").stat().st_size
    *killed, last = run([10, size // 4, size // 2 + 100], "out.jsonl")
    answered = [int(line.removeprefix("-9 ")) for line in killed]
    assert answered == sorted(answered) and 0 < answered[1] < answered[2] < 40
    assert last == "0 done"
    assert timeless(tmp_path / "out.jsonl") == timeless(tmp_path / "whole.jsonl")
    assert not (tmp_path / "out.jsonl.partial").exists()
