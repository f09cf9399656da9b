"""Converts a training workdir or a GGUF model into a Hugging Face directory, and a Hugging Face directory to a workdir.

    python -m msn_jax.convert --source=runs/msn --target=exports/msn            # for transformers and serving engines
    python -m msn_jax.convert --source=PATH/Llama-3.2-1B --target=runs/llama    # for `--config.train.init_from`
    python -m msn_jax.convert --source=PATH/model-Q4_K_M.gguf --target=models/model
    python -m msn_jax.convert --source=MODEL --adapter=DIR --target=exports/merged    # a Hugging Face directory

The kind of the source determines the direction. Tensors are copied bit for bit, unless `--dtype` rounds them; those of
a GGUF model are dequantized. An adapter that is active at every token is merged: its updates are added to the weights.
The workdir of a run that trained such an adapter becomes its model with the adapter merged.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags

from msn_jax import adapter as adapters
from msn_jax import checkpoint, cli, config, directories, hugging_face, param_checks, pretrained, sharding, workdirs
from msn_jax.adapter import Adapter
from msn_jax.cli import InputError
from msn_jax.config import Config, MeshConfig
from msn_jax.data import tokenizer as tokenizers
from msn_jax.gguf import container


def convert(source: str, target: str, dtype: str | None = None, adapter: str | None = None) -> None:
    """Converts a model. Atomic: the target is complete or absent.

    Args:
      source: a training workdir, a Hugging Face directory or a GGUF file.
      target: directory that is absent or empty, outside of the source.
      dtype: dtype of the target's parameters; None keeps the source's.
      adapter: directory of an adapter in PEFT's form to merge; the target is then a Hugging Face directory.

    Raises:
      InputError: there is no such source or adapter, the target cannot be made or is not empty, the model or the
        adapter is damaged, the tokenizer or the adapter does not fit the model, or the adapter is gated.
    """
    directories.check_new(target, f"--target={target}")  # before the model is downloaded or read
    path = pretrained.directory(source)
    for flag, directory in ((f"--source={source}", path), (f"--adapter={adapter}", adapter)):
        if directory is not None and Path(target).resolve().is_relative_to(Path(directory).resolve()):
            raise InputError(f"--target={target}: is inside {flag}: name a directory outside of it")
    tokenizer = tokenizers.load(path)
    parts = _parts(path, adapter)
    factors = None if parts.adapter is None else _read_ungated(parts, dtype)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=-1))
    model = pretrained.load(parts.model, mesh, sharding.TRAIN_RULES, stacked=True, dtype=dtype)
    tokenizers.check_fits(tokenizer, model.cfg.vocab_size, str(path))
    if factors is not None:
        params = _merge(model.params, factors)
        param_checks.check_finite(params, f"--adapter={parts.adapter}: merged", is_cast=True)
        model = dataclasses.replace(model, params=params, run=parts.run)
    if factors is not None or workdirs.is_workdir(path) or container.is_gguf(path):
        hugging_face.export(
            model.params,
            model.cfg,
            target,
            run=model.run,
            generation=hugging_face.generation_config(tokenizer),
            files=hugging_face.tokenizer_files(tokenizer),
        )
    else:
        with directories.whole(target) as workdir:
            tokenizers.save(tokenizer, workdir)
            checkpoint.save_model(workdir, model.params, model.cfg)


class _Parts(NamedTuple):
    """Where the parts of the source are."""

    model: Path
    adapter: str | Path | None = None
    run: Config | None = None  # the run that trained the adapter, if known


def _parts(path: Path, adapter: str | None) -> _Parts:
    """The source with the adapter that the flags name; for the workdir of an adapter's run, its model and adapter."""
    run = checkpoint.read_run(path) if workdirs.is_workdir(path) else None
    if run is None or run.adapter.rank == 0:
        return _Parts(path, adapter)
    base, own = run.train.init_from, path / workdirs.ADAPTER
    if adapter is not None:
        raise InputError(
            f"--adapter={adapter}: --source={path} holds an adapter itself: leave out --adapter, or use --source={base}"
        )
    try:
        return _Parts(pretrained.directory(base), own, run)
    except InputError as error:
        raise InputError(
            f"{path}: holds an adapter, whose model is not there ({error}): use --source=MODEL --adapter={own}"
        ) from error


def _read_ungated(parts: _Parts, dtype: str | None) -> Adapter:
    read = adapters.load(parts.adapter, pretrained.read_config(parts.model, dtype))
    if read.cfg.gate == "noise":
        raise InputError(
            f"--adapter={parts.adapter}: is active at noise tokens only, so it cannot be merged into the weights: "
            f"convert the model alone, and decode with --model={parts.model} --adapter={parts.adapter}"
        )
    return read


def _merge(params: dict, adapter: Adapter) -> dict:
    """The parameters with the adapter; those given are overwritten, because two large models may not fit."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, params)
    merge = jax.jit(adapters.merge, static_argnums=2, out_shardings=shardings, donate_argnums=0)
    return merge(params, adapter.params, adapter.cfg)


def main() -> None:
    """Converts the model that the flags name."""
    convert(flags.FLAGS.source, flags.FLAGS.target, flags.FLAGS.dtype, flags.FLAGS.adapter)
    print(f"{flags.FLAGS.target}: written")


if __name__ == "__main__":
    flags.DEFINE_string("source", None, "A training workdir, a Hugging Face directory or a GGUF file.", required=True)
    flags.DEFINE_string(
        "target", None, "Directory to make: a workdir if the source is a Hugging Face directory.", required=True
    )
    flags.DEFINE_string("adapter", None, "A directory with a LoRA adapter in PEFT's form, to merge into the model.")
    flags.DEFINE_enum("dtype", None, config.DTYPES, "Dtype of the target's parameters; default: the source's.")
    cli.run(main)
