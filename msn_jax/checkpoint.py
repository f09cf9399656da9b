"""Checkpoints of a training run (Orbax). WORKDIR/checkpoints/STEP contains

    params      the model's parameters, stacked layout
    opt_state   the optimizer's state
    meta        JSON: step, iterator state, fingerprint of the data, config, fingerprints of the two trees

A model converted into a workdir (`save_model`) has step 0, and only parameters and the model's config.

Saving is asynchronous. The iterator's state is plain JSON instead of Grain's own file, which records the process count
and cannot be restored on a different one. The fingerprints detect flipped bits: the storage layer notices a truncated
file, but not these.
"""

import contextlib
import dataclasses
import gc
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import flax.linen as nn
import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from msn_jax import config, llama, param_checks, sharding, workdirs
from msn_jax.cli import InputError, check_directory
from msn_jax.config import Config, LlamaConfig

Result = TypeVar("Result")


@dataclasses.dataclass
class Restored:
    """A restored checkpoint."""

    step: int  # completed steps
    params: dict
    opt_state: object
    data_state: dict  # 'iterator': its state; 'rows': the fingerprint of the data


def open_manager(workdir: str | Path, keep: int) -> ocp.CheckpointManager:
    """The manager for a run that writes. Creates the directory; keeps the newest `keep` checkpoints.

    Raises:
      InputError: the directory of the checkpoints cannot be made or written to.
    """
    check_directory(workdirs.checkpoints(workdir), str(workdirs.checkpoints(workdir)))
    _silence_orbax()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager(workdirs.checkpoints(workdir), options=options)


def save(
    manager: ocp.CheckpointManager, step: int, params: dict, opt_state: object, data_state: dict, cfg: Config
) -> None:
    """Starts an asynchronous save; returns once the arrays are copied off the device. Never overwrites a step."""
    meta = {
        "step": step,
        "data": data_state,
        "config": config.to_dict(cfg),
        "fingerprints": {"params": param_checks.fingerprint(params), "opt_state": param_checks.fingerprint(opt_state)},
    }
    items = ocp.args.Composite(
        params=ocp.args.StandardSave(params),
        opt_state=ocp.args.StandardSave(opt_state),
        meta=ocp.args.JsonSave(meta),
    )
    manager.save(step, args=items)


def save_model(workdir: str | Path, params: dict, cfg: LlamaConfig) -> None:
    """Writes parameters (stacked layout) that do not come from a training run, for runs to start from."""
    meta = {"step": 0, "model": dataclasses.asdict(cfg), "fingerprints": {"params": param_checks.fingerprint(params)}}
    items = ocp.args.Composite(params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(meta))
    with open_manager(workdir, 1) as manager:
        manager.save(0, args=items)


def restore(manager: ocp.CheckpointManager, cfg: Config, params: dict, opt_state: object) -> Restored | None:
    """Restores the newest undamaged checkpoint; None if the workdir has no checkpoint.

    Newer, damaged ones are named on stderr and moved to WORKDIR/damaged, so that their steps can be saved again.

    Args:
      manager: from `open_manager`.
      cfg: config of the run that resumes.
      params: `jax.ShapeDtypeStruct`s with the shardings to restore onto.
      opt_state: the same for the optimizer's state.

    Raises:
      InputError: the workdir belongs to another config or version, every checkpoint is damaged, or a parameter is not
        finite.
    """
    workdir = manager.directory.parent

    def read(step: int) -> Restored:
        meta = _read_meta(manager, step)
        if "config" not in meta:
            raise InputError(
                f"{workdir}: is a converted model, not a run: pass it as --config.train.init_from, and choose another "
                "--workdir"
            )
        _stored_model(meta, workdir)
        config.check_resume(meta["config"], cfg, workdir)
        if meta["data"].keys() != {"iterator", "rows"}:
            raise _other_version(workdir, "its data state differs")
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(params), opt_state=ocp.args.StandardRestore(opt_state)
        )
        trees = manager.restore(step, args=items)
        for name in ("params", "opt_state"):
            _check_fingerprint(name, trees[name], meta)
        param_checks.check_finite(trees["params"], manager.directory / str(step))
        return Restored(step, trees["params"], trees["opt_state"], meta["data"])

    if not manager.all_steps():
        return None
    restored, damaged = _newest_intact(manager, read)
    for step in damaged if jax.process_index() == 0 else ():
        _set_aside(manager, step)
    if damaged:
        manager.reload()
    return restored


