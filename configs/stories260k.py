"""stories260k: a real checkpoint of 260,032 parameters that writes short stories, fine-tuned in minutes on a laptop.

    python -m msn_jax.train --config=configs/stories260k.py:msn --workdir=DIR \
        --config.train.init_from=PATH/stories260k --config.data.path=stories.jsonl
    python -m msn_jax.train --config=configs/stories260k.py:sft ...      # the control: no noise

Each line of stories.jsonl is {"text": STORY}. `python -m benchmarks.stories` creates the file from TinyStories, runs
both experiments and measures the models (results in dev/LOG.md).
"""

from msn_jax.config import Config, DataConfig, LlamaConfig, NoiseConfig, OptimConfig, TrainConfig


def get_config(arg: str = "msn") -> Config:
    kinds = {"msn": "ahead", "sft": "none"}
    if arg not in kinds:
        raise ValueError(f"configs/stories260k.py has no experiment {arg!r}: choose one of {', '.join(kinds)}")
    return Config(
        model=LlamaConfig(
            vocab_size=512,
            d_model=64,
            n_layers=5,
            n_heads=8,
            n_kv_heads=4,
            head_dim=8,
            d_mlp=172,
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
        ),
        data=DataConfig(builder="sft_jsonl", data_dir="runs/data", row_length=256, batch_size=8, path=""),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=50, kind="muon", weight_decay=0.0),
        train=TrainConfig(
            steps=600, log_every=50, eval_batches=16, checkpoint_every=300, init_from="", remat=False, unroll=5
        ),
        noise=NoiseConfig(kind=kinds[arg], segments=8, length=4),
    )
