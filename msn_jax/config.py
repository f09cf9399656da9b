"""All settings of the project, typed. Files in `configs/` return a `Config`.

The classes are plain data: nothing here imports JAX. They are mutable only so that flags such as
`--config.train.steps=10` can set a field before the program starts; after that they are constant.
Constants that change the mathematics (theta, eps, ...) have no defaults: with a default in a helper, a
checkpoint's own value is easily lost.
"""

import dataclasses
import math

from msn_jax.cli import InputError

DTYPES = ("float32", "bfloat16", "float16")
NOISE_KINDS = ("ahead", "uniform", "token", "drafts")  # or 'none'
ADAPTER_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
ADAPTER_GATES = ("all", "noise")
OPTIMIZERS = ("adamw", "muon")
ROPE_SCALINGS = ("none", "linear", "llama3")
ON_BAD_RECORD = ("stop", "skip")

# Fields that may change when a run is resumed; with any other change it would be a different run. Some of them affect
# the result: `steps` changes the remaining learning rates; `mesh`, `loss_chunk`, `remat` and `unroll` change rounding.
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


@dataclasses.dataclass(unsafe_hash=True)
class LlamaConfig:
    """Shape and numerics of a Llama-family model. Hashable, because it is a static argument of compiled programs."""

    vocab_size: int  # V
    d_model: int  # D
    n_layers: int  # L
    n_heads: int  # N, query heads
    n_kv_heads: int  # K, divides n_heads
    head_dim: int  # H, even
    d_mlp: int  # F
    max_length: int  # context: the longest sequence of prompt and output, in tokens
    rope_theta: float
    rope_scaling: str  # 'none', 'linear' (DeepSeek-Coder) or 'llama3' (Llama 3.1); see `rope.inverse_frequencies`
    sliding_window: int  # distance in positions below which a query attends to a key (Mistral); 0: no limit
    norm_eps: float
    qkv_bias: bool  # Qwen2
    qk_norm: bool  # RMSNorm of every query and key head, before the rotary embedding (Qwen3)
    tie_embeddings: bool
    dtype: str  # of the computation, one of `DTYPES`; softmax, norms, rope and losses are always float32
    param_dtype: str  # of the stored parameters
    # Constants of the rope scaling. 0 means "not given": required where `rope_scaling` does not use the constant.
    rope_factor: float = 0.0  # linear, llama3: factor by which the context was extended
    rope_low_frequency_factor: float = 0.0  # llama3
    rope_high_frequency_factor: float = 0.0  # llama3
    rope_original_length: int = 0  # llama3: the context before the scaling, in tokens


@dataclasses.dataclass(unsafe_hash=True)
class NoiseConfig:
    """The noise of the training inputs (`noise.py`, paper section 3.1). The defaults are the paper's."""

    # 'ahead': tokens from the sample's own past; 'uniform': from the vocabulary; with blocks only, 'token': always
    # `token`, and 'drafts': the model's own (`redraft.py`). Several, separated by commas: every segment or block draws
    # one of them. 'none': plain SFT.
    kind: str = "ahead"
    segments: int = 1  # segments per sample
    length: int = 4  # tokens per segment
    blocks: int = 0  # above 0: noise blocks appended to each row, which itself stays clean; replaces the segments
    weight: float = 1.0  # of the loss at noise tokens, relative to clean tokens
    # With blocks: the targets are the model's own predictions from clean context, instead of the labels.
    self_distillation: bool = False
    teacher_temperature: float = 1.0  # of these targets; below 1, closer to the one token that a draft must match
    token: int = 0  # the noise of kind 'token'
    curriculum_steps: int = 0  # the offsets that count grow from 1 to `length` over so many steps; 0: all count
    # With a gated adapter: the loss at offset l counts by the chance that the drafts at offsets 1..l-1 were accepted.
    acceptance_weights: bool = True
    # With a gated adapter: the targets are the labels, instead of the model's own predictions, which drafts must match.
    label_targets: bool = False


@dataclasses.dataclass(unsafe_hash=True)
class AdapterConfig:
    """A LoRA adapter (arXiv 2106.09685) that is trained instead of the model (`adapter.py`)."""

    rank: int = 0  # 0: no adapter, all parameters are trained
    alpha: float = 32.0  # the update of a weight is a b alpha / rank
    targets: str = "q,k,v,o,gate,up,down"  # the adapted matrices, some of `ADAPTER_TARGETS`
    first_layer: int = 0  # the lowest adapted layer; with a higher one, training is cheaper
    # 'noise': active at noise tokens only, so that the model's own text does not change; 'all': at every token.
    gate: str = "noise"
    init_from: str = ""  # the adapter to start from, a PEFT directory; '' starts from one that changes nothing


