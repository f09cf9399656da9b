"""Training data: the corpora, and the TFDS datasets that store their records.

Three corpora, each a plain function that returns its records by split, `{'train': [...], 'validation': [...]}`:

  python_functions  functions of the running interpreter's own standard library: {'prompt', 'response', 'path'}
  python_files      its whole source files: {'text', 'path'}
  sft_jsonl         a user's own file (`record_files.py`): {'messages', 'tools'}, {'prompt', 'response'} or {'text'}

`load` stores the records of a source once, as a TFDS dataset (array_record, so that TensorFlow is never imported), and
reads them from there. Without TFDS, as on bare GPU hosts, the function itself returns the same records in the same
order.

Invariants: the split depends only on the content (a file's relative path, a record's text), never on the machine or a
random seed; no file of the standard library has records in both splits; no response or prompt occurs twice.
"""

import ast
import functools
import hashlib
import importlib
import io
import json
import shutil
import sys
import sysconfig
import tokenize
import uuid
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path

from msn_jax.cli import InputError, make_directory
from msn_jax.config import DataConfig
from msn_jax.data.record_files import HELD_OUT, hash_fraction, read_bytes, sft_jsonl

SPLITS = ("train", "validation")
BAD = "bad"  # sft_jsonl: {'error', 'location'} of every skipped record, stored like a split

Records = dict[str, list[dict]]  # by split

_VERSION = "2.1.0"  # of the stored records; raise it when a function below returns different ones
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
_TABLES = {"encodings", "pydoc_data"}  # large character tables and help texts, with hardly any code


