"""Writes one HTML page about runs of evaluate, ablate, calibrate or demo.

    python -m msn_jax.report --source=runs/spec_bench --source=runs/gsm8k --output=report.html

Each --source is an output directory, or a JSON file that `calibrate --output` wrote; its kind is found from its files.
The page is one file that needs no network: tables, plots, and answers that can be played forward pass by forward pass.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from msn_jax import cli, outputs
from msn_jax.reports import page, sources


def write(paths: Sequence[str], output: str) -> int:
    """Writes the page about the runs in these directories; returns its size in bytes.

    Raises:
      InputError: a directory is not one of a run, or the page cannot be written.
    """
    runs = [sources.read(path) for path in paths]
    outputs.check_output(output, keep=[str(file) for run in runs for file in run.files])
    content = page.render(runs)
    Path(output).write_bytes(content)
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
