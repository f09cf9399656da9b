"""The training data: where records come from, and the TFDS datasets that keep them.

Three corpora, each a plain function that returns its records by split, `{'train': [...], 'validation': [...]}`:

  python_functions  functions of the running interpreter's own standard library: {'prompt', 'response', 'path'}
  python_files      its whole source files: {'text', 'path'}
  sft_jsonl         a user's own file: {'messages'}, {'prompt', 'response'} or {'text'}

`load` stores them once per source as a TFDS dataset (array_record, so TensorFlow is never imported) and reads it back.
Where TFDS is not installed, as on bare GPU hosts, the same records in the same order come straight from the function.

Invariants: a split is a function of the content (a file's relative path, a record's text), never of the machine or of
chance; no file of the standard library has records in both splits; no response or prompt occurs twice.
"""

import ast
import functools
import hashlib
import importlib
import io
import json
import os
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
from msn_jax.data.tokenizer import ROLES

SPLITS = ("train", "validation")
HELD_OUT = 0.05  # of the files or records, about

Records = dict[str, list[dict]]  # by split

_VERSION = "1.0.0"  # of the prepared records: raise it whenever a function below returns others
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
_TABLES = {"encodings", "pydoc_data"}  # character tables and help texts: large, and hardly Python
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def load(cfg: DataConfig, split: str) -> list[dict]:
    """Records of `cfg.builder`: {'prompt', 'response'}, {'messages': [{'role', 'content'}]} or {'text'}, all str.

    Prepares the corpus under `cfg.data_dir` at the first call and reuses it afterwards.

    Args:
      cfg: `builder`, `data_dir` and, for sft_jsonl, `path`.
      split: 'train' or 'validation'.

    Raises:
      InputError: an unknown builder, a `data_dir` that cannot be written to, or a problem with the user's file, with
        its name and line.
    """
    if cfg.builder not in _FIELDS:
        raise InputError(f"--config.data.builder: unknown builder {cfg.builder!r}: known are {', '.join(_FIELDS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: known are {', '.join(SPLITS)}")
    if cfg.builder == "sft_jsonl" and not cfg.path:
        raise InputError("--config.data.path: sft_jsonl needs a .json or .jsonl file")
    if not _has_tfds():
        return [_unpack(cfg.builder, row) for row in _rows(cfg)[split]]
    root = make_directory(cfg.data_dir, "--config.data.data_dir") / f"{cfg.builder}-{_VERSION}-{_source_key(cfg)}"
    if not root.exists():
        _prepare(cfg.builder, _rows(cfg), root)
    return [_unpack(cfg.builder, row) for row in _read(cfg.builder, root, split)]


# The standard library.


def python_functions(root: Path | None = None) -> Records:
    """Functions with a docstring and a further body, found under `root` (default: this interpreter's library).

    The prompt is signature and docstring, the response the rest of the body, as in the source but moved to column 0:
    prompt + response is the function's source. Functions inside functions stay part of them.
    """
    records: Records = {split: [] for split in SPLITS}
    seen: set[str] = set()
    for path, text in _source_files(root):
        for prompt, response in _functions(text):
            prints = {"prompt " + _normalised(prompt), "response " + _normalised(response)}
            if seen.isdisjoint(prints):
                records[split_of(path)].append({"prompt": prompt, "response": response, "path": path})
            seen |= prints
    return records


def python_files(root: Path | None = None) -> Records:
    """Whole source files found under `root` (default: this interpreter's library)."""
    records: Records = {split: [] for split in SPLITS}
    for path, text in _source_files(root):
        if text.strip():
            records[split_of(path)].append({"text": text, "path": path})
    return records


def split_of(path: str) -> str:
    """'validation' for about 5% of the relative paths, the same ones everywhere."""
    return "validation" if _fraction(path) < HELD_OUT else "train"


