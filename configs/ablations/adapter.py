"""One row of the paper's grid on a real chat model, with LoRA adapters, and what matters for gated ones.

    python -m msn_jax.ablate --config=configs/ablations/adapter.py:MODEL:DATA.jsonl:PROMPTS.jsonl --workdir=DIR
    python -m msn_jax.ablate --config=configs/ablations/adapter.py:MODEL:DATA.jsonl:PROMPTS.jsonl:STEPS[:SEEDS] ...

MODEL as in configs/adapter.py, DATA.jsonl for training (5% are held out), best written by the model itself
(`msn_jax.regenerate`); PROMPTS.jsonl as for `generate`. STEPS per run, default 60; SEEDS, default 3.

sft, msn: an adapter that is active at every token changes the model's text; clean loss is the price of the noise.
gated: active at noise only, so clean loss is that of the model. `labels`: the drafts learn the data instead of the
model's own predictions. `unweighted`: a draft counts fully even where the drafts before it are wrong.
"""

import dataclasses

from configs import adapter as adapters
from msn_jax.ablation import Ablation, Decoding, Prompts, Setting, numbers
from msn_jax.config import Config, NoiseConfig

_BLOCKS = 128  # noise blocks per row


def get_config(arg: str) -> Ablation:
    model, data, prompts, *rest = [*arg.split(":"), "", ""]
    if not (model and data and prompts):
        raise ValueError(f"configs/ablations/adapter.py:{arg}: must be MODEL:DATA.jsonl:PROMPTS.jsonl[:STEPS[:SEEDS]]")
    steps, seeds = numbers(rest[:-2], (60, 3))
    trainings = {
        "sft": _config("msn", model, noise=NoiseConfig(kind="none", length=4)),
        "msn, 1 segment": _config("msn", model, segments=1),
        "msn, 4 segments": _config("msn", model, segments=4),
        "gated": _config("gated", model, blocks=_BLOCKS),
        "gated, labels": _config("gated", model, blocks=_BLOCKS, label_targets=True),
        "gated, unweighted": _config("gated", model, blocks=_BLOCKS, acceptance_weights=False),
    }
    for cfg in trainings.values():
        cfg.data = dataclasses.replace(
            cfg.data, path=data, row_length=min(256, cfg.model.max_length), batch_size=2, on_bad_record="skip"
        )
        cfg.optim = dataclasses.replace(cfg.optim, warmup_steps=min(cfg.optim.warmup_steps, steps // 3))
        cfg.train = dataclasses.replace(
            cfg.train, steps=steps, log_every=10, eval_every=0, eval_batches=8, checkpoint_every=steps
        )
    return Ablation(
        name="adapter",
        factors=("training",),
        settings=tuple(Setting({"training": name}, cfg) for name, cfg in trainings.items()),
        seeds=tuple(range(seeds)),
        decodings=(Decoding("jacobi"), Decoding("tr_jacobi")),
        prompts=Prompts(prompts),
        max_new_tokens=96,
    )


def _config(experiment: str, model: str, noise: NoiseConfig | None = None, **fields: object) -> Config:
    """The experiment of configs/adapter.py with other noise, or with these fields of its noise."""
    cfg = adapters.get_config(f"{experiment}:{model}")
    cfg.noise = dataclasses.replace(cfg.noise, **fields) if noise is None else noise
    return cfg
