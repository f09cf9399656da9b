"""The corpora, and their storage with and without TFDS."""

import ast
import sys
import sysconfig
from pathlib import Path

import pytest
from conversations import CHAT, GOOD, write_lines

from msn_jax.cli import InputError
from msn_jax.config import DataConfig
from msn_jax.data import corpora

LIBRARY = {
    "shapes.py": '''"""Shapes."""


def area(width, height):
    """Returns the area."""

    # of a rectangle
    return width * height


class Shape:
    @property
    def name(self):
        """The name,
        in words.
        """
        text = """kept
as it is"""
        return text

    async def draw(self, pen: "Pen" = None) -> None:
        "Draws."
        def stroke():
            """Inner."""
            return pen
        return stroke()

    def no_docstring(self):
        return 1

    def only_docstring(self):
        """Nothing else."""

    def one_line(self): "Doc."; return 2

    def joined(self):
        "Doc."; return 3


if True:
    try:
        import missing
    except ImportError:
        def fallback(x):
            """Replaces it."""
            return x
''',
    "copy.py": '''def other_area(w, h):
    """Same body, other name."""

    # of a rectangle
    return  width * height


def area(width, height):
    """Returns the area."""
    return height * width


def new():
    """New."""
    return 0
''',
    "pkg/test/test_shapes.py": 'def f():\n    """In a test directory."""\n    return 1\n',
    "site-packages/other.py": 'def g():\n    """Of another package."""\n    return 1\n',
    "lib2to3/old.py": 'def h():\n    """Old."""\n    return 1\n',
    "broken.py": "def (:\n",
    "empty.py": "\n",
}


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small standard library, with enough files for both splits."""
    root = tmp_path / "library"
    files = LIBRARY | {f"many/m{i}.py": f'def f{i}():\n    """Doc {i}."""\n    return {i}\n' for i in range(60)}
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (root / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nNAME = '\xe9'\n")
    (root / "undecodable.py").write_bytes(b"NAME = '\xe9'\n")
    real = sysconfig.get_path
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root) if name == "stdlib" else real(name))
    return root


def paths(records):
    return {record["path"] for record in records}


def source_of(function):
    return function["prompt"] + function["response"]


# --- The standard library


def test_functions_are_split_after_the_docstring(library):
    records = corpora.python_functions(library)
    functions = {r["prompt"].split("(")[0]: r for split in records.values() for r in split if "many" not in r["path"]}
    assert functions["def area"] == {
        "prompt": 'def area(width, height):\n    """Returns the area."""\n',
        "response": "    return height * width\n",
        "path": "copy.py",
    }
    assert functions["def name"]["prompt"] == 'def name(self):\n    """The name,\n    in words.\n    """\n'
    assert functions["def name"]["response"] == '    text = """kept\nas it is"""\n    return text\n'
    assert functions["async def draw"]["response"].endswith(
        '        """Inner."""\n        return pen\n    return stroke()\n'
    )
    # 'shapes.py' follows 'copy.py': its `area` has the same prompt as one function there and the same body as another.
    expected = ["def other_area", "def area", "def new", "def name", "async def draw", "def fallback"]
    assert list(functions) == expected


def test_prompt_and_response_are_the_source(library):
    lines = {
        path.relative_to(library).as_posix(): path.read_text(encoding="utf-8").split("\n")
        for path in library.rglob("m*.py")
    }
    records = corpora.python_functions(library)
    for function in records["train"] + records["validation"]:
        source = source_of(function)
        (node,) = ast.parse(source).body
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        assert ast.get_docstring(node) and len(node.body) > 1
        if function["path"] in lines:
            assert source.split("\n") == lines[function["path"]]


def test_functions_of_the_real_library_parse_and_occur_in_their_files():
    root = Path(sysconfig.get_path("stdlib")) / "json"
    records = corpora.python_functions(root)
    functions = records["train"] + records["validation"]
    assert any(source_of(function).startswith("def dumps(obj, *,") for function in functions)
    for function in functions:
        text = (root / function["path"]).read_text(encoding="utf-8")
        ast.parse(source_of(function))
        assert all(line.strip() in text for line in source_of(function).split("\n"))


def test_files_are_whole(library):
    records = corpora.python_files(library)
    texts = {record["path"]: record["text"] for split in records.values() for record in split}
    assert texts["shapes.py"] == LIBRARY["shapes.py"]
    assert texts["latin.py"].endswith("NAME = 'é'\n")
    named = {path for path in texts if not path.startswith("many/")}
    assert named == {"shapes.py", "copy.py", "broken.py", "latin.py"}


def test_splits_are_disjoint_by_file_and_shared_by_both_corpora(library):
    functions, files = corpora.python_functions(library), corpora.python_files(library)
    assert paths(functions["train"]).isdisjoint(paths(functions["validation"]))
    assert paths(files["train"]).isdisjoint(paths(files["validation"]))
    assert paths(functions["train"]).isdisjoint(paths(files["validation"]))
    assert files["validation"] and functions["validation"]
    assert paths(functions["validation"]) <= paths(files["validation"])


def test_about_five_percent_of_the_files_are_held_out():
    held_out = [corpora.split_of(f"package/module_{i}.py") for i in range(4000)].count("validation")
    assert 150 < held_out < 250
    assert corpora.split_of("json/decoder.py") == corpora.split_of("json/decoder.py") == "train"


# --- Storage


def data_config(tmp_path, builder, path=""):
    return DataConfig(builder, str(tmp_path / "data"), row_length=16, batch_size=2, path=str(path))


@pytest.mark.parametrize("builder", ["python_functions", "python_files", "sft_jsonl"])
def test_records_are_the_same_with_and_without_tfds(builder, library, tmp_path, monkeypatch, capfd):
    rows = [{"prompt": str(i), "response": "é\0"} for i in range(30)] + [{"messages": CHAT}]
    cfg = data_config(tmp_path, builder, write_lines(tmp_path / "chat.jsonl", rows))
    stored = {split: corpora.load(cfg, split) for split in corpora.SPLITS}
    assert len(list((tmp_path / "data").rglob("*.array_record*"))) == 2
    assert "tensorflow" not in sys.modules
    assert capfd.readouterr() == ("", "")

    with monkeypatch.context() as patch:
        patch.setattr(corpora, "_rows", None)  # stored records are not prepared again
        assert {split: corpora.load(cfg, split) for split in corpora.SPLITS} == stored

    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    cfg.data_dir = str(tmp_path / "unused")
    assert {split: corpora.load(cfg, split) for split in corpora.SPLITS} == stored  # order included
    assert not (tmp_path / "unused").exists()
    assert stored["train"] and stored["validation"]


def test_every_source_and_reading_of_it_is_prepared_separately(library, tmp_path, monkeypatch):
    path = write_lines(tmp_path / "chat.jsonl", [GOOD])
    cfg = data_config(tmp_path, "sft_jsonl", path)
    assert corpora.load(cfg, "train") == [{**GOOD, "location": f"{path}:1"}]
    assert corpora.load(cfg, "validation") == []
    write_lines(path, [GOOD | {"response": "c"}])
    assert corpora.load(cfg, "train") == [{"prompt": "a", "response": "c", "location": f"{path}:1"}]

    write_lines(path, [GOOD] * 40 + [3])
    for _ in range(2):  # prepared, then reused
        cfg.on_bad_record = "skip"
        assert len(corpora.load(cfg, "train")) + len(corpora.load(cfg, "validation")) == 40
        expected = [{"error": "expected an object, not a number", "location": f"{path}:41"}]
        assert corpora.load_splits(cfg)["bad"] == expected
        cfg.on_bad_record = "stop"
        with pytest.raises(InputError, match=r"chat\.jsonl:41: expected an object"):
            corpora.load(cfg, "train")

    cfg = data_config(tmp_path, "python_files")
    before = corpora.load(cfg, "train")
    other = tmp_path / "other"
    other.mkdir()
    (other / "only.py").write_text("ONLY = 1\n", encoding="utf-8")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(other))
    assert corpora.load(cfg, "train") == [{"text": "ONLY = 1\n", "path": "only.py"}] != before


def test_a_copy_of_a_file_has_locations_of_its_own(tmp_path):
    for name in ("one.jsonl", "two.jsonl"):
        path = write_lines(tmp_path / name, [GOOD])
        assert corpora.load(data_config(tmp_path, "sft_jsonl", path), "train")[0]["location"] == f"{path}:1"
    assert len(list((tmp_path / "data").iterdir())) == 1


def test_an_interrupted_preparation_is_discarded(library, tmp_path, monkeypatch):
    cfg = data_config(tmp_path, "python_files")
    writer = corpora.builder_class("python_files")
    generate = writer._generate_examples

    def killed(self, split):
        for i, example in enumerate(generate(self, split)):
            if i == 20:
                raise KeyboardInterrupt
            yield example

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_generate_examples", killed)
        with pytest.raises(KeyboardInterrupt):
            corpora.load(cfg, "train")
    assert not list((tmp_path / "data").iterdir())
    # A killed process leaves its temporary directory.
    (tmp_path / "data" / "python_files-x.incomplete-0" / "python_files" / "1.0.0").mkdir(parents=True)
    assert corpora.load(cfg, "train") == corpora.python_files(library)["train"]


def test_processes_may_prepare_the_same_source_together(library, tmp_path):
    cfg = data_config(tmp_path, "python_files")
    expected = corpora.load(cfg, "train")
    (root,) = (tmp_path / "data").iterdir()
    corpora._prepare("python_files", corpora.python_files(library), root)
    assert [path.name for path in (tmp_path / "data").iterdir()] == [root.name]
    assert corpora.load(cfg, "train") == expected


def test_damaged_prepared_data_is_refused_with_its_directory(library, tmp_path):
    cfg = data_config(tmp_path, "python_files")
    corpora.load(cfg, "train")
    (root,) = (tmp_path / "data").iterdir()
    for path in [*root.rglob("*train.array_record*"), *root.rglob("dataset_info.json")]:
        path.write_bytes(path.read_bytes()[:50])
        with pytest.raises(InputError) as caught:
            corpora.load(cfg, "train")
        expected = f"{root}: this prepared data is damaged: delete the directory, and the next run prepares it again"
        assert str(caught.value) == expected


def test_invalid_settings_are_refused(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "a", "response": "b"}])
    for data_dir, message in (
        ("", "--config.data.data_dir: is empty: name a directory"),
        (str(path), f"--config.data.data_dir={path}: is a file, not a directory: name another"),
    ):
        cfg = data_config(tmp_path, "sft_jsonl", path)
        cfg.data_dir = data_dir
        with pytest.raises(InputError) as caught:
            corpora.load(cfg, "train")
        assert str(caught.value) == message
    with pytest.raises(InputError) as caught:
        corpora.load(data_config(tmp_path, "c4"), "train")
    known = "python_functions, python_files, sft_jsonl"
    assert str(caught.value) == f"--config.data.builder: unknown builder 'c4': known are {known}"
    with pytest.raises(InputError) as caught:
        corpora.load(data_config(tmp_path, "sft_jsonl"), "train")
    assert str(caught.value) == "--config.data.path: sft_jsonl needs a .json or .jsonl file"
    with pytest.raises(ValueError, match="unknown split 'test'"):
        corpora.load(data_config(tmp_path, "python_files"), "test")
