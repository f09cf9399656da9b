"""A model and a corpus small enough to train within seconds. Also a config file for `--config`."""

import dataclasses
import json
from pathlib import Path

from msn_jax.config import Config, DataConfig, LlamaConfig, NoiseConfig, OptimConfig, TrainConfig


def get_config() -> Config:
    return Config(
        model=LlamaConfig(
            vocab_size=320,
            d_model=16,
            n_layers=2,
            n_heads=2,
            n_kv_heads=1,
            head_dim=8,
            d_mlp=32,
            max_length=64,
            rope_theta=1000.0,
            rope_scaling="none",
            sliding_window=0,
            norm_eps=1e-5,
            qkv_bias=False,
            qk_norm=False,
            tie_embeddings=True,
            dtype="float32",
            param_dtype="float32",
        ),
        data=DataConfig(builder="sft_jsonl", data_dir="data", row_length=32, batch_size=8, path="train.jsonl"),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=5),
        train=TrainConfig(steps=40, log_every=1, eval_batches=2, checkpoint_every=10, loss_chunk=64, remat=False),
        noise=NoiseConfig(segments=2, length=3),
    )


def config_in(directory: Path, **train_fields: object) -> Config:
    """The same config with a curriculum, its data in `directory` and the given fields of `config.train`."""
    cfg = get_config()
    cfg.data.path, cfg.data.data_dir = str(directory / "train.jsonl"), str(directory / "data")
    cfg.train = dataclasses.replace(cfg.train, **train_fields)
    cfg.noise.curriculum_steps = 30
    return cfg


def write_data(path) -> None:
    """Sums in words, one record per line."""
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    pairs = [(a, b) for a in range(13) for b in range(13 - a)]
    records = [
        {"prompt": f"{names[a]} and {names[b]}", "response": f" is {names[a + b]}, {names[a + b]}!"} for a, b in pairs
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
