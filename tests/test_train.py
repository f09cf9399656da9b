"""The training program: metrics, compilation, interruption, damaged checkpoints and invalid input."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import commands
import compilation
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_params
import tiny_config

from msn_jax import checkpoint, llama, optim, train
from msn_jax.cli import InputError
from msn_jax.data import batches
from msn_jax.data import tokenizer as tokenizers
from msn_jax.metrics import final_metrics

TESTS = Path(__file__).parent
TIMINGS = {"tokens_per_second", "compile_seconds"}


@pytest.fixture(autouse=True, scope="module")
def settings(directory):
    with compilation.quick(directory / "cache"), jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("train")
    tiny_config.write_data(directory / "train.jsonl")
    return directory


@pytest.fixture(scope="module")
def finished(directory):
    """The workdir of an uninterrupted run, the functions traced in it, and its initial state."""
    traced, states, initial_state = [], [], train.initial_state

    def counted(function):
        def wrapped(*args, **kwargs):
            traced.append(function.__name__)
            return function(*args, **kwargs)

        return wrapped

    def recorded(*args):
        states.append(initial_state(*args))
        return states[-1]

    with pytest.MonkeyPatch.context() as patch:
        for name in ("train_step", "eval_step"):
            patch.setattr(train, name, counted(getattr(train, name)))
        patch.setattr(train, "initial_state", recorded)
        assert train.train(tiny_config.config_in(directory), directory / "finished")
    return directory / "finished", traced, states[0]


def log_of(workdir):
    """The metrics of every step, without timings."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def assert_same_run(workdir, expected):
    assert log_of(workdir) == log_of(expected)
    jax.tree.map(np.testing.assert_array_equal, checkpoint.load_params(workdir)[0], checkpoint.load_params(expected)[0])


# --- An uninterrupted run


def test_every_program_is_compiled_once(finished):
    assert finished[1] == ["train_step", "eval_step"]


def test_the_state_is_updated_in_place(finished):
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(finished[2]))


def test_every_step_draws_new_noise():
    cfg = tiny_config.get_config()
    optimizer = optim.optimizer(cfg.optim, cfg.train.steps)
    state = jax.jit(lambda: llama.nn.meta.unbox(train.create_state(cfg, optimizer)))()
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (8, 32), np.int32)
    positions = np.broadcast_to(np.arange(32, dtype=np.int32), tokens.shape)
    batch = train.Batch(tokens, positions, np.ones_like(tokens), positions > 3)
    step = jax.jit(functools.partial(train.train_step, cfg=cfg, optimizer=optimizer))
    losses = [float(step(state.replace(step=jnp.int32(n)), batch)[1]["noise_loss"][0]) for n in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_noise_blocks_are_weighted_and_leave_the_clean_loss_unchanged():
    cfg = tiny_config.get_config()
    optimizer = optim.optimizer(cfg.optim, cfg.train.steps)
    params = random_params.stacked(cfg.model)
    state = train.TrainState(jnp.int32(0), params, optimizer.init(params))
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (8, 32), np.int32)
    positions = np.broadcast_to(np.arange(32, dtype=np.int32), tokens.shape)
    batch = train.Batch(tokens, positions, np.ones_like(tokens), positions > 3)

    def metrics(**noise):
        changed = dataclasses.replace(cfg, noise=dataclasses.replace(cfg.noise, **noise))
        step = jax.jit(functools.partial(train.train_step, cfg=changed, optimizer=optimizer))
        return jax.device_get(step(state, batch)[1])

    clean, noisy = metrics(kind="none"), metrics()
    assert noisy["clean_loss"] != pytest.approx(clean["loss"], rel=1e-3)  # tokens after a segment attend to its noise
    labels, blocks = 8 * 28, 8 * 5
    for weight, distilled in ((0.25, False), (1.0, False), (0.25, True)):
        appended = metrics(blocks=5, weight=weight, self_distillation=distilled)
        assert appended["clean_loss"] == pytest.approx(clean["loss"], rel=1e-5)
        noise = weight * blocks * appended["noise_loss"].sum()
        total = labels * clean["loss"] + noise
        assert appended["loss"] == pytest.approx(total / (labels + weight * blocks * cfg.noise.length), rel=1e-5)


