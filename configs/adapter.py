"""LoRA adapters for any published model of our families, trained on its own answers or on your data.

    python -m msn_jax.regenerate --model=MODEL --data=chats.jsonl --output=own.jsonl
    python -m msn_jax.train --config=configs/adapter.py:gated:MODEL --workdir=runs/own --config.data.path=own.jsonl
    python -m msn_jax.train --config=configs/adapter.py:msn:MODEL --workdir=runs/msn --config.data.path=chats.jsonl

MODEL is a Hugging Face directory, a training workdir, FILE.gguf, or OWNER/NAME on the Hub. It gives the model config.

`gated`: active at noise tokens only, so the model keeps its text. The noise is one fixed special token that the
model's chats never use, so nothing in a draft's input misleads the model; without such a token, it is ahead noise.
`msn`: the paper's way. The adapter is active at every token and changes the model; see `noise.py`.
"""

from msn_jax import pretrained
from msn_jax.config import AdapterConfig, Config, DataConfig, NoiseConfig, OptimConfig, TrainConfig
from msn_jax.data import tokenizer as tokenizers


def get_config(arg: str) -> Config:
    experiment, _, model = arg.partition(":")
    experiments = {"gated": _gated, "msn": _msn}
    if experiment not in experiments or not model:
        raise ValueError(f"configs/adapter.py:{arg}: must be configs/adapter.py:gated:MODEL or :msn:MODEL")
    return experiments[experiment](model)


def _gated(model: str) -> Config:
    cfg = pretrained.read_config(model)
    token = _unused_special_token(model)
    kind = {"kind": "ahead"} if token is None else {"kind": "token", "token": token}
    return Config(
        model=cfg,
        data=DataConfig(builder="sft_jsonl", data_dir="runs/data", row_length=min(512, cfg.max_length), batch_size=2),
        optim=OptimConfig(learning_rate=1.5e-3, warmup_steps=20, weight_decay=0.0),
        train=TrainConfig(
            steps=280,
            log_every=5,
            eval_every=70,
            eval_batches=2,
            checkpoint_every=35,
            loss_chunk=1024,
            init_from=model,
            remat=False,
        ),
        noise=NoiseConfig(blocks=256, length=2, teacher_temperature=0.7, **kind),
        # Its gradients and AdamW's state take 4.5% of those of all parameters of SmolLM2-135M; rank 32 takes 7.3%.
        adapter=AdapterConfig(rank=20, alpha=20.0),
    )


def _msn(model: str) -> Config:
    cfg = _gated(model)
    cfg.noise = NoiseConfig(kind="ahead", segments=4, length=4)
    cfg.adapter.gate = "all"
    return cfg


def _unused_special_token(model: str) -> int | None:
    """The first special token without a role: not BOS, EOS, UNK or PAD, no stop token, not in the chat template."""
    tokenizer = tokenizers.load(pretrained.directory(model))
    template = tokenizer.template
    source, named = ("", ()) if template is None else (template.source, dict(template.special_tokens).values())
    unused = [text for text in tokenizer.special_tokens if text not in source and text not in named]
    ids = [tokenizer.encode(text, start=False) for text in unused]
    reserved = {*tokenizer.start_ids, *tokenizer.stop_ids, tokenizer.eos_id}
    return min((one[0] for one in ids if len(one) == 1 and one[0] not in reserved), default=None)
