"""Checkpoints of a training run (Orbax): WORKDIR/checkpoints/STEP holds

    params      the model's parameters, stacked layout
    opt_state   the optimizer's state
    meta        JSON: step, where in which data the run stands, config, fingerprints of the two trees

A model that was converted into a workdir (`save_model`) has step 0, parameters, and its model's config alone.

Saving is asynchronous. The iterator's state is plain JSON of ours and not Grain's own file, which names the process
count and could not be restored on another one. The fingerprints are there because the storage layer notices a
truncated file but returns flipped bits without complaint.
"""

import contextlib
import dataclasses
import gc
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from msn_jax import config, llama, sharding
from msn_jax.cli import InputError, cannot_make
from msn_jax.config import Config, LlamaConfig, MeshConfig

Result = TypeVar("Result")

# What may change when a run is resumed; all else would make it another run. Some of these decide the last bits or more:
# `steps` stretches the learning rates still to come; `mesh`, `loss_chunk`, `remat` and `unroll` change the rounding.
_FREE_FIELDS = (
    "train.steps",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.loss_chunk",
    "train.remat",
    "train.unroll",
    "data.data_dir",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
)


@dataclasses.dataclass
class Restored:
    """One checkpoint, in memory."""

    step: int  # steps done
    params: dict
    opt_state: object
    data_state: dict  # 'iterator': its state; 'rows': the fingerprint of what it iterates over


def open_manager(workdir: str | Path, keep: int) -> ocp.CheckpointManager:
    """The manager of a run that writes; creates the directory and keeps the newest `keep` checkpoints."""
    _silence_orbax()
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager(_directory(workdir), options=options)


def save(
    manager: ocp.CheckpointManager, step: int, params: dict, opt_state: object, data_state: dict, cfg: Config
) -> None:
    """Starts to save; returns once the arrays have left the device. A step that exists already is left alone."""
    meta = {
        "step": step,
        "data": data_state,
        "config": config.to_dict(cfg),
        "fingerprints": {"params": fingerprint(params), "opt_state": fingerprint(opt_state)},
    }
    items = ocp.args.Composite(
        params=ocp.args.StandardSave(params),
        opt_state=ocp.args.StandardSave(opt_state),
        meta=ocp.args.JsonSave(meta),
    )
    manager.save(step, args=items)


def save_model(workdir: str | Path, params: dict, cfg: LlamaConfig) -> None:
    """Writes parameters that no run of ours made, stacked layout, where runs can start from."""
    meta = {"step": 0, "model": dataclasses.asdict(cfg), "fingerprints": {"params": fingerprint(params)}}
    items = ocp.args.Composite(params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(meta))
    with open_manager(workdir, 1) as manager:
        manager.save(0, args=items)


def restore(manager: ocp.CheckpointManager, cfg: Config, params: dict, opt_state: object) -> Restored | None:
    """The newest undamaged checkpoint, or None if there is none at all.

    Damaged newer ones are named on stderr and moved to WORKDIR/damaged, so that their steps can be saved again.

    Args:
      manager: of the run's workdir.
      cfg: of the run that resumes.
      params: `jax.ShapeDtypeStruct`s with the shardings to restore onto.
      opt_state: the same for the optimizer's state.

    Raises:
      InputError: the workdir belongs to another config or version, or every checkpoint is damaged.
    """
    workdir = manager.directory.parent

    def read(step: int) -> Restored:
        meta = _read_meta(manager, step)
        if "config" not in meta:
            raise InputError(
                f"{workdir}: holds a converted model and no run: name it as --config.train.init_from, and choose "
                "another --workdir"
            )
        _stored_model(meta, workdir)
        check_config(meta["config"], cfg, workdir)
        if meta["data"].keys() != {"iterator", "rows"}:
            raise _other_version(workdir, "its data state differs")
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(params), opt_state=ocp.args.StandardRestore(opt_state)
        )
        trees = manager.restore(step, args=items)
        for name in ("params", "opt_state"):
            _check_fingerprint(name, trees[name], meta)
        return Restored(step, trees["params"], trees["opt_state"], meta["data"])

    if not manager.all_steps():
        return None
    found, damaged = _newest_intact(manager, read)
    for step in damaged if jax.process_index() == 0 else ():
        _set_aside(manager, step)
    if damaged:
        manager.reload()
    return found


def load_params(
    workdir: str | Path, mesh: Mesh | None = None, rules: sharding.Rules = sharding.DECODE_RULES
) -> tuple[dict, LlamaConfig, Config | None]:
    """The newest undamaged parameters of a workdir, in the stacked layout, their model, and the run that made them.

    Args:
      workdir: of the run, or of a converted model, which has no run.
      mesh: where to put them, by `rules`; None is the default device.
      rules: sharding rules, see `sharding.py`.

    Raises:
      InputError: not a workdir, no checkpoint in it, none that is intact, or written by another version.
    """
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1]) if mesh is None else mesh

    def read(step: int) -> tuple[dict, LlamaConfig, Config | None]:
        meta = _read_meta(manager, step)
        cfg, run = _stored_model(meta, workdir)
        boxed = jax.eval_shape(lambda: llama.init(jax.random.key(0), cfg))
        target = ocp.args.StandardRestore(abstract(boxed, mesh, rules))
        params = manager.restore(step, args=ocp.args.Composite(params=target))["params"]
        _check_fingerprint("params", params, meta)
        return params, cfg, run

    with _open_reader(workdir) as manager:
        found, _ = _newest_intact(manager, read)
    return found


