"""Adapters for SmolLM2-135M-Instruct (`make smollm` fetches the model).

    python -m msn_jax.train --config=configs/smollm2.py:gated --workdir=runs/smollm2/gated \
        --config.data.path=own.jsonl      # from `python -m msn_jax.regenerate`
    python -m msn_jax.train --config=configs/smollm2.py:msn ...    # the paper's way: the adapter changes the model

`gated`: active at noise tokens only. The noise is one fixed token, a special token that the model's chats never use, so
nothing in a draft's input misleads the model.
"""

from msn_jax.config import AdapterConfig, Config, DataConfig, LlamaConfig, NoiseConfig, OptimConfig, TrainConfig

_NOISE_TOKEN = 5  # <file_sep>, which marks files in pretraining data


def get_config(arg: str = "gated") -> Config:
    experiments = {"gated": _gated, "msn": _msn}
    if arg not in experiments:
        raise ValueError(f"configs/smollm2.py has no experiment {arg!r}: choose one of {', '.join(experiments)}")
    return experiments[arg]()


def _gated() -> Config:
    return Config(
        model=LlamaConfig(
            vocab_size=49_152,
            d_model=576,
            n_layers=30,
            n_heads=9,
            n_kv_heads=3,
            head_dim=64,
            d_mlp=1536,
            max_length=8192,
            rope_theta=100_000.0,
            rope_scaling="none",
            sliding_window=0,
            norm_eps=1e-5,
            qkv_bias=False,
            qk_norm=False,
            tie_embeddings=True,
            dtype="float32",
            param_dtype="float32",
        ),
        data=DataConfig(builder="sft_jsonl", data_dir="runs/data", row_length=512, batch_size=2),
        optim=OptimConfig(learning_rate=1.5e-3, warmup_steps=20, weight_decay=0.0),
        train=TrainConfig(
            steps=280,
            log_every=5,
            eval_every=70,
            eval_batches=2,
            checkpoint_every=35,
            loss_chunk=1024,
            init_from="models/smollm2_135m_instruct",
            remat=False,
        ),
        noise=NoiseConfig(kind="token", token=_NOISE_TOKEN, blocks=256, length=2, teacher_temperature=0.7),
        adapter=AdapterConfig(rank=32, alpha=32.0),
    )


def _msn() -> Config:
    cfg = _gated()
    cfg.noise = NoiseConfig(kind="ahead", segments=4, length=4)
    cfg.adapter.gate = "all"
    return cfg
