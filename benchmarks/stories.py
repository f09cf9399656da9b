"""A real checkpoint end to end: parity with transformers, fine-tuning with and without noise, export.

    python -m benchmarks.stories --model=PATH/stories260k --stories=PATH/tinystories.txt --workdir=runs/stories

Trains `configs/stories260k.py:sft` and `:msn` with `python -m msn_jax.train` and exports both. For the original and the
two fine-tuned models it measures the clean loss on the first 200 stories, which are held out from training, and the
mean accepted tokens and exactness of every decoder on the openings of the first `--prompts` held-out stories. If torch
and transformers are installed (extra `peers`), it also compares losses and greedy completions with transformers.

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
from msn_jax.decode import drafters, engine, models
from msn_jax.decode.models import Model

_HELD_OUT = 200  # stories
_PADDED = 512  # tokens per story in the clean loss; longer stories are truncated
_SEPARATOR = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Result:
    """The measurements of one model."""

    model: str
    clean_loss: float  # nats per token on the held-out stories, without predicting BOS
    transformers_loss: float | None
    transformers_exact_share: float | None  # prompts with the same greedy tokens in transformers
    mean_accepted_tokens: dict[str, float]  # by decoder
    exact_share: dict[str, float]


def read_stories(path: str) -> list[str]:
    """The stories of a text file.

    Raises:
      InputError: the file cannot be read, or it has too few stories to hold 200 out.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"--stories={path}: cannot read: {error.strerror}") from error
    stories = [story.strip() for story in text.split(_SEPARATOR) if story.strip()]
    if len(stories) <= _HELD_OUT:
        raise InputError(
            f"--stories={path}: {len(stories)} stories separated by {_SEPARATOR}; more than {_HELD_OUT} are needed"
        )
    return stories


def finetune(kind: str, model: str, stories: Sequence[str], workdir: Path, steps: int | None) -> Path:
    """Fine-tunes and exports a model, and returns the Hugging Face directory. An existing export is reused."""
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
        sys.exit(finished.returncode)  # the child process has already printed the error
    convert.convert(str(workdir / kind), str(exported))
    return exported


def clean_loss(model: Model, encoded: Sequence[Sequence[int]]) -> float:
    """Mean cross-entropy in nats over all tokens but the first of each sequence."""

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


def measure_transformers(
    path: Path, encoded: Sequence[Sequence[int]], prompts: Sequence[Sequence[int]], new_tokens: int
) -> tuple[float, list[list[int]]] | None:
    """The loss, and the greedy tokens of each prompt, from transformers; None if it is not installed."""
    try:
        import torch
        import transformers
    except ImportError:
        return None
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    total, completions = 0.0, []
    with torch.no_grad():
        for ids in encoded:
            tokens = torch.tensor([list(ids)])
            logits = model(tokens).logits[0, :-1].double()
            total += float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
        for ids in track(prompts, "transformers", disable=not sys.stdout.isatty()):
            tokens = torch.tensor([list(ids)])
            options = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0}
            output = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
            completions.append(output[0, len(ids) :].tolist())
    return total / sum(len(ids) - 1 for ids in encoded), completions


def measure(name: str, path: Path, stories: Sequence[str], count: int, new_tokens: int) -> Result:
    """Measures one model: its losses, and every decoder on the first `count` openings."""
    model = models.load(path)
    stop = model.tokenizer.eos_id
    encoded = [[*model.tokenizer.start_ids, *model.tokenizer.encode(story), stop][:_PADDED] for story in stories]
    openings = [" ".join(story.split()[:6]) for story in stories[:count]]
    generations = {}
    for decoder in track(list(drafters.DEFAULT_TREES), name, disable=not sys.stdout.isatty()):
        generations[decoder] = engine.generate(model, openings, decoder, new_tokens, batch_size=4)
    completions = {
        decoder: [generation.tokens for generation in of_decoder] for decoder, of_decoder in generations.items()
    }
    reference = completions["autoregressive"]
    prompts = [[*model.tokenizer.start_ids, *model.tokenizer.encode(opening)] for opening in openings]
    transformers = measure_transformers(path, encoded, prompts, new_tokens)
    return Result(
        model=name,
        clean_loss=clean_loss(model, encoded),
        transformers_loss=transformers and transformers[0],
        transformers_exact_share=transformers and _exact_share(transformers[1], reference),
        mean_accepted_tokens={
            decoder: sum(g.new_tokens for g in of_decoder) / sum(g.forward_passes for g in of_decoder)
            for decoder, of_decoder in generations.items()
        },
        exact_share={decoder: _exact_share(tokens, reference) for decoder, tokens in completions.items()},
    )


def _exact_share(completions: Sequence[list[int]], reference: Sequence[list[int]]) -> float:
    return float(np.mean([tokens == expected for tokens, expected in zip(completions, reference, strict=True)]))


def main() -> None:
    """Trains, exports, measures, writes the report and prints the table."""
    args, start = flags.FLAGS, time.perf_counter()
    workdir = cli.make_directory(args.workdir, "--workdir")
    stories = read_stories(args.stories)
    held_out, training = stories[:_HELD_OUT], stories[_HELD_OUT:]
    paths = {"original": Path(args.model)}
    for kind in ("sft", "msn"):
        paths[kind] = finetune(kind, args.model, training, workdir, args.steps)
    results = [measure(name, path, held_out, args.prompts, args.max_new_tokens) for name, path in paths.items()]
    report = {
        "seconds": time.perf_counter() - start,
        "jax": jax.__version__,
        "device": str(jax.devices()[0]),
        "results": [dataclasses.asdict(result) for result in results],
    }
    (workdir / "stories.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    decoders = list(drafters.DEFAULT_TREES)
    print("| model | clean loss | transformers' loss | same greedy tokens | " + " | ".join(decoders) + " | exact |")
    print("|---" * (5 + len(decoders)) + "|")
    for result in results:
        mean_accepted = " | ".join(f"{result.mean_accepted_tokens[decoder]:.2f}" for decoder in decoders)
        transformers = "not installed | not installed"
        if result.transformers_loss is not None:
            transformers = f"{result.transformers_loss:.6f} | {result.transformers_exact_share:.0%}"
        exact = min(result.exact_share.values())
        print(f"| {result.model} | {result.clean_loss:.6f} | {transformers} | {mean_accepted} | {exact:.0%} |")


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "The Hugging Face directory of stories260k.", required=True)
    flags.DEFINE_string("stories", None, "TinyStories, separated by <|endoftext|>.", required=True)
    flags.DEFINE_string("workdir", "runs/stories", "Directory for runs, exports and the report.")
    flags.DEFINE_integer("steps", None, "Training steps per fine-tuning run. Default: as configured.", lower_bound=1)
    flags.DEFINE_integer("prompts", 100, "Number of story openings to continue.", lower_bound=1)
    flags.DEFINE_integer("max_new_tokens", 200, "Limit per prompt, in tokens.", lower_bound=1)
    cli.run(main)
