"""Evaluates a model on a suite, by the suite's published protocol.

    python -m msn_jax.evaluate --model=DIR --suite=gsm8k --data=DIR --decoders=autoregressive,auto --output=runs/gsm8k

--output gets samples.jsonl (every sample, after a line with the settings), report.json and the suite's own files. An
interrupted evaluation continues with the same command; with a higher --limit, it is extended.

Several processes, one per device or host, share an evaluation with --shard=1/N to --shard=N/N. When they have finished,
the same command without --shard takes their samples from OUTPUT/shard-I-of-N, and generates what they lack.
"""

import dataclasses
import importlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from rich.console import Console
from rich.table import Table

from msn_jax import cli, config, environment, outputs
from msn_jax.cli import InputError
from msn_jax.decode import engine, models
from msn_jax.decode.engine import Decoder
from msn_jax.decode.models import Model
from msn_jax.decode.request import Request
from msn_jax.evals import questions
from msn_jax.evals.questions import Question
from msn_jax.evals.sample_log import SampleLog
from msn_jax.evals.suite import OPTIONAL_FLAGS, SHARDS, Evaluation, Settings, Suite

SUITES = ("gsm8k", "human_eval", "mbpp", "mmlu", "mt_bench", "spec_bench", "speed_bench")
_DECODERS = tuple(name for name in engine.DECODERS if name != "draft_model")
_ERROR = "_stderr"
_SHOWN_ITEMS = 5  # of a list


def load_suite(name: str) -> Suite:
    """The suite of that name, one of `SUITES`."""
    return importlib.import_module(f"msn_jax.evals.{name}").SUITE


def evaluate(
    name: str,
    all_questions: Sequence[Question],
    limit: int | None,
    model: Model,
    decoders: Sequence[str],
    settings: Settings,
    output: Path,
    shard: tuple[int, int] = (1, 1),
) -> dict:
    """Runs a suite, or what an interrupted run has left of it, and returns the report.

    Args:
      name: one of `SUITES`.
      all_questions: from the suite's `read`.
      limit: questions per group, the first ones; None takes all.
      model: the model.
      decoders: names of decoders.
      settings: see `Settings`.
      output: the directory, which exists.
      shard: (i, n) takes every n-th of the questions, beginning with the i-th, counted from 1.

    Raises:
      InputError: a prompt is too long for the model, or the directory has samples of another evaluation, or is in use.
    """
    suite = load_suite(name)
    by_name = {decoder: Decoder(model, decoder) for decoder in decoders}
    header = {
        "suite": name,
        "protocol": suite.protocol,
        "questions": questions.fingerprint(all_questions),
        "decoders": {decoder: outputs.identity(by_name[decoder]) for decoder in decoders},
        **settings.identity(),
        **({"hardware": environment.hardware()} if suite.is_timed else {}),
    }
    whole = questions.first_of_each_group(all_questions, limit)
    numbers = {question.id: number for number, question in enumerate(whole)}
    selected = whole[shard[0] - 1 :: shard[1]]
    if not selected:
        raise InputError(f"--shard={shard[0]}/{shard[1]}: there are only {len(whole)} questions")
    with SampleLog(output / "samples.jsonl", header, suite.key) as log:
        log.merge(sorted(output.glob(f"{SHARDS}/samples.jsonl")))
        rows = suite.run(Evaluation(model, by_name, selected, settings, log, output, numbers))
    return {
        **environment.environment(),
        "model": model.name,
        "dtype": model.cfg.dtype,
        "suite": name,
        "questions": len(selected),
        "of": len(all_questions),
        "settings": vars(settings),
        "rows": rows,
    }


