"""A real checkpoint through the whole path: parity with transformers, fine-tuning with and without noise, export.

    python -m benchmarks.stories --model=PATH/stories260k --stories=PATH/tinystories.txt --workdir=runs/stories

Trains `configs/stories260k.py:sft` and `:msn` with the commands that users type, exports both, and measures for the
original and the two: clean loss on the first 200 stories (held out from training), tokens a pass and exactness of every
decoder on the openings of as many stories as `--prompts` says. Where torch and transformers are installed (extra
`peers`) it also compares, for all three directories, the loss and the greedy text with theirs.

Writes WORKDIR/stories.json and prints it as a table.
"""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from rich.progress import track

from msn_jax import cli, convert, llama, masks
from msn_jax.cli import InputError
from msn_jax.decode import drafters, engine
from msn_jax.decode.engine import Model

_HELD_OUT = 200  # stories
_PADDED = 512  # tokens a story is read with at most
_SEPARATOR = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured of one model."""

    model: str
    clean_loss: float  # nats per token on the held-out stories, BOS given
    transformers_loss: float | None
    transformers_same_text: float | None  # share of the prompts with the same greedy tokens
    mean_accepted_tokens: dict[str, float]  # by decoder
    exact_share: dict[str, float]


def read_stories(path: str) -> list[str]:
    """The stories of a text file. InputError if there are too few to hold 200 out."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"--stories={path}: cannot read it: {error.strerror}") from error
    stories = [story.strip() for story in text.split(_SEPARATOR) if story.strip()]
    if len(stories) <= _HELD_OUT:
        raise InputError(f"--stories={path}: {len(stories)} stories between {_SEPARATOR}: more than 200 are needed")
    return stories


def finetune(kind: str, model: str, stories: Sequence[str], workdir: Path, steps: int | None) -> Path:
    """Trains with the program and exports. Returns the Hugging Face directory; one that exists is taken as it is."""
    exported = workdir / f"{kind}-export"
    if exported.exists():
        return exported
    data = workdir / "stories.jsonl"
    data.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories), encoding="utf-8")
    command = [sys.executable, "-m", "msn_jax.train", f"--config=configs/stories260k.py:{kind}"]
    command += [f"--workdir={workdir / kind}", f"--config.train.init_from={model}", f"--config.data.path={data}"]
    command += [f"--config.data.data_dir={workdir / 'data'}"]
    command += [] if steps is None else [f"--config.train.steps={steps}"]
    print("$", *command[1:], flush=True)
    finished = subprocess.run(command, check=False)
    if finished.returncode:
        sys.exit(finished.returncode)  # it has said why
    convert.convert(str(workdir / kind), str(exported))
    return exported