def _source_files(root: Path | None) -> Iterator[tuple[str, str]]:
    """(relative path with slashes, text) of the library's own files, in the order of their paths."""
    root = root or Path(sysconfig.get_path("stdlib"))
    relative = (file.relative_to(root) for file in root.rglob("*.py"))
    for path in sorted(path.as_posix() for path in relative if not (_NOT_LIBRARY | _TABLES).intersection(path.parts)):
        try:
            with tokenize.open(root / path) as file:
                yield path, file.read()
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue  # a broken link, or a file that is wrong on purpose


def _functions(text: str) -> Iterator[tuple[str, str]]:
    """(prompt, response) of every function of a module that has both."""
    try:
        module = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = io.StringIO(text).readlines()  # only at newlines, as the parser counts; str.splitlines knows other ends
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


def _normalised(text: str) -> str:
    return " ".join(text.split())


# A user's own conversations.


def sft_jsonl(path: str | os.PathLike) -> Records:
    """Conversations of a .jsonl (one record a line) or .json file (a list of records).

    Each record may be Alpaca (instruction, input, output), OpenAI (messages), ShareGPT (conversations), {prompt,
    response} or {text}; it comes out as {'messages'}, or as it was for the last two. Other keys are ignored.
    About 5% of the records, chosen by their content, are validation; of two or more at least one is.

    Raises:
      InputError: names the file, the line (the record in a .json file) and what is wrong.
    """
    records = [_parse_record(value, where) for where, value in _read_values(Path(path))]
    if not records:
        raise InputError(f"{path}: no records: expected Alpaca, messages, conversations, prompt/response or text")
    fractions = [_fraction(json.dumps(record, sort_keys=True)) for record in records]
    order = sorted(range(len(records)), key=fractions.__getitem__)
    least, most = (1, len(records) - 1) if len(records) > 1 else (0, 0)
    count = min(max(sum(fraction < HELD_OUT for fraction in fractions), least), most)
    held_out = set(order[:count])
    return {
        "train": [record for i, record in enumerate(records) if i not in held_out],
        "validation": [record for i, record in enumerate(records) if i in held_out],
    }


def _read_values(path: Path) -> Iterator[tuple[str, object]]:
    """(where it stands, value) of every record of the file."""
    text = _read_bytes(path)
    try:
        text = text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + text.count(b"\n", 0, error.start)
        raise InputError(f"{path}:{line}: not UTF-8: save the file as UTF-8") from error
    if path.suffix == ".json":
        values = _parse_json(text, path, 1, "; a file with one record per line is named .jsonl") if text.strip() else []
        if not isinstance(values, list):
            raise InputError(f"{path}: expected a list of records, found {_kind(values)}")
        yield from ((f"{path}: record {number}", value) for number, value in enumerate(values, 1))
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path}:{number}", _parse_json(line, path, number, "; expected one record per line")


