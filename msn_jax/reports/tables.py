"""Tables of a page: values as text, with their standard errors."""

import dataclasses
from collections.abc import Mapping, Sequence

from msn_jax.reports.sources import number

_ERROR = "_stderr"
_SHARES = (
    *("exact", "exact_share", "accuracy", "strict_match", "flexible_match", "repeated_4_grams", "acceptance"),
    *("pass@1", "pass@10", "pass@100", "noise_accuracy"),
)
_DIGITS = {
    "speedup": 2,
    "clean_loss": 3,
    "mean_accepted_tokens": 2,
    "estimated_mean_accepted_tokens": 2,
    "tokens_per_second": 1,
    "estimated_tokens_per_second": 1,
    "tokens_per_turn": 1,
    "milliseconds": 2,
}
_LABELS = {
    "exact_share": "exact",
    "mean_accepted_tokens": "mean accepted tokens",
    "estimated_mean_accepted_tokens": "estimated mean accepted tokens",
    "estimated_tokens_per_second": "estimated tokens/s",
    "tokens_per_second": "tokens/s",
    "milliseconds": "ms per pass",
    "repeated_4_grams": "repeated 4-grams",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One value."""

    text: str
    error: str = ""  # standard error
    is_number: bool = False
    note: str = ""  # small, below the value


@dataclasses.dataclass(frozen=True)
class Table:
    """A table; `note` explains it."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""

    @property
    def numbers(self) -> list[bool]:
        """For each column, whether all its values are numbers or missing."""
        return [all(row[i].is_number or row[i].text == "–" for row in self.rows) for i in range(len(self.columns))]

    @property
    def begins_group(self) -> list[bool]:
        """For each row, whether it begins a group: rows with the same first value, mostly more than one."""
        names = [row[0].text if row else "" for row in self.rows]
        begins = [number > 0 and name != names[number - 1] for number, name in enumerate(names)]
        return begins if 2 * sum(begins) < len(begins) else [False] * len(begins)


def of_rows(title: str, rows: Sequence[Mapping], note: str = "") -> Table:
    """All fields of JSON rows, in their order, but lists; `x_stderr` goes into the column of `x`."""
    fields = (item for row in rows for item in row.items())
    is_column = {name: not name.endswith(_ERROR) and not isinstance(value, list) for name, value in fields}
    names = [name for name in is_column if is_column[name]]
    cells = [[cell(row, name) for name in names] for row in rows]
    return Table(title, [label(name) for name in names], cells, note)


def label(name: str) -> str:
    """The heading for a field."""
    return _LABELS.get(name, name.replace("_", " "))


def cell(row: Mapping, name: str, note: str = "") -> Cell:
    """The value of a field with its standard error, if the row has one."""
    value, error = number(row, name), number(row, name + _ERROR)
    if value is None:
        other = row.get(name)
        is_missing = other is None or isinstance(other, float)  # NaN or infinite
        return Cell("–" if is_missing else ("yes" if other else "no") if isinstance(other, bool) else str(other))
    return Cell(show(name, value), "" if error is None else _show_error(name, value, error), True, note)


def show(name: str, value: float) -> str:
    """A number in the form of its field: shares as percentages, speedups with a factor sign."""
    if name in _SHARES:
        return f"{value:.1%}"
    if name == "speedup":
        return f"{value:.2f}×"
    if name in _DIGITS:
        return f"{value:,.{_DIGITS[name]}f}"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"


def _show_error(name: str, value: float, error: float) -> str:
    if name in _SHARES:
        return f"{100 * error:.1f}"
    if name in _DIGITS:
        return f"{error:.{_DIGITS[name]}f}"
    return f"{error:,.1f}" if abs(value) >= 100 else f"{error:.2g}"
