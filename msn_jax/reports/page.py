"""The page: one HTML file without references to others, from the templates beside this file."""

from collections.abc import Sequence

import jinja2
from markupsafe import Markup

from msn_jax.cli import InputError
from msn_jax.reports import ablations, calibrations, demos, evaluations
from msn_jax.reports.answers import shorten
from msn_jax.reports.sources import Source

_BUILDERS = {
    "evaluate": evaluations.build,
    "ablate": ablations.build,
    "calibrate": calibrations.build,
    "demo": demos.build,
}
MAX_BYTES = 3_000_000  # of the page
_ANSWERS_BYTES = 1_000_000  # of all answers
_ANSWER_BYTES = 24_000  # of one


def render(sources: Sequence[Source]) -> bytes:
    """The page of these runs, in UTF-8.

    Everything that comes from a run is escaped. No data is passed to the script: it reads the page's own elements.

    Raises:
      InputError: the page is larger than `MAX_BYTES`.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("msn_jax.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    built = [_BUILDERS[source.kind](source) for source in sources]
    num_answers = sum(len(section.answers) for section in built)
    size = min(_ANSWER_BYTES, _ANSWERS_BYTES // max(num_answers, 1))
    html = environment.get_template("page.html").render(
        title=built[0].title if len(built) == 1 else "Report",
        summary=evaluations.speed_beside_quality(sources),
        sections=built,
        shorten=lambda answer: shorten(answer, size),
        style=_static(environment, "page.css"),
        script=_static(environment, "page.js"),
    )
    content = html.encode("utf-8", "xmlcharrefreplace")  # a lone surrogate becomes a reference
    if len(content) > MAX_BYTES:
        size, most = f"{len(content) / 1e6:.1f} MB", f"{MAX_BYTES / 1e6:.0f} MB"
        raise InputError(f"--source: the page would have {size}, more than {most}: name fewer runs")
    return content


def _static(environment: jinja2.Environment, name: str) -> Markup:
    """A file that is part of the page as it is."""
    return Markup(environment.loader.get_source(environment, name)[0])
