"""Training: fine-tune a Llama on noisy inputs and clean labels (MSN), or on clean inputs (SFT, `noise.kind = 'none'`).

    python -m msn_jax.train --config=configs/demo.py:msn --workdir=runs/demo/msn [--config.train.steps=300]

Loss (paper section 3.1): -mean_i log p(x_i | x^_<i) over the response tokens x_i of the global batch, where x^ is the
input with noise (`noise.py`), as segments of the row or as blocks appended to it. Labels are always clean.

Config and data alone determine a run. Killed anywhere and restarted with the same command, it resumes from the newest
checkpoint and ends bit for bit like an uninterrupted run, data order included. On SIGTERM it saves a checkpoint
immediately and exits with code 143.
"""

import contextlib
import dataclasses
import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_flags

from msn_jax import adapter, checkpoint, cli, config, hugging_face, llama, optim, pretrained, sharding, workdirs
from msn_jax.cli import InputError
from msn_jax.config import Config
from msn_jax.data import batches, corpora
from msn_jax.data import tokenizer as tokenizers
from msn_jax.data.dataset import load_rows, record_texts, source_name
from msn_jax.metrics import Meter, Writer
from msn_jax.noise import Batch
from msn_jax.train_steps import TrainState, eval_step, train_step

_EVAL_SEED = 0  # of the evaluation noise, the same for every run, so that SFT and MSN are comparable
_INIT_STEP = 2**32 - 1  # a step that no run reaches; its key initializes the parameters


# --- The run


def train(cfg: Config, workdir: str | Path) -> bool:
    """Trains up to `cfg.train.steps`, resuming from `workdir`; the result is `metrics.final_metrics(workdir)`.

    Returns:
      Whether all steps are done; False after SIGTERM, when the state is saved and the same call resumes.

    Raises:
      InputError: config, data or workdir are invalid or do not fit together.
      FloatingPointError: the loss or the gradient is not finite.
    """
    config.check(cfg)
    mesh = sharding.make_mesh(cfg.mesh)
    sharding.batch_sharding(mesh, cfg.data.batch_size)  # raises for a batch size that does not fit, before any work
    optimizer = optim.optimizer(cfg.optim, cfg.train.steps)
    target = abstract_state(cfg, optimizer, mesh)
    workdir = cli.make_directory(workdir, "--workdir")
    if hugging_face.is_checkpoint(workdir):
        raise InputError(
            f"--workdir={workdir}: holds a Hugging Face model, whose files a run would replace; name another directory"
        )
    with checkpoint.open_manager(workdir, cfg.train.keep_checkpoints) as manager:
        restored = checkpoint.restore(manager, cfg, target.params, target.opt_state)
        if restored is not None and restored.step >= cfg.train.steps:
            print(f"{workdir}: finished, all {cfg.train.steps} steps are done")
            return True
        source = starting_point(cfg) if restored is None or cfg.adapter.rank else None
        given = starting_adapter(cfg) if restored is None else None
        tokenizer = load_tokenizer(cfg, workdir, source, resumed=restored is not None)
        rows, held_out = load_rows(cfg, tokenizer)
        fingerprint = rows.fingerprint()
        held_out = batches.eval_batches(held_out, cfg.data.batch_size, cfg.train.eval_batches)
        iterator = batches.train_iterator(rows, cfg.train.seed, cfg.data.batch_size)
        if restored is None:
            state = initial_state(cfg, optimizer, target, mesh, source, given)
        elif restored.data_state["rows"] != fingerprint:
            raise InputError(
                f"{workdir}: the training data ({source_name(cfg)}) has changed since this run began; "
                "restore it, or choose another --workdir"
            )
        else:
            print(f"{workdir}: resuming after step {restored.step}")
            step = jax.device_put(np.int32(restored.step), target.step.sharding)
            state = TrainState(step, restored.params, restored.opt_state)
            iterator.set_state(restored.data_state["iterator"])

        def save(step: int, state: TrainState) -> None:
            data_state = {"iterator": iterator.get_state(), "rows": fingerprint}
            checkpoint.save(manager, step, state.params, state.opt_state, data_state, cfg)
            if cfg.adapter.rank and jax.process_index() == 0:
                trained = adapter.Adapter(state.params, cfg.adapter, config.noise_token(cfg.noise))
                adapter.save(trained, workdir / workdirs.ADAPTER, cfg.train.init_from)

        frozen = _load_params(cfg, mesh, source) if cfg.adapter.rank else None
        return run_steps(cfg, optimizer, workdir, mesh, state, iterator, held_out, save, frozen)


