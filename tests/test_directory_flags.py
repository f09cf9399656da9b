"""Every flag that names a directory to make refuses a path through a regular file, before any work."""

import commands
import pytest
import tiny_config

CONFIG = f"--config={tiny_config.__file__}"


@pytest.mark.parametrize(
    ("module", "flag", "others"),
    [
        ("msn_jax.train", "--workdir", [CONFIG, "--config.data.path=train.jsonl"]),
        ("msn_jax.train", "--config.data.data_dir", [CONFIG, "--config.data.path=train.jsonl", "--workdir=run"]),
        ("msn_jax.convert", "--target", ["--source=model"]),
        ("msn_jax.demo", "--workdir", []),
        ("benchmarks.stories", "--workdir", ["--model=model", "--stories=stories.txt"]),
    ],
)
def test_a_path_through_a_file_is_refused_in_one_line(module, flag, others, tmp_path):
    tiny_config.write_data(tmp_path / "train.jsonl")
    (tmp_path / "file").write_text("kept")
    cases = [
        ([*others, f"{flag}={path}"], f"{flag}={path}: {subject}is a file, not a directory")
        for path, subject in (("file", ""), ("file/sub", f"{tmp_path}/file "), ("file/sub/deeper", f"{tmp_path}/file "))
    ]
    commands.assert_refused(module, cases, tmp_path)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_directory_in_the_way_of_the_tokenizer_is_refused_in_one_line(tmp_path):
    tiny_config.write_data(tmp_path / "train.jsonl")
    for name in ("tokenizer.model", "tokenizer.json"):
        (tmp_path / f"run {name}" / name).mkdir(parents=True)
    cases = [
        (
            [CONFIG, "--config.data.path=train.jsonl", f"--workdir=run {name}"],
            f"run {name}/{name}: is a directory, where a file of the tokenizer goes: remove it",
        )
        for name in ("tokenizer.model", "tokenizer.json")
    ]
    commands.assert_refused("msn_jax.train", cases, tmp_path)
