"""Runs an ablation: trains and decodes every setting of a grid with every seed; a table, a plot and report.json.

    python -m msn_jax.ablate --config=configs/ablations/paper.py:demo --workdir=runs/paper [--limit_runs=8]

WORKDIR/SETTING/seed-N is the workdir of a run's training and holds the outputs of every decoding. Each of them is
compared with that of `autoregressive` with the same weights. Interrupted anywhere, the same command continues and
repeats nothing that is finished. --limit_runs=N makes the first N runs only and reports those.

mean_accepted_tokens is new tokens over forward passes, clean_loss the loss on held-out data without noise in nats per
token, repeated_4_grams the share of an output's 4-grams that occurred before in it: how much retrieval alone can draft.
"""

import dataclasses
import json
import signal
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags
from rich.console import Console

from msn_jax import ablation, ablation_report, cli, held_out, metrics, outputs, request_files, train, workdirs
from msn_jax.ablation import OWN, Ablation, Decoding, Setting
from msn_jax.cli import InputError
from msn_jax.config import Config
from msn_jax.decode import engine, models
from msn_jax.decode.engine import Decoder
from msn_jax.decode.models import Model
from msn_jax.decode.request import Request
from msn_jax.evals.statistics import repeated_4_grams

_AUTOREGRESSIVE = Decoding("autoregressive")


def ablate(grid: Ablation, workdir: str | Path, limit: int | None = None) -> dict | None:
    """Makes the runs that are not finished yet, and writes report.json and report.png.

    Args:
      grid: the ablation.
      workdir: made if it does not exist.
      limit: only the first so many runs; None: all.

    Returns:
      The report; None after SIGTERM during training, when the same call resumes.

    Raises:
      InputError: the grid is not consistent, an input is missing, or the workdir belongs to another grid.
    """
    ablation.check(grid)
    workdir = cli.make_directory(workdir, "--workdir")
    _claim(grid, workdir)
    runs = grid.runs()[:limit]
    for name in dict.fromkeys(setting.base for setting, _ in runs if setting.base):
        print(f"base {name}: {workdir / name}", flush=True)
        if not train.train(grid.bases[name], workdir / name):
            return None
    results = []
    for number, (setting, seed) in enumerate(runs, 1):
        print(f"run {number} of {len(runs)}: {setting.name}, seed {seed}", flush=True)
        directory = workdir / setting.name / f"seed-{seed}"
        finished = directory / "result.json"
        if not finished.exists():
            result = run(grid, setting, seed, workdir, directory)
            if result is None:
                return None
            _write(finished, result)
        results.append(json.loads(finished.read_text(encoding="utf-8")))
        print(ablation_report.one_line(results[-1]), flush=True)
    report = ablation_report.build(grid, results)
    _write(workdir / "report.json", report)
    ablation_report.draw(report, workdir / "report.png")
    return report


def run(grid: Ablation, setting: Setting, seed: int, workdir: Path, directory: Path) -> dict | None:
    """Trains and decodes; returns an element of the report's `runs`, or None after SIGTERM during training."""
    clean_loss = noise_accuracy = cfg = None
    if setting.config is None:
        own = models.load(setting.model, adapter=setting.adapter or None)
        directory.mkdir(parents=True, exist_ok=True)
    else:
        cfg = ablation.run_config(grid, setting, seed, workdir)
        if not train.train(cfg, directory):
            return None
        own = _load_trained(cfg, directory)
        final = metrics.final_metrics(directory)
        clean_loss, noise_accuracy = final["eval_clean_loss"], final["eval_noise_accuracy"]
    requests = _requests(grid, setting, own)
    decodings = []
    for decoding in grid.decodings:
        target = _model(decoding.model, own)
        draft = None if decoding.draft is None else _model(decoding.draft, own)
        reference = dataclasses.replace(_AUTOREGRESSIVE, model=decoding.model)
        expected = _decode(reference, target, None, requests, grid.batch_size, directory)
        lines = _decode(decoding, target, draft, requests, grid.batch_size, directory)
        decodings.append({"decoder": decoding.label, "tree": decoding.tree_name, **_figures(lines, expected)})
    return {
        "setting": setting.factors,
        "seed": seed,
        "clean_loss": clean_loss,
        "noise_accuracy": noise_accuracy,
        "decoding": decodings,
    }


