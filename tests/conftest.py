"""Eight fake devices, strict promotion of dtypes and ranks: a silent broadcast or cast is an error in every test."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"  # every core has a test of its own to run
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import compilation
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module")
def quick_compilation(tmp_path_factory):
    """For modules that say `pytestmark = pytest.mark.usefixtures("quick_compilation")`, and the programs they start."""
    with compilation.quick(tmp_path_factory.getbasetemp() / "cache"):
        yield
