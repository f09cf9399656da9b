"""Memory-mapped files of weights."""

import mmap
from pathlib import Path


def open_mapped(path: str | Path) -> mmap.mmap:
    """Maps a file for reading. Raises OSError if it cannot be opened, ValueError if it is empty."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def release_pages(file: mmap.mmap) -> None:
    """Drops a file's pages from memory; a later access reads them again."""
    if hasattr(file, "madvise"):  # not on every platform
        file.madvise(mmap.MADV_DONTNEED)
