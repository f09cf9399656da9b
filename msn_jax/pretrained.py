"""Models by name. Every flag and field that takes one (`--model`, `train.init_from`, ...) takes

DIR           a training workdir, of which it is the newest undamaged checkpoint
DIR           a Hugging Face directory: config.json and safetensors
OWNER/NAME    a repository of the Hugging Face Hub, where huggingface_hub is installed and the network allows it
"""

import dataclasses
import os
import re
from pathlib import Path

import jax
from jax.sharding import Mesh

from msn_jax import checkpoint, hugging_face, llama, sharding
from msn_jax.cli import InputError
from msn_jax.config import Config, LlamaConfig

_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja")  # never a pickle


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Parameters and what they are."""

    params: dict
    cfg: LlamaConfig
    run: Config | None  # how they were trained, where that is known


def directory(name: str | Path) -> Path:
    """The directory of a model; one of the Hub is fetched first.

    Raises:
      InputError: neither a workdir nor a Hugging Face directory, and nothing of that name can be fetched.
    """
    path = Path(name)
    # File systems hold no longer names; to ask for such a file raises OSError.
    if any(len(os.fsencode(part)) > 255 for part in path.parts):
        raise InputError(f"{name}: too long for the name of a directory")
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        path = _fetch(str(name))
    if not checkpoint.is_workdir(path) and not hugging_face.is_checkpoint(path):
        raise InputError(
            f"{name}: not a training workdir (it has no directory 'checkpoints') and not a Hugging Face directory "
            "(it has no config.json)"
        )
    return path


def read_config(name: str | Path) -> LlamaConfig:
    """The model called `name`, of which no weight is read. InputError as of `load`."""
    path = directory(name)
    return checkpoint.read_config(path) if checkpoint.is_workdir(path) else hugging_face.read_config(path)


def load(
    name: str | Path,
    mesh: Mesh | None = None,
    rules: sharding.Rules = sharding.DECODE_RULES,
    *,
    stacked: bool,
    dtype: str | None = None,
) -> Pretrained:
    """The model called `name`, on the devices.

    Args:
      name: see above.
      mesh: where to put the parameters, by `rules`; None is the default device.
      rules: sharding rules, see `sharding.py`.
      stacked: the training layout, or else the decoding one.
      dtype: of parameters and computation; None is what the model has.

    Raises:
      InputError: there is none, it is damaged, or its architecture is not known.
    """
    path = directory(name)
    if checkpoint.is_workdir(path):
        params, cfg, run = checkpoint.load_params(path, mesh, rules)
        cfg = _in_dtype(cfg, dtype)
        layout = jax.jit(_stored_as, static_argnums=(1, 2), donate_argnums=0 if stacked else ())
        return Pretrained(layout(params, cfg, stacked), cfg, run)
    cfg = _in_dtype(hugging_face.read_config(path), dtype)
    return Pretrained(hugging_face.load_params(path, cfg, mesh, rules, stacked=stacked), cfg, None)


def _in_dtype(cfg: LlamaConfig, dtype: str | None) -> LlamaConfig:
    return cfg if dtype is None else dataclasses.replace(cfg, dtype=dtype, param_dtype=dtype)


def _stored_as(params: dict, cfg: LlamaConfig, stacked: bool) -> dict:
    params = jax.tree.map(lambda value: value.astype(cfg.param_dtype), params)
    return params if stacked else llama.unstack_layers(params, cfg)


def _fetch(name: str) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise InputError(
            f"{name}: no such directory; to fetch it from the Hugging Face Hub, pip install huggingface_hub"
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except Exception as error:  # of the network, the cache and the Hub's answers: no common base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{name}: no such directory, and the Hugging Face Hub gave none ({reason}): check the name and the "
            "network, or copy the model here and name its directory"
        ) from error
