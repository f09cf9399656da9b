r"""Open questions about the idea, each a grid.

    python -m msn_jax.ablate --config=configs/ablations/questions.py:domains:STORIES.jsonl:MATHS.jsonl --workdir=DIR
    python -m msn_jax.ablate --config=configs/ablations/questions.py:decoders:MODEL:STORIES.jsonl --workdir=DIR
    python -m msn_jax.ablate --config=configs/ablations/questions.py:long_texts:MODEL:PROMPTS.jsonl[:ADAPTER] ...

domains     which noise length suits prose (stories), code (the demo's corpus) and maths (GSM8K)? One base per domain,
            of the demo's shape. Optional numbers: STEPS (120), BASE_STEPS (150), SEEDS (3).
decoders    which decoders profit from the training: also prompt lookup, and a draft model with the tuned model on
            either side? MODEL is the Hugging Face directory of stories260k. Optional: STEPS (120), SEEDS (3).
long_texts  how does acceptance change with the length of the output? Decodes only, with MODEL as it is.

The files, from TinyStories and GSM8K:

    jq -Rcs 'split("<|endoftext|>")[] | gsub("^\\s+|\\s+$"; "") | select(. != "") | {text: .}' tinystories.txt
    jq -c '{prompt: "Question: \(.question)\nAnswer:", response: " \(.answer)"}' train.jsonl
"""

import dataclasses

from configs import demo, stories260k
from configs.ablations import paper
from msn_jax.ablation import OWN, Ablation, Decoding, Prompts, Setting, numbers
from msn_jax.config import NoiseConfig
from msn_jax.decode import tree as trees
from msn_jax.decode.tree import JACOBI

_LIMITS = (64, 256, 1024)  # new tokens, of long_texts


def get_config(arg: str) -> Ablation:
    question, *rest = arg.split(":")
    questions = {"domains": _domains, "decoders": _decoders, "long_texts": _long_texts}
    if question not in questions or len(rest) < 2 or not all(rest[:2]):
        raise ValueError(
            f"configs/ablations/questions.py:{arg}: must be domains:STORIES.jsonl:MATHS.jsonl, "
            "decoders:MODEL:STORIES.jsonl or long_texts:MODEL:PROMPTS.jsonl"
        )
    return questions[question](*rest[:2], rest[2:])


def _domains(stories: str, maths: str, rest: list[str]) -> Ablation:
    steps, base_steps, seeds = numbers(rest, (120, 150, 3))
    paths = {"prose": stories, "code": "", "maths": maths}
    bases, settings = {}, []
    for domain, path in paths.items():
        base, cfg = demo.get_config("base"), demo.get_config("sft")
        base.train = dataclasses.replace(base.train, steps=base_steps, checkpoint_every=base_steps)
        cfg.train = dataclasses.replace(cfg.train, steps=steps, log_every=40, eval_batches=16, checkpoint_every=steps)
        for one in (base, cfg) if path else ():
            one.data = dataclasses.replace(one.data, builder="sft_jsonl", path=path)
        bases[f"base-{domain}"] = base
        for length in (0, *paper.LENGTHS):
            noise = NoiseConfig("ahead" if length else "none", length=length or max(paper.LENGTHS))
            factors = {"domain": domain, "length": length}
            settings.append(Setting(factors, dataclasses.replace(cfg, noise=noise), base=f"base-{domain}"))
    return Ablation(
        name="noise length by domain",
        factors=("domain", "length"),
        settings=tuple(settings),
        seeds=tuple(range(seeds)),
        decodings=tuple(one for one in paper.DECODINGS if one.tree_name == "chain"),
        prompts=Prompts(count=32),
        max_new_tokens=96,
        batch_size=32,
        bases=bases,
    )


def _decoders(model: str, stories: str, rest: list[str]) -> Ablation:
    steps, seeds = numbers(rest, (120, 3))
    settings = []
    for training in ("sft", "msn"):
        cfg = stories260k.get_config(training)
        cfg.data.path = stories
        train = {"steps": steps, "log_every": 40, "checkpoint_every": steps, "init_from": model}
        cfg.train = dataclasses.replace(cfg.train, **train)
        settings.append(Setting({"training": training}, cfg))
    depth = {"tree": trees.chain(JACOBI, 4), "tree_name": "chain"}
    return Ablation(
        name="decoders",
        factors=("training",),
        settings=tuple(settings),
        seeds=tuple(range(seeds)),
        decodings=(
            Decoding("autoregressive"),
            Decoding("prompt_lookup"),
            Decoding("jacobi", **depth),
            Decoding("tr_jacobi"),
            Decoding("draft_model", **depth, name="draft_model: original drafts for tuned", draft=model),
            Decoding("draft_model", **depth, name="draft_model: tuned drafts for original", model=model, draft=OWN),
        ),
        prompts=Prompts(count=32),
        max_new_tokens=128,
        batch_size=16,
    )


def _long_texts(model: str, prompts: str, rest: list[str]) -> Ablation:
    if len(rest) > 1:
        raise ValueError(f"{':'.join(rest)!r}: expected the directory of an adapter, or nothing")
    return Ablation(
        name="long texts",
        factors=("max_new_tokens",),
        settings=tuple(
            Setting({"max_new_tokens": limit}, model=model, adapter=rest[0] if rest else "", max_new_tokens=limit)
            for limit in _LIMITS
        ),
        seeds=(0,),
        decodings=(Decoding("jacobi"), Decoding("prompt_lookup"), Decoding("tr_jacobi")),
        prompts=Prompts(prompts, count=16),
        max_new_tokens=max(_LIMITS),
        batch_size=4,
    )