def _read_bytes(path: Path) -> bytes:
    if path.suffix not in (".json", ".jsonl"):
        raise InputError(f"{path}: expected a .json or .jsonl file")
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _parse_json(text: str, path: Path, first_line: int, advice: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(f"{path}:{line}: malformed JSON: {error.msg} (column {error.colno}){advice}") from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise InputError(f"{path}:{first_line}: malformed JSON: {error}{advice}") from error


def _parse_record(value: object, where: str) -> dict:
    """One record of any known form as {'prompt', 'response'} or {'messages'}."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object, found {_kind(value)}")
    if "messages" in value:
        return {"messages": _parse_turns(value["messages"], "role", "content", {}, where)}
    system = [{"role": "system", "content": _text(value, "system", where)}] if value.get("system") else []
    if "conversations" in value:
        return {"messages": system + _parse_turns(value["conversations"], "from", "value", _SHAREGPT_ROLES, where)}
    if "instruction" in value and "output" in value:
        if value.get("history"):
            raise InputError(f"{where}: 'history' is not read: write the earlier turns as messages")
        parts = [_text(value, "instruction", where), _text(value, "input", where) if value.get("input") else ""]
        question = {"role": "user", "content": "\n".join(part for part in parts if part)}
        return {"messages": [*system, question, {"role": "assistant", "content": _text(value, "output", where)}]}
    if "prompt" in value and "response" in value:
        return {key: _text(value, key, where) for key in ("prompt", "response")}
    if "text" in value:
        return {"text": _text(value, "text", where)}
    keys = ", ".join(sorted(value)) or "none"
    raise InputError(
        f"{where}: unknown form (keys: {keys}): expected messages, conversations, instruction and output, "
        "prompt and response, or text"
    )


def _parse_turns(turns: object, role_key: str, text_key: str, names: dict[str, str], where: str) -> list[dict]:
    if not isinstance(turns, list):
        raise InputError(f"{where}: expected a list of turns, found {_kind(turns)}")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise InputError(f"{where}: turn {number}: expected an object, found {_kind(turn)}")
        role = turn.get(role_key)
        role = names.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise InputError(f"{where}: unknown role {turn.get(role_key)!r}: known roles are {', '.join(ROLES)}")
        messages.append({"role": role, "content": _text(turn, text_key, f"{where}: turn {number}")})
    if not any(message["role"] == "assistant" for message in messages):
        raise InputError(f"{where}: no assistant turn: there is nothing to learn")
    return messages


def _text(value: dict, key: str, where: str) -> str:
    """A string, or the parts {'type': 'text', 'text': str} that some write instead ('value' for 'text' too)."""
    content = value.get(key)
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text", part.get("value")) if isinstance(part, dict) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where}: {key!r} is not text")
    return "".join(texts)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


# Storage.

_FIELDS = {  # of the stored rows; all text
    "python_functions": ("prompt", "response", "path"),
    "python_files": ("text", "path"),
    "sft_jsonl": ("record",),  # as JSON, because its forms differ
}


def _rows(cfg: DataConfig) -> Records:
    """What is stored for each record: the fields of `_FIELDS`."""
    if cfg.builder == "python_functions":
        return python_functions()
    if cfg.builder == "python_files":
        return python_files()
    records = sft_jsonl(cfg.path)
    return {split: [{"record": json.dumps(record)} for record in records[split]] for split in SPLITS}


def _unpack(builder: str, row: dict) -> dict:
    return json.loads(row["record"]) if builder == "sft_jsonl" else row


def _source_key(cfg: DataConfig) -> str:
    """Names what the records were made from: the interpreter and its library, or the file's content."""
    if cfg.builder == "sft_jsonl":
        return hashlib.sha256(_read_bytes(Path(cfg.path))).hexdigest()[:16]
    library = hashlib.sha256(sysconfig.get_path("stdlib").encode()).hexdigest()[:8]
    return f"{sys.version.split()[0]}-{library}"


def _fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8], "big") / 2**64


def _has_tfds() -> bool:
    """Whether everything is installed that TFDS needs to write and read array_record."""
    try:
        for package in ("array_record.python.array_record_module", "importlib_resources", "tensorflow_datasets"):
            importlib.import_module(package)
    except ImportError:
        return False
    return True


@functools.cache
def builder_class(builder: str) -> type:
    """The TFDS builder of one of the corpora. Made on demand, because not every host has TFDS."""
    import tensorflow_datasets as tfds

    class Corpus(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Stores rows by split, in their order; `records` is needed for preparing only."""

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
            return {split: self._generate_examples(split) for split in SPLITS if self._records[split]}

        def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
            yield from enumerate(self._records[split])

    return Corpus


def _prepare(builder: str, records: Records, root: Path) -> None:
    """Writes the dataset to `root`, whole or not at all, also when several processes do so at once."""
    import tensorflow_datasets as tfds

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    # TFDS also writes to a temporary directory first, but its name repeats between processes that were seeded alike.
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


def _read(builder: str, root: Path, split: str) -> Sequence[dict]:
    try:
        dataset = builder_class(builder)(data_dir=str(root))
        if split not in dataset.info.splits:
            return []
        source = dataset.as_data_source(split=split)
        rows = source.__getitems__(range(len(source)))
    except Exception as error:  # of many types: TFDS, protobuf and array_record have their own
        raise InputError(
            f"{root}: the prepared data is damaged: delete this directory to have it made again"
        ) from error
    return [{field: row[field].decode() for field in _FIELDS[builder]} for row in rows]
