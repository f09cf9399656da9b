"""The paper's grid: length and kind of the noise, against plain fine-tuning; with and without tree and retrieval.

    python -m msn_jax.ablate --config=configs/ablations/paper.py:demo --workdir=DIR
    python -m msn_jax.ablate --config=configs/ablations/paper.py:demo:STEPS:BASE_STEPS:SEEDS --workdir=DIR
    python -m msn_jax.ablate --config=configs/ablations/paper.py:stories:MODEL:STORIES.jsonl --workdir=DIR
    python -m msn_jax.ablate --config=configs/ablations/paper.py:stories:MODEL:STORIES.jsonl:STEPS:SEEDS --workdir=DIR

demo is the demo's code model, trained from one base; MODEL is the Hugging Face directory of stories260k, and a line of
STORIES.jsonl is {"text": STORY} (configs/stories260k.py). By default every run has 120 steps, the base 150, and there
are 3 seeds. As in the paper, each sample has one noise segment; kind 'none' is the control.

All decodings draft to the same depth: `jacobi` from predictions alone, `tr_jacobi` also from retrieval; each as a chain
and as a tree that branches. Their acceptance does not depend on the machine.
"""

import dataclasses

from configs import demo, stories260k
from msn_jax.ablation import Ablation, Decoding, Prompts, Setting, numbers
from msn_jax.config import Config, NoiseConfig
from msn_jax.decode import tree as trees
from msn_jax.decode.tree import JACOBI, RETRIEVAL_OR_JACOBI

DEPTH = 5  # of all trees
LENGTHS = (1, 4, 8)
_BRANCHES = [(0,) * DEPTH, (1, 0), (2,), (3,), (0, 1), (0, 0, 1)]  # paths of ranks

DECODINGS = (
    Decoding("jacobi", trees.chain(JACOBI, DEPTH), "chain"),
    Decoding("jacobi", trees.tr_jacobi_tree(_BRANCHES, retrieval=[]), "branches"),
    Decoding("tr_jacobi", trees.chain(RETRIEVAL_OR_JACOBI, DEPTH, min_match=2), "chain"),
    Decoding("tr_jacobi", trees.tr_jacobi_tree(_BRANCHES, retrieval=[DEPTH]), "branches"),
)


def get_config(arg: str = "demo") -> Ablation:
    experiment, *rest = arg.split(":")
    if experiment == "demo":
        steps, base_steps, seeds = numbers(rest, (120, 150, 3))
        base = demo.get_config("base")
        base.train = dataclasses.replace(base.train, steps=base_steps, checkpoint_every=base_steps)
        return _grid("paper, code", demo.get_config("sft"), steps, seeds, {"base": base})
    if experiment == "stories" and len(rest) >= 2 and all(rest[:2]):
        steps, seeds = numbers(rest[2:], (120, 3))
        cfg = stories260k.get_config("sft")
        cfg.train.init_from, cfg.data.path = rest[:2]
        return _grid("paper, stories", cfg, steps, seeds, {})
    raise ValueError(f"configs/ablations/paper.py:{arg}: must be demo or stories:MODEL:STORIES.jsonl")


def _grid(name: str, cfg: Config, steps: int, seeds: int, bases: dict[str, Config]) -> Ablation:
    noises = {("none", 0): NoiseConfig(kind="none", length=4)}  # the length of the evaluation's noise
    noises |= {(kind, length): NoiseConfig(kind, length=length) for kind in ("ahead", "uniform") for length in LENGTHS}
    data = dataclasses.replace(cfg.data, row_length=256)
    train = dataclasses.replace(cfg.train, steps=steps, log_every=40, eval_batches=16, checkpoint_every=steps)
    settings = tuple(
        Setting(
            {"kind": kind, "length": length},
            dataclasses.replace(cfg, data=data, train=train, noise=noise),
            base=next(iter(bases), ""),
        )
        for (kind, length), noise in noises.items()
    )
    return Ablation(
        name=name,
        factors=("kind", "length"),
        settings=settings,
        seeds=tuple(range(seeds)),
        decodings=DECODINGS,
        prompts=Prompts(count=32),
        max_new_tokens=96,
        batch_size=32,
        bases=bases,
    )
