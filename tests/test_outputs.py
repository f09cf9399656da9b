"""Output files: in prompt order, appended as generations finish, and resumed after a kill at any moment."""

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
    path = tmp_path_factory.mktemp("outputs") / "whole.jsonl"
    outputs.write_generations(decoder, REQUESTS, 3, str(path))
    return lines_without_times(path)


def lines_without_times(path) -> list[dict]:
    """The lines of a file without their wall times."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(line.pop("wall_time") > 0 for line in lines)
    return lines


def partial_of(path):
    return path.with_name(path.name + ".partial")


def interrupt_after(count: int, decoder, path, monkeypatch) -> None:
    """A run that is interrupted after `count` generations."""
    generate_iter = engine.generate_iter

    def interrupted(*args, **kwargs):
        for number, generation in enumerate(generate_iter(*args, **kwargs)):
            if number == count:
                raise KeyboardInterrupt
            yield generation

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "generate_iter", interrupted)
        outputs.write_generations(decoder, REQUESTS, 3, str(path))


def test_lines_are_in_the_order_of_their_prompts(decoder, uninterrupted):
    """Although prompts of similar length share a batch and finish together."""
    assert [line["index"] for line in uninterrupted] == list(range(7))
    assert [line["prompt"] for line in uninterrupted] == PROMPTS
    finished = [g.index for g in engine.generate_iter(decoder, list(REQUESTS.values()), Request(""), 3, list(REQUESTS))]
    assert finished != sorted(finished)
    assert [g.index for g in outputs.in_order(blank_generations(finished))] == list(range(7))


def blank_generations(indices):
    blank = dict.fromkeys(("prompt", "text", "tokens", "new_tokens", "forward_passes", "accept_lengths"))
    blank |= dict.fromkeys(("wall_time", "decoder", "passes_by_width", "finish_reason"))
    return (engine.Generation(index=index, **blank) for index in indices)


@pytest.mark.parametrize("count", [0, 1, 4, 6])
def test_an_interrupted_run_resumes(decoder, uninterrupted, tmp_path, monkeypatch, capsys, count):
    path = tmp_path / "out.jsonl"
    path.write_text("precious\n")
    interrupt_after(count, decoder, path, monkeypatch)
    assert path.read_text() == "precious\n"  # until the last generation is written
    kept = partial_of(path).read_text().splitlines()[1:]
    assert len(kept) == count
    outputs.write_generations(decoder, REQUESTS, 2, str(path))  # the batch size may differ
    assert lines_without_times(path) == uninterrupted
    assert set(kept) <= set(path.read_text().splitlines())  # kept lines are not decoded again
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.jsonl"]
    assert (f"resuming after {count} of 7 generations" in capsys.readouterr().out) == (count > 0)


@pytest.mark.parametrize("lost", [1, 30, 10_000])
def test_a_truncated_last_line_is_decoded_again(decoder, uninterrupted, tmp_path, monkeypatch, lost):
    """The run was killed while writing its third generation, or the header line."""
    path = tmp_path / "out.jsonl"
    interrupt_after(3, decoder, path, monkeypatch)
    content = partial_of(path).read_bytes()
    last = len(content) - content[:-1].rfind(b"\n") - 1
    partial_of(path).write_bytes(content[:20] if lost > last else content[:-lost])
    outputs.write_generations(decoder, REQUESTS, 3, str(path))
    assert lines_without_times(path) == uninterrupted


def test_a_truncated_last_line_is_removed_before_appending(decoder, uninterrupted, tmp_path, monkeypatch):
    """Killed twice: the first line that the second run appends must not continue the truncated one."""
    path = tmp_path / "out.jsonl"
    interrupt_after(3, decoder, path, monkeypatch)
    partial_of(path).write_bytes(partial_of(path).read_bytes()[:-9])
    interrupt_after(2, decoder, path, monkeypatch)
    assert [json.loads(line)["index"] for line in partial_of(path).read_text().splitlines()[1:]]
    assert len(partial_of(path).read_text().splitlines()) == 1 + 2 + 2
    outputs.write_generations(decoder, REQUESTS, 3, str(path))
    assert lines_without_times(path) == uninterrupted


def test_the_partial_file_of_another_run_is_refused_and_kept(decoder, tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    interrupt_after(3, decoder, path, monkeypatch)
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
def test_an_invalid_line_of_the_partial_file_is_named(decoder, tmp_path, monkeypatch, line):
    path = tmp_path / "out.jsonl"
    interrupt_after(3, decoder, path, monkeypatch)
    lines = partial_of(path).read_text().splitlines()
    lines[2:3] = [lines[1] if line is None else line]  # None: a duplicate generation
    partial_of(path).write_text("\n".join(lines) + "\n")
    with pytest.raises(cli.InputError, match=r"out\.jsonl\.partial:3: not a generation of the interrupted run"):
        outputs.write_generations(decoder, REQUESTS, 3, str(path))
    assert partial_of(path).read_text().splitlines() == lines


@pytest.mark.parametrize("suffix", ["", ".partial", ".complete"])
def test_unwritable_outputs_are_refused_before_decoding(tmp_path, suffix):
    (tmp_path / f"out.jsonl{suffix}").mkdir()
    with pytest.raises(cli.InputError, match="is a directory"):
        outputs.check_output(str(tmp_path / "out.jsonl"))
    prompts = tmp_path / f"in.jsonl{suffix}"
    prompts.write_text("precious")
    with pytest.raises(cli.InputError, match=r"would replace the input .*in\.jsonl"):
        outputs.check_output(str(tmp_path / "in.jsonl"), keep=[str(prompts)])
    outputs.check_output(str(tmp_path / "other.jsonl"), keep=[str(prompts), "missing"])


def test_a_run_killed_before_the_final_rename_resumes_without_decoding(decoder, uninterrupted, tmp_path, monkeypatch):
    path = tmp_path / "out.jsonl"
    outputs.write_generations(decoder, REQUESTS, 3, str(path))
    header = json.dumps({"provenance": outputs.provenance(decoder, REQUESTS.values())}) + "\n"
    partial_of(path).write_text(header + path.read_text())
    path.unlink()
    monkeypatch.setattr(Decoder, "generate_batch", None)  # no generation is missing
    outputs.write_generations(decoder, REQUESTS, 3, str(path))
    assert lines_without_times(path) == uninterrupted


def test_replaced_text_is_the_old_or_the_new_one(tmp_path):
    path = tmp_path / "report.json"
    outputs.replace_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        outputs.replace_text(path, "new \ud800")
    assert path.read_text() == "old"
    outputs.replace_text(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


# Forks children that run the program, so that imports happen once. The first child finishes; each of the next three is
# killed when its partial file has reached a given share of the first one's output; the last one finishes.
_KILLER = """
import os, runpy, signal, sys, time
import grain, orbax.checkpoint
import msn_jax.generate
sys.modules.pop("msn_jax.generate")

