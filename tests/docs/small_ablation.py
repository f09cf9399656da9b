"""An ablation of one run, a config file in place of the large ones that docs/ names."""

from pathlib import Path

import tiny_config

from msn_jax.ablation import Ablation, Decoding, Prompts, Setting


def get_config() -> Ablation:
    cfg = tiny_config.config_in(Path(), steps=1, log_every=1, eval_batches=1)
    cfg.data.path, cfg.model.n_layers = "my_chats.jsonl", 1
    return Ablation(
        name="small",
        factors=("kind",),
        settings=(Setting({"kind": "ahead"}, cfg),),
        seeds=(0,),
        decodings=(Decoding("jacobi"),),
        prompts=Prompts(count=1),
        max_new_tokens=4,
    )
