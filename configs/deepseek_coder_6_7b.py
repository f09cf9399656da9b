"""DeepSeek-Coder 6.7B on your own conversations: the paper's code model (arXiv 2406.17404, section 4).

    python -m msn_jax.train --config=configs/deepseek_coder_6_7b.py:msn --workdir=DIR \
        --config.train.init_from=PATH/deepseek-coder-6.7b-base --config.data.path=conversations.jsonl
    python -m msn_jax.train --config=configs/deepseek_coder_6_7b.py:sft ...      # the control: no noise

A Llama model with linear rope scaling (positions divided by 4). Parameters, gradients and both AdamW moments are
float32 and take 108 GB; the mesh shards them over all devices (`fsdp`). This project has not run this config at full
size; the tests check its shapes.
"""

from msn_jax.config import Config, DataConfig, LlamaConfig, MeshConfig, NoiseConfig, OptimConfig, TrainConfig


def get_config(arg: str = "msn") -> Config:
    kinds = {"msn": "ahead", "sft": "none"}
    if arg not in kinds:
        raise ValueError(f"configs/deepseek_coder_6_7b.py has no experiment {arg!r}: choose one of {', '.join(kinds)}")
    return Config(
        model=LlamaConfig(
            vocab_size=32_256,
            d_model=4096,
            n_layers=32,
            n_heads=32,
            n_kv_heads=32,
            head_dim=128,
            d_mlp=11_008,
            max_length=16_384,
            rope_theta=100_000.0,
            rope_scaling="linear",
            rope_factor=4.0,
            sliding_window=0,
            norm_eps=1e-6,
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