@dataclasses.dataclass
class DataConfig:
    """The training data and its batches."""

    builder: str  # 'python_functions', 'python_files' or 'sft_jsonl'
    data_dir: str  # directory for prepared datasets, which later runs reuse
    row_length: int  # T: tokens per packed row
    batch_size: int  # B: rows per step over all processes
    path: str = ""  # sft_jsonl: the .json or .jsonl file
    # SentencePiece model; '' takes the tokenizer of `train.init_from`, or trains one on the data
    tokenizer: str = ""
    # sft_jsonl: a record that cannot be used ends the run ('stop') or is skipped, up to 5% of the records ('skip')
    on_bad_record: str = "stop"
    # Special tokens in the contents of messages count as these tokens, as in transformers, instead of as plain text.
    parse_special_tokens: bool = False


@dataclasses.dataclass
class OptimConfig:
    """The optimizer, with linear warm-up and cosine decay."""

    learning_rate: float  # peak
    warmup_steps: int
    kind: str = "adamw"  # or 'muon', which learns more in few steps
    final_fraction: float = 0.1  # of the peak, at the last step
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.1  # on matrices only
    clip_norm: float = 1.0


@dataclasses.dataclass
class TrainConfig:
    """Length, start, reports and checkpoints of a run."""

    steps: int
    seed: int = 0
    init_from: str = ""  # the model to start from (`pretrained.py`); '' starts from random parameters
    log_every: int = 20  # steps
    eval_every: int = 0  # steps; 0 evaluates after the last step only
    eval_batches: int = 8
    checkpoint_every: int = 200  # steps; the last step is always saved
    keep_checkpoints: int = 2
    loss_chunk: int = 2048  # tokens whose logits exist at a time: per device, with a gated adapter on all devices
    remat: bool = True  # recompute each layer's activations in the backward pass
    unroll: int = 1  # layers per iteration of the layer scan: a few are faster on a CPU, but take longer to compile


@dataclasses.dataclass
class MeshConfig:
    """Devices per mesh axis; -1 takes the remaining devices."""

    data: int = -1  # shards the batch
    fsdp: int = 1  # shards the batch and the parameters
    tensor: int = 1  # shards heads, mlp and vocabulary


@dataclasses.dataclass
class Config:
    """One experiment."""

    model: LlamaConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    noise: NoiseConfig = dataclasses.field(default_factory=NoiseConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)


def to_dict(cfg: Config) -> dict:
    """A nested dictionary, as stored with every checkpoint."""
    return dataclasses.asdict(cfg)


def from_dict(tree: dict) -> Config:
    """Inverse of `to_dict`. Raises TypeError for an unknown field, and for a missing one that has no default."""
    types = {field.name: field.type for field in dataclasses.fields(Config)}
    return Config(**{name: types[name](**part) if name in types else part for name, part in tree.items()})


