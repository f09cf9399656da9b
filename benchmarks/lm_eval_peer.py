"""Compares our suites with lm-evaluation-harness: prompts, log-likelihoods, extracted answers and scores.

    python -m benchmarks.lm_eval_peer --model=HF_DIR --data=DIR --samples=DIR --output=lm_eval.json

DIR has gsm8k/, mmlu/, human_eval/HumanEval.jsonl.gz and mbpp/mbpp.jsonl; the tasks of the harness read these files
instead of the Hub's. --samples gets the files of our evaluations. The metric for programs, `code_eval`, comes from the
Hub unless the working directory has a copy. Programs are run. Needs `pip install lm_eval[hf]`.
"""

import functools
import gzip
import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from benchmarks import report
from msn_jax import cli, evaluate
from msn_jax.cli import InputError
from msn_jax.decode import models
from msn_jax.decode.models import Model
from msn_jax.decode.request import encode_prompt
from msn_jax.evals import code_execution, human_eval, questions
from msn_jax.evals.questions import Question
from msn_jax.evals.suite import Settings

_FILES = {"gsm8k": "gsm8k", "mmlu": "mmlu", "human_eval": "human_eval/HumanEval.jsonl.gz", "mbpp": "mbpp/mbpp.jsonl"}
_TASKS = {"gsm8k": "gsm8k", "human_eval": "humaneval", "mbpp": "mbpp"}  # names in the harness
_GENERATED, _PROGRAMS = 8, 164  # questions
_PARTS = ("programs", "prompts", "mmlu", "human_eval", "mbpp", "gsm8k")
_BREAKS = (
    lambda text: text.replace("return", "return not", 1),
    lambda text: text[: len(text) // 2],
    lambda text: text + "\n    raise ValueError",
    lambda text: "    exit()\n" + text,
)


def serve_local_data(data: Path) -> None:
    """Makes the harness's tasks read the files below `data`."""
    import datasets

    def read(path: Path) -> list[dict]:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
        return [json.loads(line) for line in text.splitlines()]

    def rows_of(source: str, name: str | None) -> dict[str, list[dict]]:
        if source == "openai/gsm8k":
            return {split: read(data / "gsm8k" / f"{split}.jsonl") for split in ("train", "test")}
        if source == "openai/openai_humaneval":
            return {"test": read(data / _FILES["human_eval"])}
        if source == "google-research-datasets/mbpp":
            return {"test": [row for row in read(data / _FILES["mbpp"]) if 11 <= row["task_id"] <= 510]}
        assert source == "cais/mmlu", source
        splits = {}
        for split in ("dev", "test"):
            file = str(data / "mmlu" / split / f"{name}_{split}.csv")
            table = datasets.Dataset.from_csv(file, keep_in_memory=True, keep_default_na=False)
            splits[split] = [
                {"question": r["question"], "choices": [str(r[f"choice{i}"]) for i in range(4)], "answer": r["answer"]}
                for r in table
            ]
        return splits

    def load_dataset(path: str, name: str | None = None, **_: object) -> datasets.DatasetDict:
        return datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in rows_of(path, name).items()})

    datasets.load_dataset = load_dataset


def run_harness(model: object, tasks: Sequence[str], **settings: object) -> dict[str, list[dict]]:
    """The harness's samples by task, in the order of the questions."""
    import lm_eval

    results = lm_eval.simple_evaluate(
        model, tasks=list(tasks), bootstrap_iters=0, confirm_run_unsafe_code=True, **settings
    )
    return {task: sorted(samples, key=lambda s: s["doc_id"]) for task, samples in results["samples"].items()}


def unique(samples: list[dict]) -> list[dict]:
    """One sample per question: a task with several filters has one for each."""
    return list({sample["doc_id"]: sample for sample in samples}.values())


def prompt_of(sample: dict) -> str:
    """The prompt of a sample of the harness."""
    return sample["arguments"][0][0]


