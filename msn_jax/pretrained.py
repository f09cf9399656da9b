"""Loads models by name. Every flag and field for a model (`--model`, `train.init_from`, ...) accepts

DIR           a training workdir; its newest undamaged checkpoint is used
DIR           a Hugging Face directory: config.json and safetensors
FILE.gguf     a GGUF model, or any file of a split one
OWNER/NAME    a repository on the Hugging Face Hub; needs huggingface_hub and network access
"""

import dataclasses
import os
import re
from pathlib import Path
from types import ModuleType

import jax
from jax.sharding import Mesh

from msn_jax import hugging_face, llama, param_checks, sharding, workdirs
from msn_jax.cli import MAX_NAME_BYTES, InputError
from msn_jax.config import Config, LlamaConfig
from msn_jax.gguf import container
from msn_jax.gguf import load as gguf_load
from msn_jax.gguf import model as gguf_model

_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja")  # no pickles


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Parameters with the config of their model."""

    params: dict
    cfg: LlamaConfig
    run: Config | None  # the training config, if known


def directory(name: str | Path) -> Path:
    """The directory or GGUF file of a model, downloaded first if `name` is a repository on the Hub.

    Raises:
      InputError: neither a workdir nor a Hugging Face directory nor a GGUF file, or the download failed.
    """
    path = Path(name)
    if any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in path.parts):  # `Path.exists` would raise OSError
        raise InputError(f"{name}: too long for the name of a directory")
    if container.is_gguf(path):
        return path
    if not path.exists() and path.suffix == ".gguf":
        raise InputError(f"{name}: no such file")
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        path = _download(str(name))
    if not workdirs.is_workdir(path) and not hugging_face.is_checkpoint(path):
        raise InputError(
            f"{name}: not a training workdir (it has no directory 'checkpoints'), not a Hugging Face directory (it has "
            "no config.json) and not a GGUF file"
        )
    return path


def read_config(name: str | Path, dtype: str | None = None) -> LlamaConfig:
    """The config of the model `name`, without reading its weights. Arguments and errors as in `load`."""
    path = directory(name)
    if container.is_gguf(path):
        return _in_dtype(gguf_model.load_config(path), dtype)
    read = _checkpoint().read_config if workdirs.is_workdir(path) else hugging_face.read_config
    return _in_dtype(read(path), dtype)


def load(
    name: str | Path,
    mesh: Mesh | None = None,
    rules: sharding.Rules = sharding.DECODE_RULES,
    *,
    stacked: bool,
    dtype: str | None = None,
    rows: bool = False,
) -> Pretrained:
    """Loads the model `name` onto the devices.

    Args:
      name: as described above.
      mesh: devices that the parameters are sharded over; None is the default device.
      rules: sharding rules, see `sharding.py`.
      stacked: whether to use the training layout, with all layers of a weight in one array, or the decoding layout.
      dtype: dtype of parameters and computation; None keeps the model's own.
      rows: whether the decoding layout may have the weights of a file as rows, where `llama.decode_layout` wants them.

    Raises:
      InputError: there is no such model, it is damaged, its architecture is not supported, or a weight is NaN or
        infinite, as stored or in `dtype`.
    """
    path = directory(name)
    if workdirs.is_workdir(path):
        params, stored_cfg, run = _checkpoint().load_params(path, mesh, rules)
        cfg = _in_dtype(stored_cfg, dtype)
        layout = jax.jit(_cast_and_layout, static_argnums=(1, 2), donate_argnums=0 if stacked else ())
        params = layout(params, cfg, stacked)
        if cfg.param_dtype != stored_cfg.param_dtype:
            param_checks.check_finite(params, path, is_cast=True)
        return Pretrained(params, cfg, run)
    if container.is_gguf(path):
        cfg = _in_dtype(gguf_model.load_config(path), dtype)
        read = gguf_load.load_params
    else:
        cfg = _in_dtype(hugging_face.read_config(path), dtype)
        read = hugging_face.load_params
    rows = rows and llama.decodes_from_rows(cfg, mesh)
    return Pretrained(read(path, cfg, mesh, rules, stacked=stacked, rows=rows), cfg, None)


def _checkpoint() -> ModuleType:
    """The module that reads workdirs, imported late: other models need not wait half a second for Orbax."""
    from msn_jax import checkpoint

    return checkpoint


def _in_dtype(cfg: LlamaConfig, dtype: str | None) -> LlamaConfig:
    return cfg if dtype is None else dataclasses.replace(cfg, dtype=dtype, param_dtype=dtype)


def _cast_and_layout(params: dict, cfg: LlamaConfig, stacked: bool) -> dict:
    params = jax.tree.map(lambda value: value.astype(cfg.param_dtype), params)
    return params if stacked else llama.unstack_layers(params, cfg)


def _download(name: str) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError(
            f"{name}: no such directory; to download it from the Hugging Face Hub, pip install huggingface_hub"
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # network, cache and Hub errors have no common base class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{name}: no such directory, and downloading it from the Hugging Face Hub failed ({reason}): check the "
            "name and the network, or copy the model here and give its directory"
        ) from error
