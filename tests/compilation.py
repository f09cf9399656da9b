"""Less compiling: most of the time of tests that run whole programs was the compiler's."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


def start_quick(cache: Path) -> None:
    """No optimizations from here on, and no program is compiled twice."""
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()


@contextlib.contextmanager
def quick(cache: Path) -> Iterator[None]:
    """The same for a while. For tests of which nothing depends on the optimizations: half of their time, or more."""
    start_quick(cache)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
