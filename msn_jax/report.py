"""Writes one HTML page about runs of evaluate, ablate, calibrate or demo.

    python -m msn_jax.report --source=runs/spec_bench --source=runs/gsm8k --output=report.html

Each --source is an output directory, or a JSON file that `calibrate --output` wrote; its kind is found from its files.
The page is one file that needs no network: tables, plots, and answers that can be played forward pass by forward pass.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from msn_jax import cli
from msn_jax.cli import InputError
from msn_jax.reports import page, sources


def write(paths: Sequence[str], output: str) -> int:
    """Writes the page about the runs in these directories; returns its size in bytes.

    Raises:
      InputError: a directory is not one of a run, or the page cannot be written.
    """
    target = Path(output)
    if target.is_dir():
        raise InputError(f"--output={output}: is a directory: name an HTML file")
    content = page.render([sources.read(path) for path in paths])
    try:
        target.write_bytes(content)
    except OSError as error:
        raise InputError(f"--output={output}: cannot be written ({error.strerror}): name another file") from error
    return len(content)


def main() -> None:
    """Reads the flags and writes the page."""
    args = flags.FLAGS
    size = write(args.source, args.output)
    print(f"wrote {args.output}: {len(args.source)} run{'s' * (len(args.source) > 1)}, {size / 1e3:.0f} kB")


if __name__ == "__main__":
    flags.DEFINE_multi_string("source", None, "An output directory of a run; may be repeated.", required=True)
    flags.DEFINE_string("output", "report.html", "The page.")
    cli.run(main)
