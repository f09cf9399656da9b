"""The notebooks run from top to bottom, with a few training steps of a smaller model."""

import os
from pathlib import Path

import compilation
import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).parents[2]

# Runs before the first cell. Most of the time would go into preparing the whole library and, as nothing is optimized,
# into evaluating on 20 batches.
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


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs_and_is_committed_without_outputs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("MSN_STEPS", "2")
    monkeypatch.setenv("MSN_WORKDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("XLA_FLAGS", compilation.XLA_FLAGS)  # one device, as a reader has
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(_SMALL_DEMO))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    assert (tmp_path / "data").is_dir(), "MSN_WORKDIR must hold the prepared data"
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "forward passes" in "".join(output.get("text", "") for output in outputs)
    assert not any(cell.get("outputs") for cell in nbformat.read(path, as_version=4).cells), "commit it without outputs"