def compare_prompts(model: Model, directory: str, suites: dict[str, list[Question]]) -> dict:
    """The number of questions of each suite and how many of their prompts are equal, character by character."""
    from lm_eval.models.dummy import DummyLM

    DummyLM.tokenizer_name = directory
    theirs = run_harness(DummyLM(), list(_TASKS.values()), predict_only=True)
    theirs |= run_harness(DummyLM(), ["mmlu"], predict_only=True, num_fewshot=5)
    chat = run_harness(DummyLM(), ["humaneval_instruct"], apply_chat_template=True, predict_only=True)[
        "humaneval_instruct"
    ]
    by_suite = {name: [prompt_of(sample) for sample in unique(theirs[task])] for name, task in _TASKS.items()}
    subjects = dict.fromkeys(question.group for question in suites["mmlu"])
    by_suite["mmlu"] = [prompt_of(sample) for subject in subjects for sample in theirs[f"mmlu_{subject}"]]
    rows = {}
    for name, asked in suites.items():
        equal = [ours.prompt == prompt for ours, prompt in zip(asked, by_suite[name], strict=False)]
        rows[name] = {"questions": len(asked), "of_harness": len(by_suite[name]), "equal": sum(equal)}
    encoded = [
        encode_prompt(model.tokenizer, human_eval.chat_request(question), 1 << 20, question.location)
        for question in suites["human_eval"]
    ]
    tokenizer = DummyLM().tokenizer
    equal = [
        ids == tokenizer(prompt_of(sample), add_special_tokens=False).input_ids
        for ids, sample in zip(encoded, chat, strict=False)
    ]
    rows["human_eval_chat"] = {"questions": len(encoded), "of_harness": len(chat), "equal": sum(equal)}
    return rows