def clean_loss(model: Model, encoded: Sequence[Sequence[int]]) -> float:
    """Mean cross-entropy in nats over all tokens behind the first of each text."""

    @jax.jit
    def loss(params: dict, tokens: jax.Array, length: jax.Array) -> jax.Array:
        positions = jnp.arange(_PADDED, dtype=jnp.int32)[None]
        hidden = llama.forward(params, model.cfg, tokens, positions, masks.causal(_PADDED)).hidden
        logits = llama.unembed(params, model.cfg, hidden[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.sum(losses, where=positions[:, 1:] < length)

    rows = np.zeros((len(encoded), 1, _PADDED), np.int32)
    for row, ids in zip(rows, encoded, strict=True):
        row[0, : len(ids)] = ids
    total = sum(float(loss(model.params, row, len(ids))) for row, ids in zip(rows, encoded, strict=True))
    return total / sum(len(ids) - 1 for ids in encoded)


def transformers_side(path: Path, encoded: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]], count: int):
    """(loss, greedy tokens of each prompt) of transformers, or None where it is not installed."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    total, answers = 0.0, []
    with torch.no_grad():
        for ids in encoded:
            tokens = torch.tensor([list(ids)])
            logits = model(tokens).logits[0, :-1].double()
            total += float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
        for ids in track(prompts, "transformers", disable=not sys.stdout.isatty()):
            tokens = torch.tensor([list(ids)])
            mask = torch.ones_like(tokens)
            out = model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=count, pad_token_id=0)
            answers.append(out[0, len(ids) :].tolist())
    return total / sum(len(ids) - 1 for ids in encoded), answers


def measure(name: str, path: Path, stories: Sequence[str], count: int, new_tokens: int) -> Result:
    """All figures of one model."""
    model = engine.load(path)
    stop = model.tokenizer.eos_id
    encoded = [[*model.tokenizer.start_ids, *model.tokenizer.encode(story), stop][:_PADDED] for story in stories]
    openings = [" ".join(story.split()[:6]) for story in stories[:count]]
    answers = {}
    for decoder in track(list(drafters.DEFAULT_TREES), name, disable=not sys.stdout.isatty()):
        answers[decoder] = engine.generate(model, openings, decoder, new_tokens, batch_size=4)
    reference = [answer.tokens for answer in answers["autoregressive"]]
    ids = [[*model.tokenizer.start_ids, *model.tokenizer.encode(opening)] for opening in openings]
    theirs = transformers_side(path, encoded, ids, new_tokens)
    return Result(
        model=name,
        clean_loss=clean_loss(model, encoded),
        transformers_loss=theirs and theirs[0],
        transformers_same_text=theirs and float(np.mean([a == b for a, b in zip(reference, theirs[1], strict=True)])),
        mean_accepted_tokens={
            decoder: sum(a.new_tokens for a in found) / sum(a.forward_passes for a in found)
            for decoder, found in answers.items()
        },
        exact_share={
            decoder: float(np.mean([a.tokens == b for a, b in zip(found, reference, strict=True)]))
            for decoder, found in answers.items()
        },
    )


def main() -> None:
    """Trains, exports, measures, prints and writes."""
    args, began = flags.FLAGS, time.perf_counter()
    workdir = cli.make_directory(args.workdir, "--workdir")
    stories = read_stories(args.stories)
    held_out, training = stories[:_HELD_OUT], stories[_HELD_OUT:]
    paths = {"original": Path(args.model)}
    for kind in ("sft", "msn"):
        paths[kind] = finetune(kind, args.model, training, workdir, args.steps)
    results = [measure(name, path, held_out, args.prompts, args.max_new_tokens) for name, path in paths.items()]
    report = {
        "seconds": time.perf_counter() - began,
        "jax": jax.__version__,
        "device": str(jax.devices()[0]),
        "results": [dataclasses.asdict(result) for result in results],
    }
    (workdir / "stories.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    decoders = list(drafters.DEFAULT_TREES)
    print("| model | clean loss | transformers' loss | same greedy text | " + " | ".join(decoders) + " | exact |")
    print("|---" * (5 + len(decoders)) + "|")
    for result in results:
        accepted = " | ".join(f"{result.mean_accepted_tokens[decoder]:.2f}" for decoder in decoders)
        theirs = "not installed | not installed"
        if result.transformers_loss is not None:
            theirs = f"{result.transformers_loss:.6f} | {result.transformers_same_text:.0%}"
        exact = min(result.exact_share.values())
        print(f"| {result.model} | {result.clean_loss:.6f} | {theirs} | {accepted} | {exact:.0%} |")


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "The Hugging Face directory of stories260k.", required=True)
    flags.DEFINE_string("stories", None, "TinyStories, separated by <|endoftext|>.", required=True)
    flags.DEFINE_string("workdir", "runs/stories", "Runs, exports and the report go here.")
    flags.DEFINE_integer("steps", None, "Of each fine-tuning; those of the config if not given.", lower_bound=1)
    flags.DEFINE_integer("prompts", 100, "Openings to continue.", lower_bound=1)
    flags.DEFINE_integer("max_new_tokens", 200, "Limit of each answer, in tokens.", lower_bound=1)
    cli.run(main)
