"""Qwen3 (0.6B, 1.7B, 4B, 8B) on your own conversations.

    python -m msn_jax.train --config=configs/qwen3.py:msn-0.6b --workdir=DIR \
        --config.train.init_from=PATH/Qwen3-0.6B --config.data.path=conversations.jsonl
    python -m msn_jax.train --config=configs/qwen3.py:sft-0.6b ...      # the control: no noise

The smallest model needs about 10 GB for parameters, gradients and both AdamW moments in float32, plus activations, and
fits on one GPU or TPU chip. This project has not run these configs at full size; the tests check their shapes.
"""

from msn_jax.config import Config, DataConfig, LlamaConfig, MeshConfig, NoiseConfig, OptimConfig, TrainConfig

_KINDS = {"msn": "ahead", "sft": "none"}
_SIZES = {  # d_model, n_layers, n_heads, d_mlp, tied embeddings
    "0.6b": (1024, 28, 16, 3072, True),
    "1.7b": (2048, 28, 16, 6144, True),
    "4b": (2560, 36, 32, 9728, True),
    "8b": (4096, 36, 32, 12_288, False),
}


def get_config(arg: str = "msn-0.6b") -> Config:
    kind, _, size = arg.partition("-")
    if kind not in _KINDS or size not in _SIZES:
        known = ", ".join(f"{kind}-{size}" for kind in _KINDS for size in _SIZES)
        raise ValueError(f"configs/qwen3.py has no experiment {arg!r}: choose one of {known}")
    return Config(
        model=_model(*_SIZES[size]),
        data=DataConfig(builder="sft_jsonl", data_dir="runs/data", row_length=4096, batch_size=64, path=""),
        optim=OptimConfig(learning_rate=1e-5, warmup_steps=100),
        train=TrainConfig(steps=3000, eval_every=500, checkpoint_every=500, init_from=""),
        noise=NoiseConfig(kind=_KINDS[kind], segments=1, length=4),
        mesh=MeshConfig(data=1, fsdp=-1),
    )


def _model(d_model: int, n_layers: int, n_heads: int, d_mlp: int, tie_embeddings: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=151_936,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=8,
        head_dim=128,
        d_mlp=d_mlp,
        max_length=40_960,
        rope_theta=1_000_000.0,
        rope_scaling="none",
        sliding_window=0,
        norm_eps=1e-6,
        qkv_bias=False,
        qk_norm=True,
        tie_embeddings=tie_embeddings,
        dtype="bfloat16",
        param_dtype="float32",
    )