def run_ours(name: str, model: Model, asked: list[Question], output: Path, **settings: object) -> list[dict]:
    """Our samples, in the order of the questions."""
    output.mkdir(parents=True, exist_ok=True)
    suite = evaluate.load_suite(name)
    values = Settings(**{"max_new_tokens": suite.max_new_tokens, "batch_size": 8, **settings})
    evaluate.evaluate(name, asked, None, model, ["autoregressive"], values, output)
    _, *lines = (output / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = {sample["question_id"]: sample for sample in map(json.loads, lines)}
    return [samples[question.id] for question in asked]


def compare_mmlu(peer: object, model: Model, asked: list[Question], count: int, output: Path) -> dict:
    """Log-likelihoods and choices of `count` questions, spread evenly."""
    chosen = [asked[i] for i in np.linspace(0, len(asked) - 1, count).astype(int)]
    numbers: dict[str, list[int]] = {}
    for question in chosen:
        numbers.setdefault(f"mmlu_{question.group}", []).append(int(question.id.split("/")[1]))
    theirs = run_harness(peer, numbers, samples=numbers, num_fewshot=5)
    by_id = {
        f"{task.removeprefix('mmlu_')}/{sample['doc_id']}": [response[0][0] for response in sample["resps"]]
        for task, samples in theirs.items()
        for sample in samples
    }
    ours = run_ours("mmlu", model, chosen, output / "mmlu")
    pairs = [(np.array(s["log_likelihoods"]), np.array(by_id[s["question_id"]])) for s in ours]
    return {
        "questions": len(pairs),
        "largest_difference": float(max(np.abs(a - b).max() for a, b in pairs)),
        "same_choice": sum(int(a.argmax() == b.argmax()) for a, b in pairs),
    }


def compare_gsm8k(peer: object, model: Model, asked: list[Question], count: int, output: Path) -> dict:
    """Texts, extracted answers and scores of the first `count` questions."""
    samples = run_harness(peer, ["gsm8k"], limit=count)["gsm8k"]
    ours = run_ours("gsm8k", model, asked[:count], output / "gsm8k")
    result = {"questions": count}
    for name, filtered in (("strict", "strict-match"), ("flexible", "flexible-extract")):
        theirs = [sample for sample in samples if sample["filter"] == filtered]
        result["same_text"] = sum(a["text"] == b["resps"][0][0] for a, b in zip(ours, theirs, strict=True))
        result[f"same_{name}_score"] = sum(
            a[f"{name}_match"] == bool(b["exact_match"]) for a, b in zip(ours, theirs, strict=True)
        )
        result[f"{name}_match"] = [sum(a[f"{name}_match"] for a in ours), sum(int(b["exact_match"]) for b in theirs)]
    return result


def compare_generated(peer: object, name: str, model: Model, asked: list[Question], output: Path) -> dict:
    """The programs that the model itself writes for the first questions, as far as 128 tokens reach."""
    chosen, limits = asked[:_GENERATED], {"limit": _GENERATED, "gen_kwargs": {"max_gen_toks": 128}}
    theirs = run_harness(peer, [_TASKS[name]], **limits)[_TASKS[name]]
    ours = run_ours(name, model, chosen, output / name, max_new_tokens=128, chat=False)
    programs_of = [(a["program"], f"{program_of(b)}\n{b['target']}") for a, b in zip(ours, theirs, strict=True)]
    return {"questions": len(chosen), "same_program": sum(a.strip() == b.strip() for a, b in programs_of)}


def program_of(sample: dict) -> str:
    """The program of a sample of the harness, without its tests."""
    [response] = sample["filtered_resps"]
    return response if isinstance(response, str) else response[0]


def compare_programs(name: str, asked: list[Question], solutions: list[str]) -> dict:
    """The programs and their outcomes for the same completions: solutions of the data set, half of them broken."""
    from lm_eval.models.dummy import DummyLM

    texts = [text if i % 2 else _BREAKS[i // 2 % len(_BREAKS)](text) for i, text in enumerate(solutions)]
    by_id = {question.id: text for question, text in zip(asked, texts, strict=True)}

    class Scripted(DummyLM):
        def generate_until(self, requests, disable_tqdm=False):
            return [by_id[request.doc["task_id"]] for request in requests]

    theirs = run_harness(Scripted(), [_TASKS[name]], limit=len(asked))[_TASKS[name]]
    to_program = importlib.import_module(f"msn_jax.evals.{name}").to_program
    ours = [to_program(question, text) for question, text in zip(asked, texts, strict=True)]
    passed = [code_execution.run(program, Settings.program_seconds).passed for program in ours]
    expected = [bool(sample.get("pass@1", sample.get("pass_at_1"))) for sample in theirs]
    same = [a.strip() == f"{program_of(b)}\n{b['target']}".strip() for a, b in zip(ours, theirs, strict=True)]
    return {
        "questions": len(passed),
        "same_program": sum(same),
        "same_outcome": sum(a == b for a, b in zip(passed, expected, strict=True)),
        "passed": [sum(passed), sum(expected)],
    }


def compare_all_programs(suites: dict[str, list[Question]], data: Path) -> dict:
    """`compare_programs` for HumanEval and MBPP."""
    result = {}
    for name, field in (("human_eval", "canonical_solution"), ("mbpp", "code")):
        asked = suites[name][:_PROGRAMS]
        fields = {"task_id": type(asked[0].id), field: str}
        records = questions.read_records(data / _FILES[name], fields, name)
        solutions = {record["task_id"]: record[field] for _, record in records}
        result[name] = compare_programs(name, asked, [solutions[question.id] for question in asked])
    return result


def ordered_parts(names: Sequence[str]) -> list[str]:
    """The named parts in the order in which they run. InputError if there are none, or if one is unknown."""
    unknown = [name for name in names if name not in _PARTS]
    if unknown or not names:
        raise InputError(f"--parts={','.join(names)}: name some of {', '.join(_PARTS)}")
    return [name for name in _PARTS if name in names]


def main() -> None:
    """Compares and writes the report, after every part anew."""
    args = flags.FLAGS
    chosen = ordered_parts(args.parts)
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise InputError(f"lm_eval is not installed ({error}): pip install lm_eval[hf]") from error
    os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    data, output = Path(args.data), cli.make_directory(args.samples, "--samples")
    suites = {name: evaluate.load_suite(name).read(str(data / path)) for name, path in _FILES.items()}
    serve_local_data(data)
    result = report.environment()
    model = functools.cache(lambda: models.load(args.model, "float32"))
    peer = functools.cache(lambda: HFLM(pretrained=args.model, dtype="float32", device="cpu", batch_size=8))
    parts = {
        # First, because `code_eval` forks, which JAX does not survive once it computes.
        "programs": lambda: compare_all_programs(suites, data),
        "prompts": lambda: compare_prompts(model(), args.model, suites),
        "mmlu": lambda: compare_mmlu(peer(), model(), suites["mmlu"], args.mmlu, output),
        "human_eval": lambda: compare_generated(peer(), "human_eval", model(), suites["human_eval"], output),
        "mbpp": lambda: compare_generated(peer(), "mbpp", model(), suites["mbpp"], output),
        "gsm8k": lambda: compare_gsm8k(peer(), model(), suites["gsm8k"], args.gsm8k, output),
    }
    for name in chosen:
        result[name] = parts[name]()
        report.write(result, args.output)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "A Hugging Face directory.", required=True)
    flags.DEFINE_string("data", None, "A directory with the data of the suites.", required=True)
    flags.DEFINE_string("samples", None, "A directory for our samples.", required=True)
    flags.DEFINE_string("output", "", "A file for the report; default: standard output.")
    flags.DEFINE_list("parts", list(_PARTS), f"Any of {', '.join(_PARTS)}.")
    flags.DEFINE_integer("mmlu", 200, "Questions of MMLU to score.", lower_bound=1)
    flags.DEFINE_integer("gsm8k", 50, "Questions of GSM8K to answer.", lower_bound=1)
    cli.run(main)