def run_steps(
    cfg: Config,
    optimizer: optax.GradientTransformation,
    workdir: Path,
    mesh: Mesh,
    state: TrainState,
    iterator: Iterator[Batch],
    held_out: Sequence[Batch],
    save: Callable[[int, TrainState], None],
    frozen: dict | None = None,
) -> bool:
    """The training loop; returns whether it completed all steps.

    Step n is dispatched before the host reads the metrics of step n - 1, so that the device never waits.
    """
    start, steps = int(state.step.copy()), cfg.train.steps  # a copy, because the buffer will be donated
    rows = sharding.batch_sharding(mesh, cfg.data.batch_size)
    step_fn, eval_fn = jit_steps(cfg, optimizer, mesh, state, frozen)
    held_out = [to_devices(batch, rows) for batch in held_out]
    meter = Meter(cfg.model, cfg.data.batch_size * cfg.data.row_length, cfg.data.row_length, start)

    with Writer(workdir, start, steps) as writer, stop_signal() as stop_requested:

        def record(step: int, metrics: dict, evaluation: dict) -> None:
            metrics = jax.device_get(metrics)
            for name in ("loss", "grad_norm"):
                if not np.isfinite(metrics[name]):
                    raise FloatingPointError(f"{name} is {metrics[name]} at step {step}; this step was not saved")
            writer.advance(step)
            if step % cfg.train.log_every == 0 or evaluation:
                writer.write(step, {**metrics, **meter.read(step), **evaluation})

        previous = None  # (step, metrics on the device)
        for step in range(start + 1, steps + 1):
            state, metrics = step_fn(state, to_devices(next(iterator), rows), frozen)
            if previous is not None:
                record(*previous, {})
            previous = (step, metrics)
            stop = stop_requested(step)
            evaluate_now = step == steps or (cfg.train.eval_every > 0 and step % cfg.train.eval_every == 0)
            save_now = stop or step == steps or step % cfg.train.checkpoint_every == 0
            if evaluate_now or save_now or step == start + 1:  # the first step includes compilation
                jax.block_until_ready(metrics)
                rates = {"compile_seconds": meter.seconds()} if step == start + 1 else meter.read(step)
                meter.restart(step)
                evaluation = evaluate(eval_fn, state.params, held_out, frozen) if evaluate_now else {}
                record(step, {**metrics, **rates}, evaluation)
                previous = None
                if save_now:
                    save(step, state)
                meter.restart(step)
            if stop:
                print(f"SIGTERM: saved step {step}; the same command resumes")
                return step == steps
    return True


def jit_steps(
    cfg: Config,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    state: TrainState,
    frozen: dict | None = None,
) -> tuple[Callable, Callable]:
    """The jitted training step (state, batch, frozen) and evaluation (params, batch, key, frozen); the step donates.

    Args:
      cfg: the run's.
      optimizer: from `optim.optimizer`.
      mesh: of the state.
      state: arrays or their abstract shapes (`abstract_state`); only the shardings are used, like those of `frozen`.
      frozen: the model's parameters if the state's own are those of an adapter; else None.
    """

    def on_mesh(function: functools.partial) -> Callable:
        """The function, traced with the mesh known to the parts of it that divide their work themselves."""

        @functools.wraps(function.func)
        def call(*arguments: object) -> object:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return function(*arguments)

        return call

    rows, replicated = sharding.batch_sharding(mesh, cfg.data.batch_size), NamedSharding(mesh, PartitionSpec())
    state_shardings, frozen_shardings = jax.tree.map(lambda leaf: leaf.sharding, (state, frozen))
    step_fn = jax.jit(
        on_mesh(functools.partial(train_step, cfg=cfg, optimizer=optimizer)),
        in_shardings=(state_shardings, rows, frozen_shardings),
        out_shardings=(state_shardings, replicated),
        donate_argnums=0,
    )
    eval_fn = jax.jit(
        on_mesh(functools.partial(eval_step, cfg=cfg)),
        in_shardings=(state_shardings.params, rows, replicated, frozen_shardings),
        out_shardings=replicated,
    )
    return step_fn, eval_fn


