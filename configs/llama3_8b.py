"""Llama 3 8B on your own conversations: the paper's general model (arXiv 2406.17404, section 4).

    python -m msn_jax.train --config=configs/llama3_8b.py:msn --workdir=DIR \
        --config.train.init_from=PATH/Meta-Llama-3-8B --config.data.path=conversations.jsonl
    python -m msn_jax.train --config=configs/llama3_8b.py:sft ...      # the control: no noise

Parameters, gradients and both AdamW moments are float32 and take 128 GB; the mesh shards them over all devices
(`fsdp`). Compiled (`benchmarks/compile.py`), a step needs 12.6 GiB on each of 64 v5e chips, 49.2 GiB on each of eight
v5p chips, or 34.9 GiB on each of eight H100 GPUs. This project has not run this config at full size; the tests check
its shapes.
"""

from msn_jax.config import Config, DataConfig, LlamaConfig, MeshConfig, NoiseConfig, OptimConfig, TrainConfig


def get_config(arg: str = "msn") -> Config:
    kinds = {"msn": "ahead", "sft": "none"}
    if arg not in kinds:
        raise ValueError(f"configs/llama3_8b.py has no experiment {arg!r}: choose one of {', '.join(kinds)}")
    return Config(
        model=LlamaConfig(
            vocab_size=128_256,
            d_model=4096,
            n_layers=32,
            n_heads=32,
            n_kv_heads=8,
            head_dim=128,
            d_mlp=14_336,
            max_length=8192,
            rope_theta=500_000.0,
            rope_scaling="none",
            sliding_window=0,
            norm_eps=1e-5,
            qkv_bias=False,
            qk_norm=False,
            tie_embeddings=False,
            dtype="bfloat16",
            param_dtype="float32",
        ),
        data=DataConfig(builder="sft_jsonl", data_dir="runs/data", row_length=4096, batch_size=64, path=""),
        optim=OptimConfig(learning_rate=1e-5, warmup_steps=100),
        train=TrainConfig(steps=3000, eval_every=500, checkpoint_every=500, init_from=""),
        noise=NoiseConfig(kind=kinds[arg], segments=1, length=4),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