def read_config(workdir: str | Path) -> LlamaConfig:
    """The model of a workdir, of which no parameter is read. Damage is `load_params`'s to name: InputError as there."""

    def read(step: int) -> LlamaConfig:
        return _stored_model(_read_meta(manager, step), workdir)[0]

    with _open_reader(workdir) as manager:
        found, _ = _newest_intact(manager, read, quiet=True)
    return found


def is_workdir(path: str | Path) -> bool:
    """Whether a training run, or a converted model, lives at `path`."""
    return _directory(path).is_dir()


def abstract(boxed: object, mesh: Mesh, rules: sharding.Rules) -> object:
    """Shapes, dtypes and shardings of a boxed abstract tree: what Orbax restores onto."""
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        nn.meta.unbox(boxed),
        sharding.shardings(boxed, mesh, rules),
    )


def check_new(path: str | Path, name: str) -> None:
    """Refuses a `path` that `whole_directory` cannot make; messages call it `name`."""
    path = Path(path).resolve()
    try:
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
        _partial(path).exists()  # its name is longer
    except OSError as error:
        raise cannot_make(name, error) from error
    if taken:
        raise InputError(f"{name}: exists and is not an empty directory: name a new one")


@contextlib.contextmanager
def whole_directory(path: str | Path) -> Iterator[Path]:
    """A directory to fill, which becomes `path` at the end; or nothing does, if that is never reached.

    Every process of a pod enters; the first one makes, renames and removes.

    Raises:
      InputError: `path` exists and is not an empty directory, or cannot be made.
    """
    path = Path(path).resolve()  # a rename would not follow a link
    check_new(path, str(path))
    partial = _partial(path)
    first = jax.process_index() == 0
    try:
        if first:
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            try:
                partial.mkdir(parents=True)
            except OSError as error:
                raise cannot_make(str(path), error) from error
        multihost_utils.sync_global_devices("whole directory: made")
        yield partial
        multihost_utils.sync_global_devices("whole directory: filled")
        if first:
            os.replace(partial, path)
    except BaseException:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    multihost_utils.sync_global_devices("whole directory: there")


def _partial(path: Path) -> Path:
    """Beside it, so that the last step is a rename; by a name that nobody else gives, because a left one is removed."""
    return path.with_name(f".{path.name}.msn_jax-partial")


def check_config(stored: dict, cfg: Config, workdir: object) -> None:
    """Refuses to continue a run under a config that would have led elsewhere.

    Raises:
      InputError: names the first field that differs and both values.
    """
    old, new = _flatten(stored), _flatten(config.to_dict(cfg))
    for field in sorted(old.keys() | new.keys()):
        if field not in _FREE_FIELDS and old.get(field) != new.get(field):
            raise InputError(
                f"{workdir}: belongs to a run with config.{field}={old.get(field)!r}, this one has "
                f"{new.get(field)!r}; choose another --workdir"
            )


def fingerprint(tree: object) -> int:
    """The sum of all bits of a tree, as unsigned words modulo 2**32: the same on every mesh, other after a flip."""
    return int(_sum_of_bits(tree))


@jax.jit
def _sum_of_bits(tree: object) -> Array:
    total = jnp.zeros((), jnp.uint32)
    for leaf in jax.tree.leaves(tree):
        words = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}"))
        total += jnp.sum(words.astype(jnp.uint32), dtype=jnp.uint32)
    return total


def _check_fingerprint(name: str, tree: object, meta: dict) -> None:
    if fingerprint(tree) != meta["fingerprints"][name]:
        raise ValueError(f"{name} differ from what was saved (fingerprint)")


@contextlib.contextmanager
def _open_reader(workdir: str | Path) -> Iterator[ocp.CheckpointManager]:
    """The manager of a workdir that is only read. InputError if it has no checkpoint."""
    if not is_workdir(workdir):
        raise InputError(f"{workdir}: not a training workdir (it has no directory 'checkpoints')")
    _silence_orbax()
    options = ocp.CheckpointManagerOptions(read_only=True, create=False)
    with ocp.CheckpointManager(_directory(workdir), options=options) as manager:
        if not manager.all_steps():
            raise InputError(f"{workdir}: no checkpoint in it yet")
        yield manager


def _newest_intact(
    manager: ocp.CheckpointManager, read: Callable[[int], Result], quiet: bool = False
) -> tuple[Result, list[int]]:
    """What `read` makes of the newest checkpoint that it can read, and the newer steps that it cannot, which are named
    on stderr unless `quiet`.
    """
    damaged: list[int] = []
    for step in sorted(manager.all_steps(), reverse=True):
        with _no_orphan_messages():
            try:
                return read(step), damaged
            except (InputError, MemoryError, jax.errors.JaxRuntimeError):
                raise  # the user's config or the device's memory: not the checkpoint's fault
            except Exception as error:  # Orbax and TensorStore raise bare `Exception`s
                reason = str(error).splitlines()[0][:100]
        if not quiet:
            print(f"warning: {manager.directory / str(step)}: damaged checkpoint, skipped ({reason})", file=sys.stderr)
        damaged.append(step)
    raise InputError(
        f"{manager.directory}: every checkpoint is damaged: bring back a copy of one, or choose another --workdir"
    )


@contextlib.contextmanager
def _no_orphan_messages() -> Iterator[None]:
    """A failed restore leaves coroutines behind, whose farewell messages would bury the one line that matters."""
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
    """The model of a checkpoint, and the run that made it, which a converted model has not."""
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


def _directory(workdir: str | Path) -> Path:
    return Path(workdir).absolute() / "checkpoints"


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _silence_orbax() -> None:
    logging.getLogger("absl").setLevel(logging.ERROR)
