"""The whole idea on this machine's own Python library, in minutes on two CPU cores.

    python -m msn_jax.train --config=configs/demo.py:base --workdir=runs/demo/base   # a small model of Python, 2 min
    python -m msn_jax.train --config=configs/demo.py:sft --workdir=runs/demo/sft     # writes bodies of functions, 1 min
    python -m msn_jax.train --config=configs/demo.py:msn --workdir=runs/demo/msn     # the same, with ahead noise, 1 min

Expected: sft and msn end with about the same eval_clean_loss (see README), and msn has a several times higher
eval_noise_accuracy at offset 1, which is what it can draft for itself.
"""

from msn_jax.config import Config, DataConfig, LlamaConfig, NoiseConfig, OptimConfig, TrainConfig


def get_config(arg: str = "msn") -> Config:
    stages = {"base": _base, "sft": _sft, "msn": _msn}
    if arg not in stages:
        raise ValueError(f"configs/demo.py has no experiment {arg!r}: take one of {', '.join(stages)}")
    return stages[arg]()


def _base() -> Config:
    return Config(
        model=_model(),
        data=_data("python_files"),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=30),
        train=TrainConfig(steps=300, remat=False),
        noise=NoiseConfig(kind="none"),
    )


def _sft() -> Config:
    return Config(
        model=_model(),
        data=_data("python_functions"),
        optim=OptimConfig(learning_rate=5e-4, warmup_steps=15),
        train=TrainConfig(steps=150, init_from="runs/demo/base", remat=False),
        noise=NoiseConfig(kind="none"),
    )


def _msn() -> Config:
    cfg = _sft()
    cfg.noise = NoiseConfig(kind="ahead", segments=3, length=4)
    return cfg


def _data(builder: str) -> DataConfig:
    return DataConfig(builder=builder, data_dir="runs/data", row_length=256, batch_size=16)


def _model() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=1024,
        d_model=192,
        n_layers=4,
        n_heads=6,
        n_kv_heads=2,
        head_dim=32,
        d_mlp=512,
        max_length=512,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
        dtype="float32",
        param_dtype="float32",
    )