def load_params(
    workdir: str | Path, mesh: Mesh | None = None, rules: sharding.Rules = sharding.DECODE_RULES
) -> tuple[dict, LlamaConfig, Config | None]:
    """Loads the newest undamaged checkpoint of a workdir.

    Args:
      workdir: a run's workdir, or a converted model's.
      mesh: devices that the parameters are sharded over; None is the default device.
      rules: sharding rules, see `sharding.py`.

    Returns:
      Parameters in the stacked layout, the model's config, and the run's config (None for a converted model).

    Raises:
      InputError: not a workdir, no checkpoint in it, every checkpoint is damaged, a parameter is not finite, or the
        workdir was written by another version.
    """
    mesh = sharding.one_device_mesh() if mesh is None else mesh

    def read(step: int) -> tuple[dict, LlamaConfig, Config | None]:
        meta = _read_meta(manager, step)
        cfg, run = _stored_model(meta, workdir)
        if run is not None and run.adapter.rank:
            merged = f", or python -m msn_jax.convert --source={workdir} --target=DIR to merge the two"
            raise InputError(
                f"{workdir}: holds an adapter, not a model: use --model={run.train.init_from} "
                f"--adapter={Path(workdir) / workdirs.ADAPTER}{merged if run.adapter.gate == 'all' else ''}"
            )
        boxed = llama.abstract(cfg, True)
        target = ocp.args.StandardRestore(abstract(boxed, mesh, rules))
        params = manager.restore(step, args=ocp.args.Composite(params=target))["params"]
        _check_fingerprint("params", params, meta)
        param_checks.check_finite(params, manager.directory / str(step))
        return params, cfg, run

    with _open_reader(workdir) as manager:
        loaded, _ = _newest_intact(manager, read)
    return loaded


def read_config(workdir: str | Path) -> LlamaConfig:
    """The model's config, without reading parameters. Raises like `load_params`, which warns of damaged checkpoints."""

    def read(step: int) -> LlamaConfig:
        return _stored_model(_read_meta(manager, step), workdir)[0]

    with _open_reader(workdir) as manager:
        cfg, _ = _newest_intact(manager, read, quiet=True)
    return cfg


def read_run(workdir: str | Path) -> Config | None:
    """The run's config, None for a converted model. Raises like `read_config`."""
    with _open_reader(workdir) as manager:
        run, _ = _newest_intact(manager, lambda step: _stored_model(_read_meta(manager, step), workdir)[1], quiet=True)
    return run


def abstract(boxed: object, mesh: Mesh, rules: sharding.Rules) -> object:
    """The restore target for a boxed abstract tree: shapes, dtypes and shardings."""
    return jax.tree.map(
        lambda leaf, target: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=target),
        nn.meta.unbox(boxed),
        sharding.shardings(boxed, mesh, rules),
    )


def _check_fingerprint(name: str, tree: object, meta: dict) -> None:
    if param_checks.fingerprint(tree) != meta["fingerprints"][name]:
        raise ValueError(f"fingerprint of {name} differs from the saved one")


@contextlib.contextmanager
def _open_reader(workdir: str | Path) -> Iterator[ocp.CheckpointManager]:
    """A read-only manager. InputError if the workdir has no checkpoint."""
    if not workdirs.is_workdir(workdir):
        raise InputError(f"{workdir}: not a training workdir (it has no directory 'checkpoints')")
    _silence_orbax()
    options = ocp.CheckpointManagerOptions(read_only=True, create=False)
    with ocp.CheckpointManager(workdirs.checkpoints(workdir), options=options) as manager:
        if not manager.all_steps():
            raise InputError(f"{workdir}: no checkpoint in it yet")
        yield manager


def _newest_intact(
    manager: ocp.CheckpointManager, read: Callable[[int], Result], quiet: bool = False
) -> tuple[Result, list[int]]:
    """The result of `read` for the newest step that it can read, and the newer, damaged steps.

    Names the damaged ones on stderr unless `quiet`.
    """
    damaged: list[int] = []
    for step in sorted(manager.all_steps(), reverse=True):
        with _no_orphan_messages():
            try:
                return read(step), damaged
            except (InputError, MemoryError, jax.errors.JaxRuntimeError):
                raise  # the checkpoint is not damaged: wrong input, or not enough memory
            except Exception as error:  # Orbax and TensorStore raise bare `Exception`s
                reason = str(error).splitlines()[0][:100]
        if not quiet:
            print(f"warning: {manager.directory / str(step)}: damaged checkpoint, skipped ({reason})", file=sys.stderr)
        damaged.append(step)
    raise InputError(
        f"{manager.directory}: every checkpoint is damaged: restore one from a copy, or choose another --workdir"
    )


@contextlib.contextmanager
def _no_orphan_messages() -> Iterator[None]:
    """Suppresses the messages of coroutines that a failed restore abandons: they would bury the one-line warning."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    finally:
        gc.collect()
        sys.unraisablehook = hook


def _set_aside(manager: ocp.CheckpointManager, step: int) -> None:
    damaged = Path(manager.directory).parent / "damaged"
    damaged.mkdir(exist_ok=True)
    number = len(list(damaged.glob(f"{step}.*")))
    (Path(manager.directory) / str(step)).rename(damaged / f"{step}.{number}")


def _stored_model(meta: dict, workdir: object) -> tuple[LlamaConfig, Config | None]:
    """The configs of a checkpoint's model and run; the latter is None for a converted model."""
    try:
        if "config" not in meta:
            return LlamaConfig(**meta["model"]), None
        run = config.from_dict(meta["config"])
        return run.model, run
    except TypeError as error:
        raise _other_version(workdir, f"its config: {error}") from error


def _other_version(workdir: object, why: str) -> InputError:
    return InputError(
        f"{workdir}: was written by another version of msn_jax ({why}): use that version, or another --workdir"
    )


def _read_meta(manager: ocp.CheckpointManager, step: int) -> dict:
    return manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]


def _silence_orbax() -> None:
    logging.getLogger("absl").setLevel(logging.ERROR)
