"""LoRA adapters (arXiv 2106.09685): low-rank updates a b of matrices of a frozen model, in their own parameter tree.

A *gated* adapter (`config.adapter.gate = 'noise'`) is active at noise tokens only. Verified tokens run on the model
alone, so the text is that of the published model, bit for bit, and the adapter only has to guess the drafts. An ungated
one is active at every token; it can be merged into the weights.

Three layouts:

    training   'q': (a [L', I, r], b [L', r, O]), the layers from `first_layer` on stacked; I and O flattened over heads
    decoding   'layer_i' -> 'q': (a [I, r], b [r, O]), b multiplied by alpha / rank (`decode_layout`)
    files      adapter_model.safetensors and adapter_config.json of the PEFT library (`save`, `load`)
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax import Array

from msn_jax import config, json_files
from msn_jax.cli import InputError
from msn_jax.config import AdapterConfig, LlamaConfig
from msn_jax.hugging_face.names import TO_HUGGING_FACE, rename

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MODULES = {name: "attention" if name in "qkvo" else "mlp" for name in config.ADAPTER_TARGETS}
_GATE, _TOKEN = "msn_gate", "msn_noise_token"  # our keys in adapter_config.json; PEFT ignores them with a warning


class Adapter(NamedTuple):
    """An adapter as read from a directory."""

    params: dict  # training layout
    cfg: AdapterConfig
    noise_token: int | None  # the token that every noise node of a draft tree holds; None: ahead noise


def shapes(model: LlamaConfig, cfg: AdapterConfig) -> dict[str, tuple[int, int]]:
    """(I, O) of every adapted matrix."""
    D, F = model.d_model, model.d_mlp
    queries, keys = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    known = {"q": (D, queries), "k": (D, keys), "v": (D, keys), "o": (queries, D)}
    known |= {"gate": (D, F), "up": (D, F), "down": (F, D)}
    return {name: known[name] for name in config.adapter_targets(cfg)}


def init(key: Array, model: LlamaConfig, cfg: AdapterConfig) -> dict:
    """A new adapter in the training layout, boxed with its logical axes: b is 0, so it changes nothing yet.

    The adapter is small, so it is replicated on all devices.
    """
    layers = model.n_layers - cfg.first_layer
    params = {}
    for index, (name, (inputs, outputs)) in enumerate(shapes(model, cfg).items()):
        a = jax.random.normal(jax.random.fold_in(key, index), (layers, inputs, cfg.rank), jnp.float32)
        b = jnp.zeros((layers, cfg.rank, outputs), jnp.float32)
        axes = ("layers", "adapter", "adapter")
        params[name] = (nn.Partitioned(a * inputs**-0.5, axes), nn.Partitioned(b, axes))
    return params


def scale(params: dict, cfg: AdapterConfig) -> dict:
    """The same adapter with b multiplied by alpha / rank, as a forward pass applies it."""
    return {name: (a, b * (cfg.alpha / cfg.rank)) for name, (a, b) in params.items()}


def decode_layout(params: dict, cfg: AdapterConfig) -> dict:
    """Training layout -> decoding layout, scaled."""
    count = len(jax.tree.leaves(params)[0])
    scaled = scale(params, cfg)
    return {
        f"layer_{cfg.first_layer + i}": {name: (a[i], b[i]) for name, (a, b) in scaled.items()} for i in range(count)
    }


def merge_layers(params: dict, adapter: dict) -> dict:
    """Parameters in the decoding layout with an ungated adapter (decoding layout) added to them."""
    return params | {layer: _add_updates(params[layer], factors) for layer, factors in adapter.items()}


def merge(params: dict, adapter: dict, cfg: AdapterConfig) -> dict:
    """Parameters in the training layout with an ungated adapter (training layout) added to them."""
    adapted = slice(cfg.first_layer, None)
    return params | {"layers": _add_updates(params["layers"], scale(adapter, cfg), adapted)}


def _add_updates(layers: dict, factors: dict, adapted: object = ...) -> dict:
    """One layer, or a stack of which the layers `adapted` have factors, with the updates a b added to the weights.

    The sum is rounded once, from float32 to the dtype of the weights.
    """
    merged = {name: dict(module) for name, module in layers.items()}
    for name, (a, b) in factors.items():
        module = merged[_MODULES[name]]
        weight = module[name][adapted]
        update = jnp.einsum("...ir,...ro->...io", a, b, precision="highest").reshape(weight.shape)
        merged_weight = (weight.astype(jnp.float32) + update).astype(weight.dtype)
        module[name] = module[name].at[adapted].set(merged_weight)
    return merged


# --- Files


def compress(adapter: Adapter, rank: int) -> Adapter:
    """The best approximation with a smaller rank: the largest singular values of every update a b."""
    params = {}
    for name, (a, b) in adapter.params.items():
        # With a = Q R and b' = P S, the update is Q (R S') P', so only a matrix [r, r] needs a decomposition.
        q, r = np.linalg.qr(np.asarray(a, np.float64))
        p, s = np.linalg.qr(np.asarray(b, np.float64).swapaxes(1, 2))
        u, values, v = np.linalg.svd(r @ s.swapaxes(1, 2))
        root = np.sqrt(values[:, :rank])
        left, right = q @ u[:, :, :rank] * root[:, None, :], root[:, :, None] * (v[:, :rank] @ p.swapaxes(1, 2))
        params[name] = (left.astype(np.float32), right.astype(np.float32))
    # The update is a b alpha / rank, whatever the rank.
    alpha = adapter.cfg.alpha * rank / adapter.cfg.rank
    return adapter._replace(params=params, cfg=dataclasses.replace(adapter.cfg, rank=rank, alpha=alpha))


def save(adapter: Adapter, directory: Path, base: str, dtype: str = "float32") -> None:
    """Writes the adapter in PEFT's form; `base` is the name of the model."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, factors in adapter.params.items():
        for part, stack in zip("AB", factors, strict=True):
            for i, factor in enumerate(np.asarray(stack).astype(jnp.dtype(dtype))):
                tensors[_tensor(adapter.cfg.first_layer + i, name, part)] = np.ascontiguousarray(factor.T)
    safetensors.numpy.save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    layers = len(jax.tree.leaves(adapter.params)[0])
    first = adapter.cfg.first_layer
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.cfg.rank,
        "lora_alpha": adapter.cfg.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [f"{name}_proj" for name in config.adapter_targets(adapter.cfg)],
        "layers_to_transform": list(range(first, first + layers)),
        "inference_mode": True,
        _GATE: adapter.cfg.gate,
        _TOKEN: adapter.noise_token,
    }
    (directory / CONFIG).write_bytes(json_files.dump(described))


