"""The training program: its loss, and everything that can happen to a run."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
from jax.experimental.compilation_cache import compilation_cache

from msn_jax import checkpoint, llama, optim, train
from msn_jax.metrics import final_metrics

TESTS = Path(__file__).parent
TIMINGS = ("tokens_per_second", "compile_seconds")


@pytest.fixture(autouse=True, scope="module")
def settings(directory):
    quick_compilation(directory)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes; the loss has a strict test below
        yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


def quick_compilation(directory):
    """Most of the time of these tests was the compiler's, which made the same program a dozen times."""
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", str(directory / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()


def tiny(directory, **train_fields):
    cfg = tiny_config.get_config()
    cfg.data.path, cfg.data.data_dir = str(directory / "train.jsonl"), str(directory / "data")
    cfg.train = dataclasses.replace(cfg.train, **train_fields)
    return cfg


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("train")
    tiny_config.write_data(directory / "train.jsonl")
    return directory


@pytest.fixture(scope="module")
def finished(directory):
    """The workdir of a run that nothing disturbed, how often its step was traced, and the state it began with."""
    traces, step, states, initial_state = [], train.train_step, [], train.initial_state

    def counted(*args, **kwargs):
        traces.append(1)
        return step(*args, **kwargs)

    def kept(*args):
        states.append(initial_state(*args))
        return states[-1]

    train.train_step, train.initial_state = counted, kept
    try:
        train.train(tiny(directory), directory / "finished")
    finally:
        train.train_step, train.initial_state = step, initial_state
    return directory / "finished", len(traces), states[0]


