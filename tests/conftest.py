"""Eight fake devices, strict promotion of dtypes and ranks: a silent broadcast or cast is an error in every test."""

import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # read when jax is imported; the flags, when it first computes

import compilation
import jax
import pytest

_LONGEST = ("test_notebooks.py", "test_train.py")
_DEVICES = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), _DEVICES, compilation.XLA_FLAGS])
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module")
def quick_compilation(tmp_path_factory):
    """For modules that say `pytestmark = pytest.mark.usefixtures("quick_compilation")`, and the programs they start."""
    with compilation.quick(tmp_path_factory.getbasetemp() / "cache"):
        yield


def pytest_collection_modifyitems(items):
    """The longest files first, so that no process is left alone with one in the end."""
    items.sort(key=lambda item: item.path.name not in _LONGEST)


def pytest_collection_finish():
    """What is imported by now stays: the collector need not look at it again, nor as often as it would at the rest."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
