"""The layout of a training run's workdir, without the library that reads its checkpoints (`checkpoint.py`)."""

from pathlib import Path

ADAPTER = "adapter"  # subdirectory: the newest adapter, in PEFT's form


def checkpoints(workdir: str | Path) -> Path:
    """The directory of the checkpoints, absolute."""
    return Path(workdir).absolute() / "checkpoints"


def is_workdir(path: str | Path) -> bool:
    """Whether `path` is the workdir of a training run or of a converted model."""
    return checkpoints(path).is_dir()