def log_of(workdir):
    """The metrics of every step, without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def assert_same_run(workdir, expected):
    assert log_of(workdir) == log_of(expected)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load_params(workdir)[0], checkpoint.load_params(expected)[0])


# --- The loss


@pytest.mark.parametrize("chunk", [1, 24, 30, 10_000])
def test_chunked_loss_equals_the_naive_one(chunk):
    cfg = tiny_config.get_config().model
    with jax.numpy_dtype_promotion("strict"):
        key = jax.random.key(0)
        params = {"embed": jax.random.normal(key, (cfg.vocab_size, cfg.d_model))}
        hidden = jax.random.normal(jax.random.key(1), (3, 20, cfg.d_model))
        labels = jax.random.randint(jax.random.key(2), (3, 20), 0, cfg.vocab_size)

        def naive(params, hidden):
            logits = llama.unembed(params, cfg, hidden)
            losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
            return losses, (logits.argmax(-1) == labels).astype(jnp.float32)

        def chunked(params, hidden):
            return train.chunked_cross_entropy(params, cfg, hidden, labels, chunk)

        def with_gradient(function):
            losses, correct = jax.jit(function)(params, hidden)
            gradient = jax.jit(jax.grad(lambda *args: function(*args)[0].mean(), (0, 1)))(params, hidden)
            return losses, correct, gradient

        close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)
        jax.tree.map(close, with_gradient(chunked), with_gradient(naive))


def test_logits_of_the_whole_batch_never_exist():
    """Compiled memory: a batch of 8 x 256 tokens and 4096 words has 8 M logits, a chunk of 64 tokens 0.25 M."""
    cfg = dataclasses.replace(tiny_config.get_config().model, vocab_size=4096)
    params = {"embed": jax.ShapeDtypeStruct((cfg.vocab_size, cfg.d_model), jnp.float32)}
    hidden, labels = (jax.ShapeDtypeStruct((8, 256, *rest), t) for rest, t in (((16,), jnp.float32), ((), jnp.int32)))

    def loss(params, hidden, labels):
        return train.chunked_cross_entropy(params, cfg, hidden, labels, chunk=64)[0].mean()

    memory = jax.jit(jax.grad(loss, (0, 1))).lower(params, hidden, labels).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8 * 256 * 4096 * 4 / 4


def test_labels_are_the_next_response_token_of_the_same_sample():
    cfg = tiny_config.get_config()
    response = np.array([[0, 0, 1, 1, 0, 1, 1, 0]], bool)
    segment_ids = np.array([[1, 1, 1, 1, 2, 2, 2, 0]], np.int32)
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 0]], np.int32)
    tokens = np.arange(8, dtype=np.int32)[None]
    batch = train.Batch(tokens, positions, segment_ids, response)
    params = llama.nn.meta.unbox(llama.init(jax.random.key(0), cfg.model))
    _, _, is_label = train.score(params, cfg, batch, tokens)
    np.testing.assert_array_equal(is_label, [[0, 1, 1, 0, 1, 1, 0, 0]])


# --- A run, undisturbed


def test_the_step_is_compiled_once(finished):
    assert finished[1] == 1


def test_the_state_is_updated_in_place(finished):
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(finished[2]))


def test_every_step_has_noise_of_its_own():
    cfg = tiny_config.get_config()
    optimizer = optim.adamw(cfg.optim, cfg.train.steps)
    state = jax.jit(lambda: llama.nn.meta.unbox(train.create_state(cfg, optimizer)))()
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (8, 32), np.int32)
    positions = np.broadcast_to(np.arange(32, dtype=np.int32), tokens.shape)
    batch = train.Batch(tokens, positions, np.ones_like(tokens), positions > 3)
    step = jax.jit(functools.partial(train.train_step, cfg=cfg, optimizer=optimizer))
    losses = [float(step(state.replace(step=jnp.int32(n)), batch)[1]["noise_loss"][0]) for n in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_it_learns_and_reports(finished):
    log = log_of(finished[0])
    assert [line["step"] for line in log] == list(range(1, 41))
    assert log[-1]["loss"] < log[0]["loss"] / 2
    assert {"clean_loss", "noise_loss", "noise_accuracy", "grad_norm", "learning_rate", "skipped_samples"} <= set(
        log[0]
    )
    last = final_metrics(finished[0])
    assert last["step"] == 40 and 0 < last["eval_clean_loss"] < log[0]["loss"]
    assert len(last["eval_noise_accuracy"]) == 3 and all(0 <= value <= 1 for value in last["eval_noise_accuracy"])
    assert not any(name.startswith("mfu") for line in log for name in line)  # this CPU has no entry in the table


def test_a_finished_run_says_so_without_reading_data(finished, directory, capsys, monkeypatch):
    monkeypatch.setattr(train, "load_rows", None)
    train.train(tiny(directory), finished[0])
    assert capsys.readouterr().out == f"{finished[0]}: finished, all 40 steps are done\n"


def test_init_from_starts_with_those_parameters_and_tokenizer(finished, directory):
    cfg = tiny(directory, steps=1, init_from=str(finished[0]))
    cfg.optim.learning_rate = 0.0
    cfg.noise.kind = "none"
    train.train(cfg, directory / "child")
    parent, child = checkpoint.load_params(finished[0])[0], checkpoint.load_params(directory / "child")[0]
    jax.tree.map(np.testing.assert_array_equal, parent, child)
    models = [(workdir / "tokenizer.model").read_bytes() for workdir in (finished[0], directory / "child")]
    assert models[0] == models[1]
    last = final_metrics(directory / "child")
    assert last["noise_accuracy"] == [None] * 3  # SFT has no noise in training, but is measured with the same
    for name in ("eval_clean_loss", "eval_noise_accuracy"):
        np.testing.assert_allclose(last[name], final_metrics(finished[0])[name], rtol=1e-6)


# --- A run, disturbed

KILLED_WHILE_SAVING = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import test_train
from msn_jax import checkpoint, train
test_train.quick_compilation(test_train.Path(sys.argv[2]))
save = checkpoint.save
def save_and_die(manager, step, *rest):
    save(manager, step, *rest)
    if step == 20:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save = save_and_die
train.train(test_train.tiny(test_train.Path(sys.argv[2])), sys.argv[3])
"""


