"""Models ready for decoding: weights, tokenizer, devices, and what earlier sessions have learned about them."""

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from msn_jax import adapter as adapters
from msn_jax import llama, pretrained, sharding
from msn_jax.adapter import Adapter
from msn_jax.cli import InputError
from msn_jax.config import LlamaConfig, MeshConfig
from msn_jax.data import tokenizer as tokenizers
from msn_jax.data.tokenizer import Tokenizer
from msn_jax.decode import adaptive, drafters
from msn_jax.decode.adaptive import WidthPolicy
from msn_jax.decode.drafters import Drafter
from msn_jax.decode.programs import Programs
from msn_jax.decode.scheduler import Scheduler
from msn_jax.decode.tree import TokenTree


@dataclasses.dataclass(frozen=True)
class GatedAdapter:
    """An adapter that is active at noise nodes only (`adapter.py`)."""

    params: dict  # decoding layout
    noise_token: int | None  # what every noise node holds; None: ahead noise
    name: str = ""  # its directory


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model, ready for decoding."""

    params: dict  # one entry per layer, see `llama.decode_layout`
    cfg: LlamaConfig
    tokenizer: Tokenizer
    mesh: Mesh | None = None  # the mesh of the parameters, if they are sharded over several devices
    name: str = ""  # its directory or GGUF file, if it has one
    adapter: GatedAdapter | None = None  # drafts for the model, whose own outputs it does not change
    experience: dict = dataclasses.field(default_factory=dict, compare=False)  # see `Experience`


@dataclasses.dataclass
class Experience:
    """What earlier sessions of a model have learned for one drafter and batch size."""

    policy: WidthPolicy | None = None  # of a drafter with several widths
    scheduler: Scheduler | None = None
    # Decoding programs by (width index, capacity), and prefill programs.
    programs: Programs = dataclasses.field(default_factory=Programs)


def recall(model: Model, drafter: Drafter, batch_size: int) -> Experience:
    """The model's experience for this drafter and batch size; empty at first."""
    key = (drafter, batch_size)
    if key not in model.experience:
        experience = model.experience[key] = Experience()
        if drafter.widths:
            experience.scheduler = Scheduler(drafter.widths)
            experience.policy = adaptive.create(drafter.tree, experience.scheduler.rounds.relative_time())
    return model.experience[key]


def drafter_of(model: Model, decoder: str, tree: TokenTree | None = None) -> tuple[Drafter, dict | None]:
    """The drafter of `decoder` with its own parameters: the model's gated adapter, where that can draft for it.

    Args:
      model: the model.
      decoder: any but 'draft_model'.
      tree: None is the decoder's default tree.

    Raises:
      InputError: no such decoder.
    """
    if model.adapter is None or decoder not in drafters.ADAPTED_TREES:
        return drafters.get(decoder, tree), None
    drafter = drafters.get(decoder, drafters.ADAPTED_TREES[decoder] if tree is None else tree)
    return drafters.adapt(drafter, model.adapter.noise_token), model.adapter.params


@contextlib.contextmanager
def _garbage_collection_off() -> Iterator[None]:
    """Traced programs are many objects, none of them garbage: searching them takes 0.3 of 3.6 s of a start."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_garbage_collection_off()
def load(
    name: str | Path,
    dtype: str | None = None,
    mesh: MeshConfig | None = None,
    adapter: str | Path | None = None,
    while_reading: Callable[[Model], None] | None = None,
) -> Model:
    """Loads a model for decoding.

    Args:
      name: a training workdir, a Hugging Face directory, a GGUF file, or a repository of the Hub (`pretrained.py`).
      dtype: of parameters and computation; None keeps the checkpoint's.
      mesh: shards batches over `data` and weights over `tensor`; None uses one device.
      adapter: a directory with an adapter in PEFT's form (`adapter.py`): a gated one drafts, any other is merged.
      while_reading: called in another thread with the model without its weights (abstract parameters) while they are
        read, for example to compile programs (`engine.compile_first`). Not called if there is a mesh or an adapter.

    Raises:
      InputError: no such model, its tokenizer does not fit, or it cannot be sharded like that.
    """
    path = pretrained.directory(name)
    tokenizer = tokenizers.load(path)
    cfg = pretrained.read_config(path, dtype)
    tokenizers.check_fits(tokenizer, cfg.vocab_size, str(path))
    devices = None if mesh is None else sharding.make_mesh(mesh, name="mesh of the model")
    model = Model({}, cfg, tokenizer, devices, str(path))
    if while_reading is None or mesh is not None or adapter is not None:
        return _read_weights(model, dtype, adapter)
    params = nn.meta.unbox(llama.abstract(cfg, False))
    outline = jax.eval_shape(lambda params: llama.decode_layout(params, cfg), params)
    placement = one_device()
    outline = jax.tree.map(lambda leaf: leaf.update(sharding=placement), outline)
    with ThreadPoolExecutor(1, "while_reading") as executor:
        other = executor.submit(while_reading, dataclasses.replace(model, params=outline))
        read = _read_weights(model, dtype)  # here, so that an interrupt ends it
        other.result()
    return read


def attach(model: Model, directory: str | Path) -> Model:
    """The model with a gated adapter, which drafts for it; both share the weights.

    Args:
      model: without an adapter.
      directory: an adapter in PEFT's form.

    Raises:
      InputError: the adapter is damaged, does not fit the model, or is active at every token.
    """
    read = adapters.load(directory, model.cfg)
    if read.cfg.gate != "noise":
        raise InputError(f"{directory}: is active at every token, so it would change the model: load the model with it")
    return dataclasses.replace(model, adapter=_gated(model, read, directory), experience={})


def one_device() -> NamedSharding:
    """The sharding of everything in a model that has no mesh: that of the one-device mesh which the readers create."""
    return NamedSharding(sharding.one_device_mesh(), PartitionSpec())


def _read_weights(model: Model, dtype: str | None, adapter: str | Path | None = None) -> Model:
    """The model with its parameters."""
    gated = merged = None
    if adapter is not None:
        read = adapters.load(adapter, model.cfg)
        if read.cfg.gate == "noise":
            gated = _gated(model, read, adapter)
        else:
            merged = _factors(model, read)
    loaded = pretrained.load(model.name, model.mesh, stacked=False, dtype=dtype, rows=merged is None)
    params, cfg = loaded.params, loaded.cfg  # of an older checkpoint, if the newest one is damaged
    if merged is not None:
        params = adapters.merge_layers(params, merged)
    params = llama.decode_layout(params, cfg, model.mesh)
    if model.mesh is None:  # one sharding for all, without the names of axes that a reader used
        params = jax.device_put(params, one_device())
    return dataclasses.replace(model, params=params, cfg=cfg, adapter=gated)


def _gated(model: Model, read: Adapter, directory: str | Path) -> GatedAdapter:
    return GatedAdapter(_factors(model, read), read.noise_token, str(directory))


def _factors(model: Model, read: Adapter) -> dict:
    """The parameters of an adapter in the decoding layout, on the model's devices."""
    return replicate(adapters.decode_layout(read.params, read.cfg), model.mesh)


def replicate(params: dict, mesh: Mesh | None) -> dict:
    """Parameters that are small enough to be on every device of the mesh, if there is one."""
    return params if mesh is None else jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