def evaluate(eval_fn: Callable[..., dict], params: dict, held_out: Sequence[Batch], frozen: dict | None = None) -> dict:
    """`eval_clean_loss`, and `eval_noise_accuracy` by offset from 1, over the held-out batches."""
    key = jax.random.key(_EVAL_SEED)
    sums = [eval_fn(params, batch, jax.random.fold_in(key, i), frozen) for i, batch in enumerate(held_out)]
    total = {name: np.sum([np.asarray(part[name], np.float64) for part in sums], axis=0) for name in sums[0]}
    with np.errstate(invalid="ignore"):  # NaN, written as null, if no sample is long enough for noise
        accuracy = total["correct"] / total["noise"]
    return {"eval_clean_loss": total["loss"] / total["tokens"], "eval_noise_accuracy": accuracy}


def to_devices(batch: Batch, rows: NamedSharding) -> Batch:
    """A batch of NumPy arrays [B, T] as global arrays.

    Every process has the whole batch and passes its devices their shards. This fits any mesh, also one whose 'tensor'
    axis spans hosts, which then need the same rows; it is cheap, with four small integers per token.
    """
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, rows, lambda index: x[index]), batch)


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[int], bool]]:
    """Yields a function of the step: whether SIGTERM has arrived. It returns the same on all processes."""
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    received = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield lambda step: received.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


# --- The start of a run


