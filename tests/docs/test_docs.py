"""The pages of docs/: every command runs, in a small form, and every link and path exists."""

import gzip
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import random_adapter
import random_params
import tiny
import tiny_config
from programs import run

from msn_jax import adapter, checkpoint, convert, directories, pretrained
from msn_jax.data import tokenizer as tokenizers
from msn_jax.decode import tree_benchmark

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"), key=lambda page: (page.stem != "training", page.stem))  # it writes models
pytestmark = pytest.mark.usefixtures("quick_compilation")

MODELS = ("smollm2_135m_instruct", "Qwen3-0.6B", "Meta-Llama-3-8B", "stories260k")  # one tiny model
SMALL_CONFIG = f"{ROOT}/tests/tiny_config.py"  # in place of configs of large models
LARGE_CONFIGS = r"configs/(qwen3|llama3_8b|deepseek_coder_6_7b|stories260k)\.py:[\w.-]+"
# Arguments that make a program small. A program that is not here fails the test.
SMALL = {
    "msn_jax.train": [
        "--config.train.steps=3",
        "--config.train.eval_batches=1",
        "--config.data.row_length=32",
        "--config.data.batch_size=8",
    ],
    "msn_jax.regenerate": ["--max_new_tokens=16", "--keep_truncated"],
    "msn_jax.convert": [],
    "msn_jax.generate": ["--max_new_tokens=8"],
    "msn_jax.calibrate": ["--max_new_tokens=24", "--max_width=2", "--decoder=prompt_lookup"],
    "msn_jax.evaluate": ["--limit=1", "--max_new_tokens=4"],
    "msn_jax.ablate": [],
    "msn_jax.report": [],
    "launch/gpu_host.py": ["--dry_run"],
    "launch/slurm.py": ["--dry_run"],
    "launch/tpu_vm.py": ["--dry_run"],
}
SMALL_MODEL = ["--config.model.n_layers=1", "--config.model.max_length=1024"]  # with `SMALL_CONFIG`


def commands(page: Path) -> list[str]:
    """The commands of a page, with continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def small(command: str) -> tuple[str, list[str]]:
    """The program of a command, and its arguments made small."""
    interpreter, *words = shlex.split(command, comments=True)
    assert interpreter == "python", f"no known program: {command}"
    program, *arguments = words[1:] if words[0] == "-m" else words
    assert program in SMALL, f"add {program} to SMALL: {command}"
    extra = SMALL[program]
    if program == "msn_jax.train":
        is_large = any(re.fullmatch(f"--config={LARGE_CONFIGS}", word) for word in arguments)
        extra = [*extra, *(SMALL_MODEL if is_large else [])]
        arguments = [re.sub(LARGE_CONFIGS, SMALL_CONFIG, word) for word in arguments]
        if any(word.startswith("--config=configs/adapter.py:gated") for word in arguments):
            extra = [*extra, "--config.noise.blocks=8"]
    arguments = [re.sub("^--decoders=.*", "--decoders=autoregressive,prompt_lookup", word) for word in arguments]
    arguments = [
        re.sub(r"configs/ablations/[\w.:]+", f"{ROOT}/tests/docs/small_ablation.py", word) for word in arguments
    ]
    if "--suite=mmlu" in arguments:
        extra = ["--limit=1"]
    if program in ("msn_jax.generate", "msn_jax.regenerate") and "--decoder" not in command:
        extra = [*extra, "--decoder=autoregressive"]  # compiles fastest
    return program, [*arguments, *extra]


def write_lines(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def write_suites(data: Path) -> None:
    """A few questions of every suite."""
    groups = ["writing", "translation", "summarization", "qa", "math_reasoning", "rag"]
    questions = [{"question_id": i, "category": group, "turns": [f"one {i}"]} for i, group in enumerate(groups)]
    write_lines(data / "spec_bench/question.jsonl", questions[:3])
    write_lines(data / "mt_bench/question.jsonl", questions[:1])
    for split in ("train", "test"):
        write_lines(data / f"gsm8k/{split}.jsonl", [{"question": f"q{i}", "answer": f"#### {i}"} for i in range(6)])
        folder = {"train": "dev", "test": "test"}[split]
        rows = "".join(f"q{i},a,b,c,d,{i % 4}\n" for i in range(5))
        (data / "mmlu" / folder).mkdir(parents=True)
        header = "question,choice0,choice1,choice2,choice3,answer\n"
        (data / f"mmlu/{folder}/cats_{folder}.csv").write_text(header + rows)
    problem = {"task_id": "HumanEval/0", "prompt": "def cat(n):\n", "entry_point": "cat"}
    problem |= {"canonical_solution": "    return n\n", "test": "def check(candidate):\n    assert candidate(1) == 1\n"}
    (data / "HumanEval.jsonl.gz").write_bytes(gzip.compress(json.dumps(problem).encode()))
    tasks = [
        {"task_id": i, "text": "t", "code": "def f(): return 1", "test_list": ["assert f() == 1"] * 3}
        for i in (2, 3, 4, 11)
    ]
    write_lines(data / "mbpp.jsonl", tasks)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A directory with everything that the pages' commands name, but what earlier commands write."""
    directory = tmp_path_factory.mktemp("docs")
    cfg = tiny_config.get_config().model
    cfg.n_layers, cfg.max_length = 1, 1024
    with directories.whole(directory / "workdir") as workdir:
        tokenizers.save(tiny.tokenizer(), workdir)
        checkpoint.save_model(workdir, random_params.stacked(cfg, 0, gain=1.5), cfg)
    for name in MODELS:
        if name == MODELS[0]:
            convert.convert(str(directory / "workdir"), str(directory / "models" / name))
        else:
            shutil.copytree(directory / "models" / MODELS[0], directory / "models" / name)
    model = pretrained.read_config(directory / "models" / MODELS[0])
    random_adapter.save(directory / "adapters" / MODELS[0], model, gate="noise", token=5)
    tiny_config.write_data(directory / "my_chats.jsonl")
    for name in ("conversations.jsonl", "stories.jsonl"):
        shutil.copy(directory / "my_chats.jsonl", directory / name)
    write_lines(
        directory / "prompts.jsonl",
        [{"prompt": f"{number} and one"} for number in "zero one two three four five six seven".split()],
    )
    write_suites(directory / "data")
    for name in ("configs", "launch", "msn_jax"):
        (directory / name).symlink_to(ROOT / name)
    return directory


