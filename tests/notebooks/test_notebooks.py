"""The notebooks run from top to bottom, with tiny models and a few training steps."""

import os
from pathlib import Path

import compilation
import nbformat
import pytest
import random_adapter
import tiny
import tiny_config
from nbclient import NotebookClient

from msn_jax import convert, pretrained

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parents[2]

# Cells that run before the first one.
#
# Most of the demo's time would go into preparing the whole library and, as nothing is optimized, into evaluating on 20
# batches.
_SMALL_DEMO = """
import functools
from configs import demo
from msn_jax.data import corpora

def small(get_config, *args):
    cfg = get_config(*args)
    cfg.model.n_layers = cfg.train.unroll = cfg.train.eval_batches = 1
    cfg.data.batch_size = 2
    return cfg

def fewer(source_files, *args):  # every eighth file, and all validation files
    for number, (path, text) in enumerate(source_files(*args)):
        if number % 8 == 0 or corpora.split_of(path) == "validation":
            yield path, text

demo.get_config = functools.partial(small, demo.get_config)
corpora._source_files = functools.partial(fewer, corpora._source_files)
"""
_SMALL_ADAPTER = """
import functools
from configs import adapter

def small(get_config, *args):
    cfg = get_config(*args)
    cfg.data.row_length, cfg.noise.blocks, cfg.train.eval_batches = 32, 4, 1
    return cfg

adapter.get_config = functools.partial(small, adapter.get_config)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Hugging Face directory, a gated adapter and chats beside it."""
    directory = tmp_path_factory.mktemp("model")
    tiny.write_model(directory / "workdir", max_length=128, n_layers=1)
    convert.convert(str(directory / "workdir"), str(directory / "model"))
    random_adapter.save(
        directory / "adapter", pretrained.read_config(directory / "model"), gate="noise", token=5, scale=0.02
    )
    tiny_config.write_data(directory / "chats.jsonl")
    return directory


def run(name, cell, directory, monkeypatch, **variables):
    """Executes a notebook; returns the text and the number of pictures that it shows."""
    for variable, value in {"MSN_WORKDIR": directory, **variables}.items():
        monkeypatch.setenv(variable, str(value))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("XLA_FLAGS", compilation.XLA_FLAGS)  # one device, as a reader has
    notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(cell))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    return "".join(output.get("text", "") for output in outputs), pictures


def test_msn_in_ten_minutes(tmp_path, monkeypatch):
    text, pictures = run("msn_in_ten_minutes", _SMALL_DEMO, tmp_path, monkeypatch, MSN_STEPS=2)
    assert (tmp_path / "data").is_dir(), "MSN_WORKDIR must hold the prepared data"
    assert pictures == 1 and "forward passes" in text


def test_msn_on_your_own_data(model, tmp_path, monkeypatch):
    variables = {"MSN_MODEL": model / "model", "MSN_CHATS": model / "chats.jsonl", "MSN_STEPS": 2, "MSN_NEW_TOKENS": 8}
    text, pictures = run("msn_on_your_own_data", _SMALL_ADAPTER, tmp_path, monkeypatch, **variables)
    assert list(tmp_path.glob("answers_of_*.jsonl")) and (tmp_path / "gated/adapter/adapter_config.json").is_file()
    assert pictures == 2 and "forward passes" in text
    assert f"--adapter={tmp_path}/gated/adapter --decoder=tr_jacobi" in text


def test_tr_jacobi_under_the_microscope(model, tmp_path, monkeypatch):
    variables = {"MSN_MODEL": model / "model", "MSN_ADAPTER": model / "adapter", "MSN_NEW_TOKENS": 10}
    variables["MSN_PROMPT"] = "the cat sat on the mat, and a dog sat on the"
    text, pictures = run("tr_jacobi_under_the_microscope", "", tmp_path, monkeypatch, **variables)
    assert pictures == 5
    assert "10 tokens in" in text and "accepted, emitted: " in text and "1 after the newest token: " in text


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs_and_has_a_test(path):
    assert not any(cell.get("outputs") for cell in nbformat.read(path, as_version=4).cells), "commit it without outputs"
    assert f"test_{path.stem}" in globals()