def print_table(report: dict) -> None:
    """Prints the rows, with standard errors after their values."""
    columns = list(dict.fromkeys(name for row in report["rows"] for name in row if not name.endswith(_ERROR)))
    title = f"{report['suite']}: {report['questions']} of {report['of']} questions"
    table = Table(*(column.replace("_", " ") for column in columns), title=title)
    for row in report["rows"]:
        table.add_row(*(_cell(row.get(column), row.get(column + _ERROR)) for column in columns))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _cell(value: object, error: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return " ".join(f"{item:.2f}" for item in value[:_SHOWN_ITEMS]) + (" ..." if len(value) > _SHOWN_ITEMS else "")
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if error is None else f"{text} ± {error:.2g}"


def _shard(text: str | None, suite: Suite) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", text or "1/1")
    if match is None or int(match[1]) > int(match[2]):
        raise InputError(f"--shard={text}: must be I/N, with I from 1 to N")
    if text is not None and suite.is_timed:
        raise InputError("--shard: a suite that measures time needs one process; remove it")
    return int(match[1]), int(match[2])


def main() -> None:
    """Reads the flags, evaluates, and writes the report."""
    args = flags.FLAGS
    suite = load_suite(args.suite)
    for flag in OPTIONAL_FLAGS:
        if flag not in suite.flags and args[flag].present:
            raise InputError(f"--{flag}: has no effect on --suite={args.suite}; remove it")
    decoders = list(suite.decoders) if args.decoders is None else args.decoders
    if args.decoders == []:
        raise InputError(f"--decoders: is empty: name some of {', '.join(_DECODERS)}")
    unknown = [name for name in decoders if name not in _DECODERS]
    if unknown or len(set(decoders)) < len(decoders):
        raise InputError(f"--decoders: {', '.join(decoders)}: name different ones of {', '.join(_DECODERS)}")
    values = {field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)}
    settings = Settings(**values | {"max_new_tokens": args.max_new_tokens or suite.max_new_tokens})
    Request("", settings.max_new_tokens, settings.temperature, top_p=settings.top_p, seed=settings.seed).check("--")
    shard = _shard(args.shard, suite)
    all_questions = suite.read(args.data)
    output = cli.make_directory(args.output, "--output")
    if args.shard is not None:
        output = cli.make_directory(str(output / "shard-{}-of-{}".format(*shard)), "--output")
    model = models.load(args.model, args.dtype, adapter=args.adapter)
    report = evaluate(args.suite, all_questions, args.limit, model, decoders, settings, output, shard)
    report |= {"adapter": args.adapter}
    outputs.replace_text(output / "report.json", json.dumps(report, indent=2) + "\n")
    print_table(report)


if __name__ == "__main__":
    flags.DEFINE_string(
        "model", None, "A training workdir, a Hugging Face directory, FILE.gguf, or OWNER/NAME.", required=True
    )
    flags.DEFINE_string("adapter", None, "A directory with a LoRA adapter in PEFT's form: a gated one drafts.")
    flags.DEFINE_enum("dtype", None, config.DTYPES, "Of parameters and computation; default: the model's own.")
    flags.DEFINE_enum("suite", None, SUITES, "What to evaluate.", required=True)
    flags.DEFINE_string("data", None, "The suite's file or directory (README, Evaluate).", required=True)
    flags.DEFINE_list("decoders", None, f"Any of {', '.join(_DECODERS)}; default: the suite's.")
    flags.DEFINE_string("output", None, "A directory for samples and report.", required=True)
    flags.DEFINE_integer("limit", None, "Questions per group, the first ones; default: all.", lower_bound=1)
    flags.DEFINE_string("shard", None, "I/N: this process takes the I-th of N parts of the questions.")
    flags.DEFINE_integer("max_new_tokens", None, "Limit of each answer; default: the suite's.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of sampled answers.", lower_bound=0)
    flags.DEFINE_integer("batch_size", 1, "Prompts run together.", lower_bound=1)
    flags.DEFINE_integer("runs", 3, "Runs over all questions, where time is measured.", lower_bound=1)
    flags.DEFINE_integer("num_samples", 1, "Answers per question; several need a temperature.", lower_bound=1)
    flags.DEFINE_float("temperature", 0.0, "0 is greedy; above 0, answers are sampled.")
    flags.DEFINE_float("top_p", 1.0, "Sample from the most probable tokens with this total probability.")
    flags.DEFINE_bool("chat", None, "Prompt with messages, for chat models; default: if there is a chat template.")
    flags.DEFINE_bool("allow_code_execution", False, "Run the generated programs, in processes with limits.")
    flags.DEFINE_float("program_seconds", 3.0, "Time limit of each program.", lower_bound=0.1)
    cli.run(main)