def key(program: str, arguments: list[str]) -> tuple:
    """Equal for commands that differ only in names: of a tiny model's copies, of data, and of where results go."""
    named = ("--config.train.init_from", "--config.data.path", "--workdir", "--model", "--output")
    is_named = program in ("msn_jax.train", "msn_jax.evaluate")
    return program, *(word for word in arguments if not (is_named and word.startswith(named)))


def workdir(arguments: list[str]) -> str:
    return next(word.removeprefix("--workdir=") for word in arguments if word.startswith("--workdir="))


DONE: dict[tuple, list[str]] = {}  # commands that ran, in the order of `PAGES`, so their outputs are there


def run_once(command: str) -> None:
    """Runs a command in its small form, unless the same one has run."""
    program, arguments = small(command)
    same = DONE.get(key(program, arguments))
    if same is None:
        code, output = run(program, arguments)
        assert code == 0, f"{command}\n{output}"
        DONE[key(program, arguments)] = arguments
    elif program == "msn_jax.train" and workdir(arguments) != workdir(same):
        shutil.copytree(workdir(same), workdir(arguments))


@pytest.fixture
def quick_calibration(monkeypatch):
    for name, value in (("_REPEATS", 1), ("_RUN_TOKENS", 16), ("_ROUNDS", 1)):
        monkeypatch.setattr(tree_benchmark, name, value)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_runs(page, directory, monkeypatch, quick_calibration):
    monkeypatch.chdir(directory)
    assert commands(page)
    for command in commands(page):
        run_once(command)


def test_the_commands_of_the_readme_train_an_adapter_for_a_hugging_face_model(directory, monkeypatch):
    monkeypatch.chdir(directory)
    block = (ROOT / "README.md").read_text(encoding="utf-8").split("# A drafting adapter for a model")[1]
    lines = block.split("\n\n")[0].splitlines()[1:]
    assert [line.split()[2] for line in lines] == ["msn_jax.regenerate", "msn_jax.train", "msn_jax.generate"]
    for line in lines:
        run_once(line)
    read = adapter.load("runs/smollm2/adapter", pretrained.read_config("models/smollm2_135m_instruct"))
    assert read.cfg.gate == "noise" and np.abs(np.asarray(read.params["q"][1])).max() > 0


def slug(heading: str) -> str:
    """The anchor of a heading on GitHub."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {slug(heading) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text.replace("\n", " ")):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in ("models", "runs"))
    for path in re.findall(rf"(?<![\w/.])((?:{folders})/[\w./-]+\w)", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
