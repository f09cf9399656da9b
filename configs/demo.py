"""The demo's three training runs, on the interpreter's own standard library: `make demo` runs them all.

    python -m msn_jax.train --config=configs/demo.py:base --workdir=runs/demo/base   # pretraining on source files
    python -m msn_jax.train --config=configs/demo.py:sft --workdir=runs/demo/sft     # fine-tuning on function bodies
    python -m msn_jax.train --config=configs/demo.py:msn --workdir=runs/demo/msn     # the same, with ahead noise

Expected time on two CPU cores: about 1, 3 and 5 minutes. `make demo` runs as many steps of `sft` and `msn` as fit into
its time limit. Draft accuracy (eval_noise_accuracy) of `msn` is far higher than for `sft`, at a slightly higher
eval_clean_loss; the README has the figures. The `msn` run appends many noise blocks to each row and trains them with
self-distillation: it takes few steps, and draft accuracy depends on the number of noise tokens seen in training
(dev/LOG.md).

The model is small because, with the compute of two cores and a few minutes, more training tokens help more than more
parameters. The vocabulary is small because short tokens are easier to predict ahead (dev/LOG.md).
"""

from msn_jax.config import Config, DataConfig, LlamaConfig, NoiseConfig, OptimConfig, TrainConfig


def get_config(arg: str = "msn") -> Config:
    stages = {"base": _base, "sft": _sft, "msn": _msn}
    if arg not in stages:
        raise ValueError(f"configs/demo.py has no experiment {arg!r}: choose one of {', '.join(stages)}")
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