def create_state(cfg: Config, optimizer: optax.GradientTransformation) -> TrainState:
    """Random parameters, boxed with their logical axes, and the optimizer state, which keeps the boxes."""
    key = jax.random.fold_in(jax.random.key(cfg.train.seed), _INIT_STEP)
    params = adapter.init(key, cfg.model, cfg.adapter) if cfg.adapter.rank else llama.init(key, cfg.model)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def abstract_state(cfg: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state. InputError if the mesh does not fit the model."""
    boxed = jax.eval_shape(functools.partial(create_state, cfg, optimizer))
    return checkpoint.abstract(boxed, mesh, sharding.TRAIN_RULES)


def starting_point(cfg: Config) -> Path | None:
    """The directory of `cfg.train.init_from`, downloaded if it names a Hub repository; None to start from scratch.

    Raises:
      InputError: no such model, or its shape differs from `cfg.model`. No weights are read.
    """
    if not cfg.train.init_from:
        return None
    source = pretrained.directory(cfg.train.init_from)
    theirs, ours = (dataclasses.asdict(model) for model in (pretrained.read_config(source), cfg.model))
    for name in ours:
        if theirs[name] != ours[name] and name not in ("dtype", "param_dtype", "max_length"):
            raise InputError(
                f"config.train.init_from={cfg.train.init_from}: its model has {name}={theirs[name]!r}, "
                f"config.model.{name} is {ours[name]!r}"
            )
    return source


def starting_adapter(cfg: Config) -> dict | None:
    """The parameters of `cfg.adapter.init_from`; None to start from a new adapter.

    Raises:
      InputError: no such adapter, it does not fit the model, or its config differs from `cfg.adapter`.
    """
    if not cfg.adapter.init_from:
        return None
    name = "config.adapter.init_from"
    read = adapter.load(cfg.adapter.init_from, cfg.model, name)
    theirs, ours = (
        dataclasses.asdict(one) | {"targets": ",".join(sorted(config.adapter_targets(one)))}
        for one in (read.cfg, cfg.adapter)
    )
    for field in ("rank", "alpha", "targets", "first_layer", "gate"):
        if theirs[field] != ours[field]:
            raise InputError(
                f"{name}={cfg.adapter.init_from}: its adapter has {field}={theirs[field]!r}, "
                f"config.adapter.{field} is {ours[field]!r}"
            )
    return read.params


def initial_state(
    cfg: Config,
    optimizer: optax.GradientTransformation,
    target: TrainState,
    mesh: Mesh,
    source: Path | None = None,
    given: dict | None = None,
) -> TrainState:
    """The state before the first step.

    Its parameters are those of `source` (from `starting_point`) or random ones; with an adapter, those of `given` (from
    `starting_adapter`) or a new adapter's.
    """
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
    if given is not None:
        params = jax.device_put(given, state_shardings.params)
    elif source is None or cfg.adapter.rank:
        return jax.jit(lambda: nn.meta.unbox(create_state(cfg, optimizer)), out_shardings=state_shardings)()
    else:
        params = _load_params(cfg, mesh, source)

    def fresh(params: dict) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    return jax.jit(fresh, out_shardings=state_shardings, donate_argnums=0)(params)


def _load_params(cfg: Config, mesh: Mesh, source: Path) -> dict:
    """The parameters of `source`, in the training layout."""
    return pretrained.load(source, mesh, sharding.TRAIN_RULES, stacked=True, dtype=cfg.model.param_dtype).params


def load_tokenizer(cfg: Config, workdir: Path, source: Path | None, resumed: bool) -> tokenizers.Tokenizer:
    """The run's tokenizer, stored in the workdir: the configured one, the one of `source`, or a newly trained one.

    Raises:
      InputError: it is missing or damaged, or its vocabulary does not fit the model.
    """
    if not resumed and jax.process_index() == 0:
        if given := cfg.data.tokenizer or source:
            tokenizer = tokenizers.load(given)
            tokenizers.check_fits(tokenizer, cfg.model.vocab_size, str(given))
        else:
            texts = [text for record in corpora.load(cfg.data, "train") for text in record_texts(record)]
            tokenizer = tokenizers.train(texts, cfg.model.vocab_size, workdir / "tokenizer.model")
        tokenizers.save(tokenizer, workdir)
    multihost_utils.sync_global_devices("tokenizer")
    tokenizer = tokenizers.load(workdir)
    tokenizers.check_fits(tokenizer, cfg.model.vocab_size, str(workdir))
    return tokenizer


# --- The program


def main() -> None:
    """Reads the flags and trains."""
    args = flags.FLAGS
    given = [args.coordinator, args.num_processes, args.process_id]
    if args.distributed:
        try:
            jax.distributed.initialize(*given)
        except ValueError as error:
            raise InputError(
                f"--distributed: {error}: outside of a cluster that JAX knows, give --coordinator, --num_processes and "
                "--process_id"
            ) from error
    elif given != [None] * 3:
        raise InputError("--coordinator, --num_processes and --process_id have no effect without --distributed: add it")
    if not train(cli.read_config(Config, "configs/"), args.workdir):
        sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", None, "A file of configs/, optionally with a colon and the argument of its get_config."
    )
    flags.DEFINE_string("workdir", None, "Directory for checkpoints, metrics and the tokenizer.", required=True)
    flags.DEFINE_bool("distributed", False, "Join the other processes of this pod or cluster (jax.distributed).")
    flags.DEFINE_string("coordinator", None, "With --distributed: HOST:PORT of process 0; default: found by JAX.")
    flags.DEFINE_integer("num_processes", None, "With --distributed: processes; default: found by JAX.", lower_bound=1)
    flags.DEFINE_integer(
        "process_id", None, "With --distributed: this one, from 0; default: found by JAX.", lower_bound=0
    )
    cli.run(main)