def load(cfg: DataConfig, split: str) -> list[dict]:
    """The records of one split of `cfg.builder`, as listed above; those of a user's file also have a 'location'.

    The first call prepares the corpus under `cfg.data_dir`, later ones reuse it. Only the call that reads a user's file
    warns of fields that are not used.

    Args:
      cfg: `builder`, `data_dir` and, for sft_jsonl, `path` and `on_bad_record`.
      split: 'train' or 'validation'.

    Raises:
      InputError: an unknown builder, a `data_dir` that cannot be written to, or a fault in the user's file, with its
        name and line.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: known are {', '.join(SPLITS)}")
    return load_splits(cfg, (split,))[split]


def load_splits(cfg: DataConfig, splits: Sequence[str] = (*SPLITS, BAD)) -> Records:
    """Like `load`, for several splits, of which one may be `BAD`."""
    if cfg.builder not in _FIELDS:
        raise InputError(f"--config.data.builder: unknown builder {cfg.builder!r}: known are {', '.join(_FIELDS)}")
    if cfg.builder == "sft_jsonl" and not cfg.path:
        raise InputError("--config.data.path: sft_jsonl needs a .json or .jsonl file")
    if _has_tfds():
        root = make_directory(cfg.data_dir, "--config.data.data_dir") / f"{cfg.builder}-{_VERSION}-{_source_key(cfg)}"
        if not root.exists():
            _prepare(cfg.builder, _rows(cfg), root)
        rows = {split: _read(cfg.builder, root, split) for split in splits}
    else:
        rows = _rows(cfg)
    return {split: [_unpack(cfg, row) for row in rows.get(split, [])] for split in splits}


# --- The standard library


def python_functions(root: Path | None = None) -> Records:
    """Functions with a docstring and further statements, from the files under `root` (default: this library).

    The prompt is the signature and the docstring, the response the rest of the body, both as in the source but moved
    to column 0: prompt + response is the function's source. Nested functions stay part of the outer function.
    """
    records: Records = {split: [] for split in SPLITS}
    seen: set[str] = set()
    for path, text in _source_files(root):
        for prompt, response in _functions(text):
            keys = {"prompt " + _normalize_space(prompt), "response " + _normalize_space(response)}
            if seen.isdisjoint(keys):
                records[split_of(path)].append({"prompt": prompt, "response": response, "path": path})
            seen |= keys
    return records


def python_files(root: Path | None = None) -> Records:
    """Whole source files under `root` (default: this interpreter's library)."""
    records: Records = {split: [] for split in SPLITS}
    for path, text in _source_files(root):
        if text.strip():
            records[split_of(path)].append({"text": text, "path": path})
    return records


def split_of(path: str) -> str:
    """'validation' for about 5% of the relative paths, the same on every machine."""
    return "validation" if hash_fraction(path) < HELD_OUT else "train"


def _source_files(root: Path | None) -> Iterator[tuple[str, str]]:
    """(relative path with slashes, text) of the library's own files, sorted by path."""
    root = root or Path(sysconfig.get_path("stdlib"))
    relative = (file.relative_to(root) for file in root.rglob("*.py"))
    for path in sorted(path.as_posix() for path in relative if not (_NOT_LIBRARY | _TABLES).intersection(path.parts)):
        try:
            with tokenize.open(root / path) as file:
                yield path, file.read()
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue  # a broken link, or an intentionally invalid file


def _functions(text: str) -> Iterator[tuple[str, str]]:
    """(prompt, response) of every function of a module that has both."""
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = io.StringIO(text).readlines()  # splits like the parser, at newlines only; str.splitlines splits at others
    for node in _outermost_functions(module):
        if len(node.body) < 2 or ast.get_docstring(node, clean=False) is None:
            continue
        docstring, following = node.body[:2]
        if docstring.lineno <= node.lineno or following.lineno <= docstring.end_lineno:
            continue  # several statements on a line
        indent = lines[node.lineno - 1][: node.col_offset]

        def dedented(first: int, last: int, indent: str = indent) -> str:
            return "".join(line.removeprefix(indent) for line in lines[first:last])

        yield dedented(node.lineno - 1, docstring.end_lineno), dedented(docstring.end_lineno, node.end_lineno)


def _outermost_functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        elif isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _outermost_functions(child)


def _normalize_space(text: str) -> str:
    return " ".join(text.split())


# --- Storage

_FIELDS = {  # of the stored rows; all text
    "python_functions": ("prompt", "response", "path"),
    "python_files": ("text", "path"),
    "sft_jsonl": ("record", "location"),  # the record as JSON, because its fields vary
}


def _rows(cfg: DataConfig) -> Records:
    """The stored form of each record: the fields listed in `_FIELDS`."""
    if cfg.builder == "python_functions":
        return python_functions()
    if cfg.builder == "python_files":
        return python_files()
    splits = sft_jsonl(cfg.path, cfg.on_bad_record)
    return {split: [_pack(cfg, record) for record in records] for split, records in splits.items()}


def _pack(cfg: DataConfig, record: dict) -> dict:
    content = {name: field for name, field in record.items() if name != "location"}
    # Without the path: the stored records also serve a copy of the file in another directory.
    location = record["location"].removeprefix(str(Path(cfg.path)))
    return {"record": json.dumps(content), "location": location}


def _unpack(cfg: DataConfig, row: dict) -> dict:
    if cfg.builder != "sft_jsonl":
        return row
    return {**json.loads(row["record"]), "location": f"{Path(cfg.path)}{row['location']}"}


def _source_key(cfg: DataConfig) -> str:
    """Identifies the source of the records: the interpreter and its library, or the file's content and its reading."""
    if cfg.builder == "sft_jsonl":
        path = Path(cfg.path)
        digest = hashlib.sha256(read_bytes(path)).hexdigest()[:16]
        return f"{digest}-{path.suffix[1:]}-{cfg.on_bad_record}"
    library = hashlib.sha256(sysconfig.get_path("stdlib").encode()).hexdigest()[:8]
    return f"{sys.version.split()[0]}-{library}"


def _has_tfds() -> bool:
    """Whether all packages that TFDS needs to write and read array_record are installed."""
    try:
        for package in ("array_record.python.array_record_module", "importlib_resources", "tensorflow_datasets"):
            importlib.import_module(package)
    except ImportError:
        return False
    return True


@functools.cache
def builder_class(builder: str) -> type:
    """The TFDS builder of a corpus. Created on demand, because not every host has TFDS."""
    import tensorflow_datasets as tfds

    class Corpus(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Stores rows by split, in their order; only preparing needs `records`."""

        name = builder
        VERSION = tfds.core.Version(_VERSION)

        def __init__(self, *, data_dir: str, records: Records | None = None):
            self._records = records or {}
            super().__init__(data_dir=data_dir)

        def _info(self) -> tfds.core.DatasetInfo:
            features = {field: tfds.features.Text() for field in _FIELDS[builder]}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
            del dl_manager  # nothing is downloaded
            # TFDS refuses empty splits.
            return {split: self._generate_examples(split) for split, rows in self._records.items() if rows}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
            yield from enumerate(self._records[split])

    return Corpus


def _prepare(builder: str, records: Records, root: Path) -> None:
    """Writes the dataset to `root` atomically, also when several processes do so at the same time."""
    import tensorflow_datasets as tfds

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    # TFDS also writes to a temporary directory first, but processes with the same random seed give it the same name.
    temporary = root.with_name(f"{root.name}.incomplete-{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        with redirect_stdout(io.StringIO()):  # TFDS announces a download
            builder_class(builder)(data_dir=str(temporary), records=records).download_and_prepare(
                file_format="array_record"
            )
        try:
            temporary.rename(root)
        except OSError:
            if not root.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _read(builder: str, root: Path, split: str) -> list[dict]:
    """The stored rows of a split; an empty split is not stored."""
    try:
        dataset = builder_class(builder)(data_dir=str(root))
        if split not in dataset.info.splits:
            return []
        source = dataset.as_data_source(split=split)
        rows = source.__getitems__(range(len(source)))
    except Exception as error:  # of many types: TFDS, protobuf and array_record have their own
        raise InputError(
            f"{root}: this prepared data is damaged: delete the directory, and the next run prepares it again"
        ) from error
    return [{field: row[field].decode() for field in _FIELDS[builder]} for row in rows]
