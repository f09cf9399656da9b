"""Plots as SVG for the page. Colours are CSS variables of the page, so that they follow its theme.

matplotlib draws with placeholder colours, which `_to_svg` replaces by variables. Text stays text, in the page's font.
"""

import hashlib
import io
import itertools
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_WIDTH = 4.3  # inches; the page scales a plot to its column
_LINE_CHARACTERS = 54  # of a legend
_MARK_CHARACTERS = 6
_LINE_HEIGHT = 0.165  # inches
_MAX_TEXT = 30  # characters of a label
_MAX_BIN = 12  # accepted lengths above are one bin
# Placeholders for the variables of `page.css`: any distinct colours that nothing else has.
_VARIABLES = {"#010203": "--ink", "#010204": "--muted", "#010205": "--line", "#010206": "--paper"}
_INK, _MUTED, _LINE, _PAPER = _VARIABLES
_SERIES = [f"#0a0b{number:02x}" for number in range(1, 7)]
_VARIABLES |= {colour: f"--series-{number}" for number, colour in enumerate(_SERIES, 1)}
_MARKERS = "osD^vP"
_DECODERS = ("auto", "tr_jacobi", "jacobi", "prompt_lookup", "draft_model")  # each has the same colour in every plot
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a label may have any characters
    "font.size": 8.5,
    "legend.fontsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "text.color": _INK,
    "xtick.color": _LINE,
    "ytick.color": _LINE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _INK,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "grid.color": _LINE,
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


class Point(NamedTuple):
    """A value with its standard error (None: unknown), at a place of one axis."""

    place: str
    value: float
    error: float | None = None


class Spot(NamedTuple):
    """A point of `front`."""

    label: str
    x: float
    y: float
    x_error: float | None = None
    y_error: float | None = None


class Plot(NamedTuple):
    """A plot with its heading, and a sentence about it."""

    title: str
    svg: Markup
    note: str


def dots(title: str, series: dict[str, list[Point]], xlabel: str, note: str, reference: float | None = None) -> Plot:
    """Values of several series at named places, as dots with error bars; places are on the vertical axis.

    Args:
      title: heading.
      series: points by name.
      xlabel: what the values are.
      note: a sentence.
      reference: value of a vertical line.
    """
    places = list(dict.fromkeys(point.place for points in series.values() for point in points))
    height = 0.5 + len(places) * max(0.24, 0.13 * len(series) + 0.1)
    with _figure(height, series) as (figure, axes):
        styles = _styles(series)
        if reference is not None:
            axes.axvline(reference, color=_MUTED, lw=0.8, ls=(0, (3, 2)))
        for number, (name, points) in enumerate(series.items()):
            shift = 0.7 * ((number + 0.5) / len(series) - 0.5)
            colour, marker = styles[name]
            axes.errorbar(
                [point.value for point in points],
                [places.index(point.place) + shift for point in points],
                xerr=[point.error or 0.0 for point in points],
                **{"fmt": marker, "color": colour, "elinewidth": 1.0, "label": _short(name)},
            )
        axes.set_yticks(range(len(places)), [_short(place) for place in places])
        axes.set(ylim=(len(places) - 0.45, -0.55), xlabel=xlabel)
        axes.tick_params(axis="y", length=0)
        for place in range(1, len(places) if len(series) > 1 else 0):
            axes.axhline(place - 0.5, color=_LINE, lw=0.5)
        axes.spines["left"].set_visible(False)
        _legend(figure, axes)
        return Plot(title, _to_svg(figure, title), note)


def histogram(title: str, lengths: dict[str, Sequence[int]], note: str) -> Plot:
    """Share of forward passes by the number of tokens that they emitted, for each series."""
    longest = min(max(max(values) for values in lengths.values()), _MAX_BIN)
    bins = range(1, longest + 1)
    with _figure(2.2, lengths, "y") as (figure, axes):
        styles = _styles(lengths)
        for number, (name, values) in enumerate(lengths.items()):
            width = 0.8 / len(lengths)
            shares = [sum(min(value, longest) == one for value in values) / len(values) for one in bins]
            at = [one + width * (number + 0.5) - 0.4 for one in bins]
            axes.bar(at, shares, 0.9 * width, color=styles[name][0], label=_short(name))
        labels = [f"{one}+" if one == _MAX_BIN else str(one) for one in bins]
        axes.set_xticks(bins, labels)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set(xlabel="tokens emitted by a forward pass", ylabel="share of passes")
        axes.tick_params(axis="x", length=0)
        _legend(figure, axes)
        return Plot(title, _to_svg(figure, title), note)


def lines(
    title: str,
    series: dict[str, tuple[Sequence[float | None], int]],
    xlabel: str,
    note: str,
    xs: Sequence[int] | None = None,
    is_share: bool = True,
    ylabel: str = "",
) -> Plot:
    """Values at 1, 2, ... or at `xs`, as lines.

    Args:
      title: heading.
      series: by name, the values (None: missing) and the number of the colour, from 0; lines of one colour are dashed
        differently.
      xlabel: of the horizontal axis.
      note: a sentence.
      xs: where the values are; on a logarithmic axis.
      is_share: the values are from 0 to 1, shown as percentages.
      ylabel: of the vertical axis.
    """
    dashes, seen = ("-", (0, (4, 1.5)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5))), {}
    with _figure(2.2, series, "y") as (figure, axes):
        for name, (values, colour) in series.items():
            colour, is_first = colour % len(_SERIES), colour < len(_SERIES)
            seen[colour] = seen.get(colour, -1) + 1
            at = xs or range(1, len(values) + 1)
            heights = [math.nan if value is None else value for value in values]
            style = {"ls": dashes[seen[colour] % len(dashes)], "marker": _MARKERS[colour]}
            style |= {"color": _SERIES[colour], "mfc": _SERIES[colour] if is_first else _PAPER}
            axes.plot(at, heights, label=_short(name), **style)
        ticks = xs or range(1, max(len(values) for values, _ in series.values()) + 1)
        if xs:
            axes.set_xscale("log")
            axes.minorticks_off()
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, None))
        if is_share:
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        _legend(figure, axes)
        return Plot(title, _to_svg(figure, title), note)


