"""Run directories of evaluate, ablate, calibrate and demo: their kind is found from their files, which are checked."""

import dataclasses
import math
from pathlib import Path

from msn_jax import json_files
from msn_jax.cli import InputError

KINDS = ("evaluate", "ablate", "calibrate", "demo")
_LOG = "samples.jsonl"  # of evaluate

_PROGRAMS = "evaluate, ablate, calibrate or demo"
_NUMBER, _SCALAR = (int, float), (str, int, float, bool, type(None))
_ABOUT = {"hardware?": str, "commit?": str, "command?": str, "date?": str, "dtype?": str, "versions?": dict}
_TEXTS = {str: "a text", int: "an integer", dict: "an object", _NUMBER: "a number", _SCALAR: "a text or a number"}
# Fields of a report by kind. A name that ends with '?' may be absent or null; [x] is a list of x; {"*": x} is an object
# with any names, but those beside "*" have a form of their own. Values in rows that should be numbers are checked where
# they are used (`number`).
_FORMS = {
    "evaluate": {
        **_ABOUT,
        "suite": str,
        "model": str,
        "adapter?": str,
        "questions": int,
        "of": int,
        "settings?": {"*": _SCALAR},
        "rows": [{"*": _SCALAR, "accepted_by_position": [_SCALAR], "speedup_by_run": [_SCALAR]}],
    },
    "ablate": {
        **_ABOUT,
        "ablation": str,
        "factors": [str],
        "runs": [{"setting": {"*": _SCALAR}, "seed?": int, "clean_loss?": _NUMBER, "noise_accuracy?": [_SCALAR]}],
        "rows": [{"*": _SCALAR}],
    },
    "calibrate": {
        **_ABOUT,
        "decoder": str,
        "model?": str,
        "chosen": str,
        "benchmark": [{"*": _SCALAR}],
        "widths": [{"*": _SCALAR}],
        "nodes": [{"*": _SCALAR}],
        "draft_accuracy?": [{"source": str, "rank": int, "match_length?": str, "accuracy": [_SCALAR]}],
    },
    "demo": {
        **_ABOUT,
        "seconds": _NUMBER,
        "models": {"*": {"clean_loss?": _NUMBER, "noise_accuracy?": [_SCALAR]}},
        "rows": [{"*": _SCALAR}],
        "answers?": [{"model": str, "decoder": str, "prompt": (str, list), "passes": [str]}],
    },
}
# Of a sample, where it has them: logs of older runs lack the last two, and MMLU's samples have no text.
_SAMPLE = {"decoder?": str, "accept_lengths?": [int]}


@dataclasses.dataclass(frozen=True)
class Source:
    """What a run left."""

    kind: str  # one of `KINDS`
    path: Path  # of its JSON file
    report: dict  # checked, see `_FORMS`
    samples: list[dict]  # of evaluate; empty otherwise

    @property
    def files(self) -> tuple[Path, Path]:
        """The run's files, which may not all exist."""
        return self.path, self.path.with_name(_LOG)


def read(path: str) -> Source:
    """The run in a directory, or the one with this JSON file.

    Raises:
      InputError: there is no such directory, it has no run, or a file is damaged or not of such a program.
    """
    flag = f"--source={path}"
    try:
        file = _find(Path(path), flag) if Path(path).is_dir() else Path(path)
        exists = file.exists()
    except OSError as error:
        raise InputError(f"{flag}: cannot be read ({error.strerror})") from error
    if not exists:
        raise InputError(f"{flag}: does not exist: name an output directory of {_PROGRAMS}")
    report = json_files.read(file)
    kind = _kind(report)
    if kind is None:
        raise InputError(f"{file}: is not a report of {_PROGRAMS}")
    _check(report, _FORMS[kind], f"{file}: ")
    log = file.with_name(_LOG)
    return Source(kind, file, report, _read_samples(log) if kind == "evaluate" and log.exists() else [])


def number(row: dict, name: str) -> float | None:
    """A finite number of a row; None where there is none."""
    value = row.get(name)
    if not isinstance(value, _NUMBER) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer beyond the largest float
        return None


def _find(directory: Path, flag: str) -> Path:
    for name in ("report.json", "tree.json"):
        if (directory / name).exists():
            return directory / name
    if (directory / _LOG).exists():
        raise InputError(f"{flag}: its evaluation is unfinished: run the same command again to finish it")
    raise InputError(f"{flag}: has no report.json or tree.json: name an output directory of {_PROGRAMS}")


def _kind(report: dict) -> str | None:
    signs = {"suite": "evaluate", "ablation": "ablate", "benchmark": "calibrate", "models": "demo"}
    return next((kind for field, kind in signs.items() if field in report), None)


def _check(value: object, form: object, where: str) -> None:
    """InputError if a JSON value has another form; see `_FORMS`."""
    if isinstance(form, dict):
        if not isinstance(value, dict):
            raise InputError(f"{where}must be an object")
        every = form.get("*")
        names = {name: form.get(name, every) for name in value} if every is not None else form
        for name, inner in names.items():
            field = name if every is not None else name.removesuffix("?")
            is_optional = every is None and name.endswith("?")
            if field not in value and not is_optional:
                raise InputError(f"{where}has no field {field!r}")
            if not is_optional or value.get(field) is not None:
                _check(value[field], inner, f"{where}field {field!r} ")
    elif isinstance(form, list):
        if not isinstance(value, list):
            raise InputError(f"{where}must be a list")
        for number_, item in enumerate(value, 1):
            _check(item, form[0], f"{where}item {number_} ")
    elif not isinstance(value, form) or (isinstance(value, bool) and form in (int, _NUMBER)):
        raise InputError(f"{where}must be {_TEXTS.get(form, 'a text or a list')}")


def _read_samples(path: Path) -> list[dict]:
    """The samples of a log, without its header and without an incomplete last line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    samples = []
    for line_number, line in enumerate(content.split(b"\n")[:-1], 1):
        where = f"{path}:{line_number}"
        sample = json_files.parse(line, where)
        if line_number == 1:
            continue
        _check(sample, _SAMPLE, f"{where}: ")
        passes = sample.get("passes") or []
        is_by_turn = isinstance(passes, list) and bool(passes) and isinstance(passes[0], list)
        _check(passes, [[str]] if is_by_turn else [str], f"{where}: field 'passes' ")
        samples.append(sample)
    return samples