def load(directory: str | Path, model: LlamaConfig, name: str = "--adapter") -> Adapter:
    """Reads an adapter of `model` from a PEFT directory, which messages call the value of `name`, a flag or field.

    Raises:
      InputError: there is none, it is damaged or of another kind, or it does not fit the model.
    """
    path = Path(directory)
    where = f"{name}={path}"
    try:
        described = json_files.loads((path / CONFIG).read_text(encoding="utf-8"))
        tensors = safetensors.numpy.load_file(path / WEIGHTS)
    except FileNotFoundError as error:
        raise InputError(f"{where}: has no {Path(error.filename).name}; name a PEFT directory") from error
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(f"{where}: damaged: {error}") from error
    cfg = _read_config(described, model, where)
    layers = range(cfg.first_layer, model.n_layers)
    expected = shapes(model, cfg)
    params = {}
    for name, (inputs, outputs) in expected.items():
        stacks = []
        for part, shape in (("A", (cfg.rank, inputs)), ("B", (outputs, cfg.rank))):
            names = [_tensor(layer, name, part) for layer in layers]
            found = [tensors.pop(tensor, None) for tensor in names]
            for tensor, value in zip(names, found, strict=True):
                if value is None or value.shape != shape:
                    what = "is missing" if value is None else f"has shape {value.shape}"
                    raise InputError(f"{where}: tensor {tensor} {what}, expected shape {shape} for this model")
            stacks.append(np.stack([value.T for value in found]).astype(np.float32))
        params[name] = tuple(stacks)
    if tensors:
        raise InputError(f"{where}: unknown tensor {min(tensors)}: only LoRA factors of layers are supported")
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
        raise InputError(f"{where}: holds values that are not finite")
    return Adapter(params, cfg, described.get(_TOKEN))


def _read_config(described: dict, model: LlamaConfig, where: str) -> AdapterConfig:
    def refuse(problem: str) -> InputError:
        return InputError(f"{where}: {CONFIG}: {problem}")

    if described.get("peft_type") != "LORA":
        raise refuse(f"peft_type={described.get('peft_type')!r}: must be 'LORA'")
    for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out"):
        if described.get(name):
            raise refuse(f"{name} is not supported")
    modules = described.get("target_modules")
    targets = [str(name).removesuffix("_proj") for name in modules] if isinstance(modules, list) else []
    if not targets or not set(targets) <= set(config.ADAPTER_TARGETS):
        raise refuse(f"target_modules={modules!r}: must be a list of {', '.join(config.ADAPTER_TARGETS)} with '_proj'")
    layers = described.get("layers_to_transform") or list(range(model.n_layers))
    if layers != list(range(layers[0], model.n_layers)):
        raise refuse(f"layers_to_transform={layers}: must be the last layers of the model, which has {model.n_layers}")
    ordered = ",".join(name for name in config.ADAPTER_TARGETS if name in targets)
    token = described.get(_TOKEN)
    if token is not None and (type(token) is not int or not 0 <= token < model.vocab_size):
        raise refuse(f"{_TOKEN}={token!r}: must be a token of the vocabulary")
    gate = described.get(_GATE, "all")
    if gate not in config.ADAPTER_GATES:
        raise refuse(f"{_GATE}={gate!r}: must be one of {', '.join(config.ADAPTER_GATES)}")
    rank, alpha = described.get("r"), described.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float) or alpha <= 0:
        raise refuse(f"r={rank!r}, lora_alpha={alpha!r}: must be positive numbers")
    return dataclasses.replace(
        AdapterConfig(rank, float(alpha)), targets=ordered, first_layer=int(layers[0]), gate=gate
    )


def _tensor(layer: int, name: str, part: str) -> str:
    module = rename(f"layer_{layer}/{_MODULES[name]}/{name}", TO_HUGGING_FACE).removesuffix(".weight")
    return f"{_PREFIX}{module}.lora_{part}.weight"