def test_the_loss_falls_and_metrics_are_logged(finished):
    log = log_of(finished[0])
    assert [line["step"] for line in log] == list(range(1, 41))
    assert log[-1]["loss"] < log[0]["loss"] / 2
    trained = [[value is not None for value in line["noise_accuracy"]] for line in log]  # in the curriculum's stages
    assert trained == [[offset <= 1 + number // 10 for offset in (1, 2, 3)] for number in range(40)]
    assert {"clean_loss", "noise_loss", "noise_accuracy", "grad_norm", "learning_rate", "num_skipped_samples"} <= set(
        log[0]
    )
    lines = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [sorted(line.keys() & TIMINGS) for line in lines] == [["compile_seconds"]] + [["tokens_per_second"]] * 39
    last = final_metrics(finished[0])
    assert last["step"] == 40 and 0 < last["eval_clean_loss"] < log[0]["loss"]
    assert len(last["eval_noise_accuracy"]) == 3 and all(0 <= value <= 1 for value in last["eval_noise_accuracy"])
    assert not any(name.startswith("mfu") for line in log for name in line)  # this CPU has no entry in the table


def test_samples_too_short_for_noise_are_counted(finished, directory, tmp_path):
    records = [{"prompt": f"{n} is", "response": "!" if n % 3 else " a number that needs more"} for n in range(30)]
    cfg = tiny_config.config_in(directory)
    cfg.data.path = str(tmp_path / "short.jsonl")
    Path(cfg.data.path).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    rows, _ = train.load_rows(cfg, tokenizers.load(finished[0] / "tokenizer.model"))
    batch = batches.TrainBatches(rows, 0, 8)[0]
    ids = range(1, batch.segment_ids.max() + 1)
    responses = np.stack([np.sum((batch.segment_ids == i) & batch.response_mask, axis=1) for i in ids])
    expected = np.sum((responses > 0) & (responses < cfg.noise.length))
    assert 0 < expected < np.sum(responses > 0)
    optimizer = optim.optimizer(cfg.optim, cfg.train.steps)
    state = jax.jit(lambda: llama.nn.meta.unbox(train.create_state(cfg, optimizer)))()
    _, metrics = jax.jit(functools.partial(train.train_step, cfg=cfg, optimizer=optimizer))(state, batch)
    assert metrics["num_skipped_samples"] == expected


def test_a_finished_run_is_reported_without_reading_data(finished, directory, capsys, monkeypatch):
    monkeypatch.setattr(train, "load_rows", None)
    train.train(tiny_config.config_in(directory), finished[0])
    assert capsys.readouterr().out == f"{finished[0]}: finished, all 40 steps are done\n"


def test_init_from_copies_parameters_and_tokenizer(finished, directory):
    cfg = tiny_config.config_in(directory, steps=1, init_from=str(finished[0]))
    cfg.optim.learning_rate = 1e-30
    cfg.noise.kind, cfg.noise.curriculum_steps = "none", 0
    train.train(cfg, directory / "child")
    parent, child = checkpoint.load_params(finished[0])[0], checkpoint.load_params(directory / "child")[0]
    jax.tree.map(np.testing.assert_array_equal, parent, child)
    models = [(workdir / "tokenizer.model").read_bytes() for workdir in (finished[0], directory / "child")]
    assert models[0] == models[1]
    last = final_metrics(directory / "child")
    assert last["noise_accuracy"] == [None] * 3  # SFT trains without noise, but evaluates on the same noise
    for name in ("eval_clean_loss", "eval_noise_accuracy"):
        np.testing.assert_allclose(last[name], final_metrics(finished[0])[name], rtol=1e-6)


def test_a_resumed_run_does_not_need_its_init_from(finished, directory, tmp_path, capsys):
    source = shutil.copytree(finished[0], tmp_path / "source")
    cfg = tiny_config.config_in(directory, steps=1, init_from=str(source))
    train.train(cfg, tmp_path / "child")
    shutil.rmtree(source)
    cfg.train.steps = 2
    assert train.train(cfg, tmp_path / "child")
    assert "resuming after step 1" in capsys.readouterr().out
    with pytest.raises(InputError, match="source: not a training workdir"):
        train.train(cfg, tmp_path / "other")


# --- Interrupted and damaged runs

KILLED_WHILE_SAVING = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import tiny_config
from msn_jax import checkpoint, train
directory = Path(sys.argv[2])
save = checkpoint.save
def save_and_die(manager, step, *rest):
    save(manager, step, *rest)
    if step == 20:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save = save_and_die
train.train(tiny_config.config_in(directory), sys.argv[3])
"""


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(finished, directory):
    workdir = directory / "killed"
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(TESTS), str(directory), str(workdir)]
    done = subprocess.run(command, cwd=TESTS.parent, env=os.environ, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    train.train(tiny_config.config_in(directory), workdir)
    assert_same_run(workdir, finished[0])


def test_sigterm_saves_and_the_same_command_resumes(finished, directory, monkeypatch, capsys):
    workdir, to_devices = directory / "terminated", train.to_devices
    calls = []

    def terminate_at_step_15(batch, rows):
        calls.append(1)
        if len(calls) == 15:
            os.kill(os.getpid(), signal.SIGTERM)
        return to_devices(batch, rows)

    monkeypatch.setattr(train, "to_devices", terminate_at_step_15)
    assert not train.train(tiny_config.config_in(directory), workdir)
    monkeypatch.undo()
    assert "SIGTERM: saved step" in capsys.readouterr().out
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert 1 < saved < 40 and saved % 10
    train.train(tiny_config.config_in(directory), workdir)
    assert f"resuming after step {saved}" in capsys.readouterr().out
    assert_same_run(workdir, finished[0])


def test_the_exit_code_of_a_terminated_run_is_143(monkeypatch):
    processes = dict.fromkeys(("coordinator", "num_processes", "process_id"))
    values = types.SimpleNamespace(distributed=False, workdir="somewhere", **processes)
    monkeypatch.setattr(train, "flags", types.SimpleNamespace(FLAGS=values))
    monkeypatch.setattr(train.cli, "read_config", lambda kind, directory: tiny_config.get_config())
    monkeypatch.setattr(train, "train", lambda cfg, workdir: False)
    with pytest.raises(SystemExit) as caught:
        train.main()
    assert caught.value.code == 143


def damage_params(step, damage):
    """Damages every data file: a single one may hold only arrays that another replaces, depending on timing."""
    for path in (path for path in step.glob("params/**/d/*") if path.is_file()):
        content = bytearray(path.read_bytes())
        if damage == "truncated":
            del content[len(content) // 10 :]
        else:
            content[::64] = bytes(byte ^ 1 for byte in content[::64])
        path.write_bytes(content)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no metadata"])
def test_a_damaged_newest_checkpoint_is_named_and_the_previous_one_is_used(finished, directory, damage, capfd):
    workdir = directory / f"damaged {damage}"
    shutil.copytree(finished[0], workdir)
    newest = workdir / "checkpoints" / "40"
    if damage == "no metadata":
        (newest / "meta" / "metadata").unlink()
    else:
        damage_params(newest, damage)
    capfd.readouterr()
    _, _, cfg = checkpoint.load_params(workdir)
    assert cfg == tiny_config.config_in(directory)
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == 1 and warnings[0].startswith(f"warning: {newest}: damaged checkpoint, skipped")
    train.train(tiny_config.config_in(directory, steps=42), workdir)
    captured = capfd.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith(f"warning: {newest}: damaged checkpoint, skipped")
    assert "resuming after step 30" in captured.out
    assert (workdir / "damaged" / "40.0").is_dir()
    assert [line["step"] for line in log_of(workdir)] == list(range(1, 43))


def test_a_run_whose_last_checkpoint_is_damaged_is_not_finished(finished, directory, capsys):
    workdir = directory / "damaged end"
    shutil.copytree(finished[0], workdir)
    damage_params(workdir / "checkpoints" / "40", "truncated")
    assert train.train(tiny_config.config_in(directory), workdir)
    assert "resuming after step 30" in capsys.readouterr().out
    assert_same_run(workdir, finished[0])


def test_changed_data_is_refused_on_resuming(finished, directory, tmp_path):
    workdir, cfg = tmp_path / "workdir", tiny_config.config_in(directory, steps=42)
    shutil.copytree(finished[0], workdir)
    records = Path(cfg.data.path).read_text(encoding="utf-8")
    try:
        Path(cfg.data.path).write_text(records.replace("four", "for"), encoding="utf-8")
        with pytest.raises(InputError, match=r"train\.jsonl\) has changed since this run began; restore it"):
            train.train(cfg, workdir)
    finally:
        Path(cfg.data.path).write_text(records, encoding="utf-8")


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_and_names_the_step(finished, directory, monkeypatch, name):
    step = train.train_step

    def diverging(state, batch, frozen, **options):
        state, metrics = step(state, batch, frozen, **options)
        return state, metrics | {name: jnp.where(state.step == 20, jnp.nan, metrics[name])}

    monkeypatch.setattr(train, "train_step", diverging)
    with pytest.raises(FloatingPointError, match=f"{name} is nan at step 20"):
        train.train(tiny_config.config_in(directory), directory / f"diverged {name}")
    assert os.listdir(directory / f"diverged {name}" / "checkpoints") == ["10"]  # and not 20


# --- Invalid input


def test_a_record_that_cannot_be_encoded_is_an_error_naming_its_file(finished, directory, tmp_path):
    cfg = tiny_config.config_in(directory)
    cfg.data.path = str(tmp_path / "chat.jsonl")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    Path(cfg.data.path).write_text((json.dumps({"messages": turns}) + "\n") * 9, encoding="utf-8")
    without_roles = dataclasses.replace(tokenizers.load(finished[0] / "tokenizer.model"), role_ids=None)
    with pytest.raises(InputError, match=r"chat\.jsonl:[0-9]: this tokenizer has no role symbols"):
        train.load_rows(cfg, without_roles)


def test_an_invalid_config_file_is_one_line_and_exit_code_2(tmp_path):
    config, other = f"--config={TESTS}/tiny_config.py", f"--workdir={tmp_path}/other"
    sources = {
        "syntax": "def get_config():\n    return (\n",
        "import": "\nimport no_such_package\n",
        "name": "def get_config():\n    return Confg()\n",
        "none": "x = 1\n",
        "returns": "def get_config():\n    return {'model': 1}\n",
        "nothing": "def get_config():\n    pass\n",
    }
    for name, text in sources.items():
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    broken = {name: f"--config={tmp_path}/{name}.py" for name in sources}
    cases = [
        ([f"--config={tmp_path}/missing.py", other], "missing.py"),
        ([f"--config={TESTS.parent}/configs/demo.py:nonsense", other], "no experiment 'nonsense'"),
        ([broken["syntax"], other], f"{broken['syntax']}: line 2: SyntaxError: '(' was never closed"),
        ([broken["import"], other], f"{broken['import']}: line 2: ModuleNotFoundError: No module named"),
        ([broken["name"], other], f"{broken['name']}: line 2: NameError: name 'Confg' is not defined"),
        ([broken["none"], other], f"{broken['none']}: module 'config_config' has no attribute 'get_config'"),
        (
            [broken["returns"], other],
            f"{broken['returns']}: get_config() must return a msn_jax.config.Config, not a dict",
        ),
        (
            [broken["nothing"], other],
            f"{broken['nothing']}: get_config() must return a msn_jax.config.Config, not a NoneType",
        ),
        ([broken["nothing"], other, "--config.train.steps=3"], f"{broken['nothing']}: "),
        ([config, other, "--process_id=1"], "--process_id have no effect without --distributed: add it"),
        ([f"{config}:surprise", other], f"{config}:surprise: TypeError: get_config() takes 0 positional arguments"),
    ]
    commands.assert_refused("msn_jax.train", cases, tmp_path)


def test_invalid_input_is_one_line_and_exit_code_2(finished, directory, tmp_path):
    config = f"--config={TESTS}/tiny_config.py"
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    (tmp_path / "malformed.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": \n')
    (tmp_path / "role.jsonl").write_text('{"messages": [{"role": "wizard", "content": "b"}]}\n')
    other = f"--workdir={tmp_path}/other"
    data_path = f"--config.data.path={directory}/train.jsonl"
    finished_run = [f"--workdir={finished[0]}", data_path, f"--config.data.data_dir={directory}/data"]
    tokenizer = f"--config.data.tokenizer={finished[0]}/tokenizer.model"
    cases = [
        ([config, other, "--config.train.stepz=3"], "stepz"),
        ([config, other, "--config.train.steps=many"], "many"),
        ([config, "--workdir=x", "surprise"], "unexpected argument 'surprise'"),
        ([config], "--workdir"),
        ([other], "--config"),
        ([config, "--workdir="], "--workdir: is empty"),
        ([config, f"--workdir={'n' * 300}"], "n: cannot make this directory (File name too long)"),
        ([config, f"--workdir={tmp_path}/empty.jsonl"], "empty.jsonl: is a file, not a directory"),
        ([config, f"--workdir={tmp_path}/empty.jsonl/x"], "empty.jsonl is a file, not a directory"),
        ([config, other, data_path, f"--config.data.data_dir={tmp_path}/empty.jsonl"], "--config.data.data_dir="),
        ([config, other, data_path, "--config.model.vocab_size=9"], "config.model.vocab_size=9: too small"),
        (
            [config, other, "--config.noise.kind=loud"],
            "config.noise.kind='loud': must be 'none' or some of ahead,uniform,token,drafts, separated by commas",
        ),
        ([config, other, f"--config.data.path={tmp_path}/none.jsonl"], "none.jsonl: no such file"),
        ([config, other, f"--config.data.path={tmp_path}/empty.jsonl"], "empty.jsonl: no records"),
        ([config, other, f"--config.data.path={tmp_path}/malformed.jsonl"], "malformed.jsonl:2: malformed JSON"),
        ([config, other, f"--config.data.path={tmp_path}/role.jsonl"], "role.jsonl:1: turn 1: unknown role 'wizard'"),
        ([config, other, "--config.data.builder=nothing"], "unknown builder 'nothing'"),
        ([config, other, "--config.mesh.tensor=3"], "tensor=3 does not fit 8 devices"),
        ([config, other, "--config.data.batch_size=9"], "batch_size=9 is not divisible"),
        ([config, other, data_path, f"--config.train.init_from={tmp_path}"], "not a training workdir"),
        ([config, *finished_run, "--config.model.d_mlp=64"], "config.model.d_mlp=32, this one has 64"),
        ([config, other, data_path, tokenizer, "--config.model.vocab_size=9"], "of 320, the model one of 9"),
        ([config, other, data_path, "--config.data.tokenizer=none.model"], "none.model"),
        ([config, other, data_path, f"--config.data.tokenizer={config[9:]}"], "not a SentencePiece model"),
    ]
    commands.assert_refused("msn_jax.train", cases, tmp_path)
