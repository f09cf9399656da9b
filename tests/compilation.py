"""Cheaper compilation: tests that run whole programs spend most of their time in the compiler."""

import contextlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

XLA_FLAGS = "--xla_cpu_parallel_codegen_split_count=1"  # the cores are busy with other tests
if metadata.version("jaxlib").startswith("0.10."):  # the new emitters take four times as long to compile
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"


@contextlib.contextmanager
def quick(cache: Path) -> Iterator[None]:
    """Disables optimizations and caches programs in `cache`, in this process and in the subprocesses it starts.

    Halves the time of tests, or better. For tests whose assertions do not depend on optimizations.
    """
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(cache),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }

    def apply(values: dict) -> None:
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    with pytest.MonkeyPatch.context() as environment:
        for name, value in settings.items():
            environment.setenv(name.upper(), str(value))
        apply(settings)
        try:
            yield
        finally:
            apply({"jax_disable_most_optimizations": False, "jax_compilation_cache_dir": None})