ROPE_CONSTANTS = {  # the constants that each kind of scaling needs
    "none": (),
    "linear": ("rope_factor",),
    "llama3": ("rope_factor", "rope_low_frequency_factor", "rope_high_frequency_factor", "rope_original_length"),
}
_SMALLEST, _LARGEST = 2.0**-126, 2.0**127 * (2 - 2.0**-23)  # of float32, denormals excluded
_AT_LEAST_1 = {
    "model": ("vocab_size", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_mlp", "max_length"),
    "data": ("row_length", "batch_size"),
    "train": ("steps", "log_every", "eval_batches", "checkpoint_every", "keep_checkpoints", "loss_chunk", "unroll"),
    "noise": ("length",),  # also for SFT, which is evaluated with noise of this length
}


def check(cfg: Config) -> None:
    """Checks all values before any work, except the mesh, which `sharding.make_mesh` checks.

    Raises:
      InputError: names the first invalid field, its value and the allowed values.
    """
    check_model(cfg.model)
    for section in dataclasses.fields(cfg):
        _check_types(section.name, getattr(cfg, section.name))

    model, data, optim, train = cfg.model, cfg.data, cfg.optim, cfg.train
    _require(
        data.row_length <= model.max_length,
        "data.row_length",
        data.row_length,
        f"at most config.model.max_length={model.max_length}",
    )
    _require(
        data.on_bad_record in ON_BAD_RECORD,
        "data.on_bad_record",
        data.on_bad_record,
        "one of " + ", ".join(ON_BAD_RECORD),
    )
    _require(optim.kind in OPTIMIZERS, "optim.kind", optim.kind, "one of " + ", ".join(OPTIMIZERS))
    for name in ("learning_rate", "clip_norm"):
        _require(getattr(optim, name) > 0, f"optim.{name}", getattr(optim, name), "above 0")
    for name in ("warmup_steps", "weight_decay"):
        _require(getattr(optim, name) >= 0, f"optim.{name}", getattr(optim, name), "0 or more")
    for name in ("b1", "b2"):
        _require(0 <= getattr(optim, name) < 1, f"optim.{name}", getattr(optim, name), "0 or more and below 1")
    _require(0 <= optim.final_fraction <= 1, "optim.final_fraction", optim.final_fraction, "from 0 to 1")
    _require(train.eval_every >= 0, "train.eval_every", train.eval_every, "0 (at the end only) or more")
    _require(train.seed >= 0, "train.seed", train.seed, "from 0 to 2**31 - 1")
    _check_noise(cfg)
    _check_adapter(cfg)


def noise_kinds(noise: NoiseConfig) -> tuple[str, ...]:
    """The kinds of noise that are mixed."""
    return tuple(name.strip() for name in noise.kind.split(","))


def noise_token(noise: NoiseConfig) -> int | None:
    """The token that an adapter trained with this noise drafts after, if one of its kinds is 'token'; else None."""
    return noise.token if "token" in noise_kinds(noise) else None


def adapter_targets(adapter: AdapterConfig) -> tuple[str, ...]:
    """The names of the adapted matrices."""
    return tuple(name.strip() for name in adapter.targets.split(","))


def _check_noise(cfg: Config) -> None:
    model, data, noise = cfg.model, cfg.data, cfg.noise
    kinds = noise_kinds(noise)
    is_known = all(kind in NOISE_KINDS for kind in kinds) and len(set(kinds)) == len(kinds)
    expected = f"'none' or some of {','.join(NOISE_KINDS)}, separated by commas"
    _require(is_known or noise.kind == "none", "noise.kind", noise.kind, expected)
    fits = "drafts" not in kinds or noise.blocks > 0
    _require(fits, "noise.kind", noise.kind, "without 'drafts', which need config.noise.blocks above 0")
    _require(
        noise.length < data.row_length,
        "noise.length",
        noise.length,
        f"below config.data.row_length={data.row_length}",
    )
    _require(
        noise.blocks >= 0, "noise.blocks", noise.blocks, "0 for segments in the row, or a number of blocks per row"
    )
    _require(
        noise.blocks > 0 or not noise.self_distillation,
        "noise.self_distillation",
        noise.self_distillation,
        "False without config.noise.blocks",
    )
    _require(noise.teacher_temperature > 0, "noise.teacher_temperature", noise.teacher_temperature, "above 0")
    _require(
        "token" not in kinds or (noise.blocks > 0 and 0 <= noise.token < model.vocab_size),
        "noise.token",
        noise.token,
        "a token of the vocabulary, with config.noise.blocks above 0",
    )
    _require("drafts" not in kinds or noise.length > 1, "noise.length", noise.length, "at least 2 with 'drafts'")
    _require(noise.curriculum_steps >= 0, "noise.curriculum_steps", noise.curriculum_steps, "0 (none) or more")
    has_noise = noise.kind != "none"
    _require(
        has_noise or noise.curriculum_steps == 0,
        "noise.curriculum_steps",
        noise.curriculum_steps,
        "0 with config.noise.kind='none'",
    )
    is_gated = cfg.adapter.rank > 0 and cfg.adapter.gate == "noise"
    _require(is_gated or not noise.label_targets, "noise.label_targets", True, "False without a gated adapter")
    _require(0 < noise.weight < math.inf, "noise.weight", noise.weight, "a positive number")
    _require(not has_noise or noise.segments >= 1, "noise.segments", noise.segments, "at least 1")


def _check_adapter(cfg: Config) -> None:
    adapter = cfg.adapter
    _require(adapter.rank >= 0, "adapter.rank", adapter.rank, "0 (no adapter) or more")
    if adapter.rank == 0:
        _require(not adapter.init_from, "adapter.init_from", adapter.init_from, "'' while config.adapter.rank is 0")
        return
    names = adapter_targets(adapter)
    is_known = all(name in ADAPTER_TARGETS for name in names) and len(set(names)) == len(names)
    _require(is_known, "adapter.targets", adapter.targets, f"some of {','.join(ADAPTER_TARGETS)}, separated by commas")
    _require(adapter.alpha > 0, "adapter.alpha", adapter.alpha, "above 0")
    last = cfg.model.n_layers - 1
    _require(0 <= adapter.first_layer <= last, "adapter.first_layer", adapter.first_layer, f"from 0 to {last}")
    _require(adapter.gate in ADAPTER_GATES, "adapter.gate", adapter.gate, "one of " + ", ".join(ADAPTER_GATES))
    _require(
        adapter.gate == "all" or (cfg.noise.blocks > 0 and cfg.noise.kind != "none"),
        "adapter.gate",
        adapter.gate,
        "'all' without noise blocks (config.noise.blocks)",
    )
    _require(bool(cfg.train.init_from), "train.init_from", cfg.train.init_from, "a model to adapt")
    _require(cfg.optim.kind == "adamw", "optim.kind", cfg.optim.kind, "'adamw' with an adapter")


def check_model(model: LlamaConfig) -> None:
    """The part of `check` that concerns the model."""
    _check_types("model", model)
    divides = model.n_heads % model.n_kv_heads == 0
    _require(divides, "model.n_kv_heads", model.n_kv_heads, f"a divisor of config.model.n_heads={model.n_heads}")
    _require(model.head_dim % 2 == 0, "model.head_dim", model.head_dim, "even")
    _require(model.sliding_window >= 0, "model.sliding_window", model.sliding_window, "0 (none) or more")
    for name, choices in (("dtype", DTYPES), ("param_dtype", DTYPES), ("rope_scaling", ROPE_SCALINGS)):
        value = getattr(model, name)
        _require(value in choices, f"model.{name}", value, "one of " + ", ".join(choices))
    for name in ("rope_theta", "norm_eps"):
        _require(getattr(model, name) > 0, f"model.{name}", getattr(model, name), "above 0")
    for name in ROPE_CONSTANTS["llama3"]:
        value, used = getattr(model, name), name in ROPE_CONSTANTS[model.rope_scaling]
        expected = f"{'above' if used else 'left at'} 0, because config.model.rope_scaling={model.rope_scaling!r}"
        _require(value > 0 if used else value == 0, f"model.{name}", value, expected)
    low, high = model.rope_low_frequency_factor, model.rope_high_frequency_factor
    expected = f"above config.model.rope_low_frequency_factor={low!r}"
    _require(low == high == 0 or low < high, "model.rope_high_frequency_factor", high, expected)


def check_resume(stored: dict, cfg: Config, workdir: object) -> None:
    """Refuses to resume a run with a config that would have given a different run.

    A field that the stored config does not have yet, because an earlier version wrote it, counts as its default.

    Raises:
      InputError: a field differs; the message has the first such field and both values.
    """
    old, new = _defaults(cfg) | _flatten(stored), _flatten(to_dict(cfg))
    for field in sorted(old.keys() | new.keys()):
        if field not in _FREE_FIELDS and old.get(field) != new.get(field):
            raise InputError(
                f"{workdir}: belongs to a run with config.{field}={old.get(field)!r}, this one has "
                f"{new.get(field)!r}; choose another --workdir"
            )


def _check_types(section: str, part: object) -> None:
    for field in dataclasses.fields(part):
        value, types = getattr(part, field.name), (int, float) if field.type is float else field.type
        name = f"{section}.{field.name}"
        _require(isinstance(value, types), name, value, f"of type {field.type.__name__}")
        if type(value) is int:
            _require(abs(value) < 2**31, name, value, "an integer of 32 bits")
        if type(value) is float:
            _require(math.isfinite(value), name, value, "finite")
            _require(
                value == 0 or _SMALLEST <= abs(value) <= _LARGEST, name, value, "a number that float32 can represent"
            )
        if field.name in _AT_LEAST_1.get(section, ()):
            _require(value >= 1, name, value, "at least 1")


def _require(condition: bool, field: str, value: object, expected: str) -> None:
    if not condition:
        raise InputError(f"config.{field}={value!r}: must be {expected}")


def _defaults(cfg: Config) -> dict:
    """The default of every field that has one, by `section.field`."""
    sections = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}
    return {
        f"{name}.{field.name}": field.default
        for name, section in sections.items()
        if dataclasses.is_dataclass(section)
        for field in dataclasses.fields(section)
        if field.default is not dataclasses.MISSING
    }


def _flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in tree.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
