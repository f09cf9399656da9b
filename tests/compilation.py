"""Less compiling: most of the time of tests that run whole programs was the compiler's."""

import contextlib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

XLA_FLAGS = "--xla_cpu_parallel_codegen_split_count=1"  # every core has a test of its own to run
if metadata.version("jaxlib").startswith("0.10."):  # its new way to emit loops compiles four times as long
    XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"


@contextlib.contextmanager
def quick(cache: Path) -> Iterator[None]:
    """No optimizations for a while, and no program is compiled twice, here and in the programs that are started. For
    tests of which nothing depends on the optimizations: half of their time, or more.
    """
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(cache),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }

    def use(values: dict) -> None:
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    with pytest.MonkeyPatch.context() as environment:
        for name, value in settings.items():
            environment.setenv(name.upper(), str(value))
        use(settings)
        try:
            yield
        finally:
            use({"jax_disable_most_optimizations": False, "jax_compilation_cache_dir": None})