def stacks(title: str, parts: dict[str, Sequence[float]], xlabel: str, note: str) -> Plot:
    """Shares at 1, 2, ..., one part upon the other."""
    count = max(map(len, parts.values()))
    with _figure(2.2, parts, "y") as (figure, axes):
        bottom = [0.0] * count
        for number, (name, values) in enumerate(parts.items()):
            colour = _SERIES[number % len(_SERIES)]
            axes.bar(range(1, count + 1), values, 0.7, bottom, color=colour, label=_short(name))
            bottom = [low + value for low, value in zip(bottom, values, strict=True)]
        axes.set_xticks(range(1, count + 1))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set(xlabel=xlabel)
        axes.tick_params(axis="x", length=0)
        _legend(figure, axes)
        return Plot(title, _to_svg(figure, title), note)


def front(title: str, series: Mapping[str, list[Spot]], xlabel: str, ylabel: str, note: str) -> Plot:
    """Points that should be low on x and high on y, with error bars, and a line through those that no other beats."""
    with _figure(2.8, series, "both") as (figure, axes):
        styles = _styles(series)
        spots = [spot for of_series in series.values() for spot in of_series]
        best = undominated(spots)
        axes.plot([spot.x for spot in best], [spot.y for spot in best], color=_MUTED, lw=0.8, ls=(0, (3, 2)))
        for name, of_series in series.items():
            colour, marker = styles[name]
            axes.errorbar(
                [spot.x for spot in of_series],
                [spot.y for spot in of_series],
                xerr=[spot.x_error or 0.0 for spot in of_series],
                yerr=[spot.y_error or 0.0 for spot in of_series],
                **{"fmt": marker, "color": colour, "elinewidth": 1.0, "label": _short(name)},
            )
        for spot in best:
            style = {"textcoords": "offset points", "ha": "right", "fontsize": 7}  # no point is there
            axes.annotate(_short(spot.label), (spot.x, spot.y), (-4, 4), **style)
        left, right = axes.get_xlim()
        axes.set_xlim(left - 0.3 * (right - left), right)
        axes.margins(y=0.12)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        _legend(figure, axes)
        return Plot(title, _to_svg(figure, title), note)


def undominated(spots: Sequence[Spot]) -> list[Spot]:
    """The points for which no other one has a lower or equal x and a higher y, from left to right."""
    result: list[Spot] = []
    for spot in sorted(spots, key=lambda spot: (spot.x, -spot.y)):
        if not result or spot.y > result[-1].y:
            result.append(spot)
    return result


@contextmanager
def _figure(height: float, names: Collection[str], grid: str = "x") -> Iterator[tuple[Figure, Axes]]:
    """A figure of this height in inches, and of as much as the legend of the named series needs."""
    height += _LINE_HEIGHT * math.ceil(len(names) / _legend_columns(names)) if len(names) > 1 else 0
    with matplotlib.rc_context({**_STYLE, "axes.grid.axis": grid, "svg.hashsalt": "msn_jax"}):
        figure = Figure((_WIDTH, height), layout="constrained")
        yield figure, figure.subplots()


def _styles(names: Collection[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each series; those of a decoder are the same in every plot."""
    fixed = {name: _DECODERS.index(name) for name in names if name in _DECODERS}
    free = (index for index in itertools.count() if index not in fixed.values())
    indices = {name: fixed[name] if name in fixed else next(free) for name in names if name != "autoregressive"}
    styles = {name: (_SERIES[i % len(_SERIES)], _MARKERS[i % len(_MARKERS)]) for name, i in indices.items()}
    return {"autoregressive": (_MUTED, "o"), **styles}


def _legend_columns(names: Collection[str]) -> int:
    widths = [len(_short(name)) + _MARK_CHARACTERS for name in names]
    return len(widths) if sum(widths) <= _LINE_CHARACTERS else max(1, _LINE_CHARACTERS // max(widths))


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        style = {"handlelength": 2.2, "columnspacing": 1.2, "borderpad": 0.1}
        figure.legend(handles, labels, loc="outside upper left", ncols=_legend_columns(labels), **style)


def _short(text: str) -> str:
    printable = "".join(c if c.isprintable() else " " for c in text)
    return printable if len(printable) <= _MAX_TEXT else printable[: _MAX_TEXT - 1] + "…"


def _to_svg(figure: Figure, title: str) -> Markup:
    """The figure as an SVG element with ids of its own, without metadata, in the page's colours."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    head, body = svg.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', head)[0]
    prefix = f"p{hashlib.sha256(body.encode()).hexdigest()[:8]}-"  # ids of a page must differ
    body = re.sub(r'\bid="', f'id="{prefix}', body)
    body = re.sub(r'(href="|url\()#', rf"\1#{prefix}", body)
    body = re.sub(r"#[0-9a-f]{6}\b", lambda m: f"var({_VARIABLES[m[0]]})" if m[0] in _VARIABLES else m[0], body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    return Markup('<svg {} role="img" aria-label="{}">{}').format(Markup(view_box), title, Markup(body))
