"""The whole idea on this machine's own Python library: `make demo` runs these three, then compares their decoding.

    python -m msn_jax.train --config=configs/demo.py:base --workdir=runs/demo/base   # reads source files
    python -m msn_jax.train --config=configs/demo.py:sft --workdir=runs/demo/sft     # writes bodies of functions
    python -m msn_jax.train --config=configs/demo.py:msn --workdir=runs/demo/msn     # the same, with ahead noise

Expected on two CPU cores: about 1, 3 and 5 minutes. `msn` is right behind noise far more often than `sft`
(eval_noise_accuracy), for a slightly higher eval_clean_loss. The README has the figures. The noise stands beside the
text, is dense and learns from the text, because steps are few and what counts is the number of noise tokens seen
(dev/LOG.md).

The model and its vocabulary are small because the floating-point operations that two cores do in minutes buy more from
tokens than from parameters, and because short tokens can be guessed ahead (dev/LOG.md).
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
        optim=OptimConfig(learning_rate=6e-3, warmup_steps=50, kind="muon"),
        train=TrainConfig(steps=130, log_every=25, checkpoint_every=250, remat=False, unroll=4),
        noise=NoiseConfig(kind="none"),
    )


def _sft() -> Config:
    return Config(
        model=_model(),
        data=_data("python_functions"),
        optim=OptimConfig(learning_rate=6e-3, warmup_steps=20, kind="muon"),
        train=TrainConfig(
            steps=1000,
            log_every=25,
            eval_batches=20,
            checkpoint_every=250,
            init_from="runs/demo/base",
            remat=False,
            unroll=4,
        ),
        noise=NoiseConfig(kind="none", length=1),
    )


def _msn() -> Config:
    cfg = _sft()
    cfg.noise = NoiseConfig(
        kind="ahead", blocks=128, length=1, weight=0.2, self_distillation=True, teacher_temperature=0.5
    )
    return cfg


def _data(builder: str) -> DataConfig:
    return DataConfig(builder=builder, data_dir="runs/data", row_length=384, batch_size=8)


def _model() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=384,
        d_model=128,
        n_layers=4,
        n_heads=2,
        n_kv_heads=1,
        head_dim=64,
        d_mlp=352,
        max_length=512,
        rope_theta=10_000.0,
        rope_scaling="none",
        sliding_window=0,
        norm_eps=1e-5,
        qkv_bias=False,
        qk_norm=False,
        tie_embeddings=True,
        dtype="float32",
        param_dtype="float32",
    )