def _model(name: str, own: Model) -> Model:
    """The run's model for `OWN`, else the one in this directory."""
    return own if name == OWN else models.load(name)


def _load_trained(cfg: Config, directory: Path) -> Model:
    if cfg.adapter.rank:
        return models.load(cfg.train.init_from, adapter=directory / workdirs.ADAPTER)
    return models.load(directory)


def _requests(grid: Ablation, setting: Setting, model: Model) -> dict[str, Request]:
    """The prompts with their settings, by location."""
    limit = grid.max_new_tokens if setting.max_new_tokens is None else setting.max_new_tokens
    if grid.prompts.path:
        requests = request_files.read(grid.prompts.path, Request("", limit))
        return dict(list(requests.items())[: grid.prompts.count])
    prompts = held_out.prompts(model, setting.config.data, grid.prompts.count, limit)
    return {f"held-out {i}": engine.as_request(prompt, Request("", limit), i) for i, prompt in enumerate(prompts)}


def _decode(
    decoding: Decoding, model: Model, draft: Model | None, requests: dict[str, Request], batch_size: int, run: Path
) -> list[dict]:
    """The generations of all requests, in their order; those that a file of the run has are not made again."""
    path = run / ablation.file_name(decoding)
    if not path.exists():
        print(f"decoding {len(requests)} prompts: {path}", flush=True)
        decoder = Decoder(model, decoding.decoder, decoding.tree, draft)
        outputs.write_generations(decoder, requests, batch_size, str(path))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _figures(lines: list[dict], expected: list[dict]) -> dict:
    """Acceptance and exactness of the generations; `expected` are those of `autoregressive`."""
    new_tokens, forward_passes = (sum(line[name] for line in lines) for name in ("new_tokens", "forward_passes"))
    exact = [line["tokens"] == other["tokens"] for line, other in zip(lines, expected, strict=True)]
    return {
        "mean_accepted_tokens": new_tokens / forward_passes,
        "exact_share": sum(exact) / len(exact),
        "repeated_4_grams": sum(repeated_4_grams(line["tokens"]) for line in lines) / len(lines),
        "new_tokens": new_tokens,
        "forward_passes": forward_passes,
    }


def _claim(grid: Ablation, workdir: Path) -> None:
    """Stores the grid's identity in its workdir. InputError if that has another one."""
    path, ours = workdir / "ablation.json", json.loads(json.dumps(ablation.identity(grid)))
    if not path.exists():
        _write(path, ours)
        return
    theirs = json.loads(path.read_text(encoding="utf-8"))
    difference = ablation_report.first_difference(theirs, ours)
    if difference is not None:
        name, there, here = difference
        raise InputError(
            f"--workdir={workdir}: holds runs of another ablation, with {name}={there!r} where this one has {here!r}: "
            "choose another directory"
        )


def _write(path: Path, content: dict) -> None:
    """Writes JSON atomically."""
    outputs.replace_text(path, json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Reads the flags, makes the runs and prints the table."""
    args = flags.FLAGS
    report = ablate(cli.read_config(Ablation, "configs/ablations/"), args.workdir, args.limit_runs)
    if report is None:
        sys.exit(128 + signal.SIGTERM)
    Console(width=None if sys.stdout.isatty() else 160).print(ablation_report.to_table(report))
    print(f"{Path(args.workdir) / 'report.json'} and report.png hold these figures")


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", None, "A file of configs/ablations/, optionally with a colon and the argument of its get_config."
    )
    flags.DEFINE_string("workdir", None, "Directory for all runs and the report.", required=True)
    flags.DEFINE_integer("limit_runs", None, "Make only the first so many runs; default: all.", lower_bound=1)
    cli.run(main)