def start(output):
    child = os.fork()
    if child == 0:
        sys.argv = ["generate", *sys.argv[1:], f"--output={output}"]
        runpy.run_module("msn_jax.generate", run_name="__main__")
        os._exit(0)
    return child

def exit_code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def size_of(path):
    return os.path.getsize(path) if os.path.exists(path) else 0

print(exit_code(start("whole.jsonl")), "done", flush=True)
whole = size_of("whole.jsonl")
for size in (10, whole // 4, whole // 2 + 100):
    child = start("out.jsonl")
    while size_of("out.jsonl.partial") < size:
        if os.waitpid(child, os.WNOHANG)[0]:
            sys.exit("finished before it was killed")
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    print(exit_code(child), len(open("out.jsonl.partial").readlines()) - 1, flush=True)
print(exit_code(start("out.jsonl")), "done", flush=True)
"""


def test_killed_at_any_moment_and_resumed_equals_uninterrupted(tmp_path):
    """Three times `kill -9` of the program: the output equals that of an uninterrupted run, except for wall times."""
    tiny.write_model(tmp_path / "model", n_layers=1)
    lines = [{"prompt": "cat " * (i % 9 + 1), "max_new_tokens": 5 + i % 17, "temperature": i % 2} for i in range(40)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    # Not `auto`: its forward passes, unlike its tokens, depend on measured times.
    flags = [f"--model={tmp_path / 'model'}", "--prompts=prompts.jsonl", "--batch_size=2", "--decoder=tr_jacobi"]
    done = subprocess.run(
        [sys.executable, "-c", _KILLER, *flags],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(commands.ROOT),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    whole, *killed, last = [line for line in done.stdout.splitlines() if line.startswith(("-9", "0"))]
    assert whole == last == "0 done"
    num_written = [int(line.removeprefix("-9 ")) for line in killed]
    assert num_written == sorted(num_written) and 0 < num_written[1] < num_written[2] < 40
    assert lines_without_times(tmp_path / "out.jsonl") == lines_without_times(tmp_path / "whole.jsonl")
    assert not (tmp_path / "out.jsonl.partial").exists()