def test_killed_and_resumed_equals_undisturbed_bit_for_bit(finished, directory):
    workdir = directory / "killed"
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(TESTS), str(directory), str(workdir)]
    done = subprocess.run(command, cwd=TESTS.parent, env=os.environ, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    train.train(tiny(directory), workdir)
    assert_same_run(workdir, finished[0])


def test_sigterm_saves_and_the_same_command_continues(finished, directory, monkeypatch, capsys):
    workdir, give = directory / "terminated", train.to_devices
    calls = []

    def give_and_terminate(batch, rows):
        calls.append(1)
        if len(calls) == 15:
            os.kill(os.getpid(), signal.SIGTERM)
        return give(batch, rows)

    monkeypatch.setattr(train, "to_devices", give_and_terminate)
    train.train(tiny(directory), workdir)
    monkeypatch.undo()
    assert "SIGTERM: saved step" in capsys.readouterr().out
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert 1 < saved < 40 and saved % 10
    train.train(tiny(directory), workdir)
    assert f"resuming after step {saved}" in capsys.readouterr().out
    assert_same_run(workdir, finished[0])


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no metadata"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(finished, directory, damage, capfd):
    workdir = directory / f"damaged {damage}"
    shutil.copytree(finished[0], workdir)
    newest = workdir / "checkpoints" / "40"
    largest = max((path for path in newest.glob("params/**/*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    if damage == "truncated":
        largest.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
    else:
        (newest / "meta" / "metadata").unlink()
    capfd.readouterr()
    _, cfg = checkpoint.load_params(workdir)
    assert cfg == tiny(directory)
    for line in capfd.readouterr().err.splitlines():
        assert line.startswith(f"warning: {newest}: damaged checkpoint, skipped")
    train.train(tiny(directory, steps=42), workdir)
    captured = capfd.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"warning: {newest}: damaged checkpoint, skipped")
    assert "resuming after step 30" in captured.out
    assert (workdir / "damaged" / "40.0").is_dir()
    assert [line["step"] for line in log_of(workdir)] == list(range(1, 43))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(finished, directory, monkeypatch):
    step = train.train_step

    def diverging(state, batch, cfg, optimizer):
        state, metrics = step(state, batch, cfg, optimizer)
        return state, metrics | {"loss": jnp.where(state.step == 13, jnp.nan, metrics["loss"])}

    monkeypatch.setattr(train, "train_step", diverging)
    with pytest.raises(FloatingPointError, match="nan at step 13"):
        train.train(tiny(directory), directory / "diverged")
    assert os.listdir(directory / "diverged" / "checkpoints") == ["10"]


# --- Wrong input


def test_wrong_input_is_one_line_and_exit_code_2(finished, directory, tmp_path):
    config = f"--config={TESTS}/tiny_config.py"
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "malformed.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": \n')
    (tmp_path / "role.jsonl").write_text('{"messages": [{"role": "wizard", "content": "b"}]}\n')
    other = f"--workdir={tmp_path}/other"
    good = f"--config.data.path={directory}/train.jsonl"
    mine = [f"--workdir={finished[0]}", good, f"--config.data.data_dir={directory}/data"]
    tokenizer = f"--config.data.tokenizer={finished[0]}/tokenizer.model"
    cases = [
        ([config, other, "--config.train.stepz=3"], "stepz"),
        ([config, other, "--config.train.steps=many"], "many"),
        ([config, "--workdir=x", "surprise"], "unexpected argument 'surprise'"),
        ([config], "--workdir"),
        ([other], "--config"),
        ([f"--config={tmp_path}/missing.py", other], "missing.py"),
        ([f"--config={TESTS.parent}/configs/demo.py:nonsense", other], "no experiment 'nonsense'"),
        ([config, other, f"--config.data.path={tmp_path}/none.jsonl"], "none.jsonl: no such file"),
        ([config, other, f"--config.data.path={tmp_path}/empty.jsonl"], "empty.jsonl: no records"),
        ([config, other, f"--config.data.path={tmp_path}/malformed.jsonl"], "malformed.jsonl:2: malformed JSON"),
        ([config, other, f"--config.data.path={tmp_path}/role.jsonl"], "role.jsonl:1: unknown role 'wizard'"),
        ([config, other, "--config.data.builder=nothing"], "unknown builder 'nothing'"),
        ([config, other, "--config.mesh.tensor=3"], "tensor=3 does not fit 8 devices"),
        ([config, other, "--config.data.batch_size=9"], "batch_size=9 is not divisible"),
        ([config, other, good, f"--config.train.init_from={tmp_path}"], "not a training workdir"),
        ([config, *mine, "--config.model.d_mlp=64"], "config.model.d_mlp=32, this one has 64"),
        ([config, other, good, tokenizer, "--config.model.vocab_size=9"], "of 320, config.model.vocab_size is 9"),
        ([config, other, good, "--config.data.tokenizer=none.model"], "none.model"),
        ([config, other, good, f"--config.data.tokenizer={config[9:]}"], "not a SentencePiece model"),
    ]
    commands.assert_refused("msn_jax.train", cases, tmp_path)
