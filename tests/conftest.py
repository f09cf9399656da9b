"""Eight fake CPU devices; strict dtype and rank promotion make silent casts and broadcasts errors in every test."""

import gc
import os

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")  # programs that tests start leave the user's cache alone
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # read when jax is imported; XLA_FLAGS, at the first computation

import compilation
import jax
import pytest

_LONGEST = ("test_notebooks.py", "test_train.py", "test_adapter.py")
_DEVICES = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), _DEVICES, compilation.XLA_FLAGS])
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module")
def quick_compilation(tmp_path_factory):
    """Cheap compilation for a test module and its subprocesses: `pytestmark = usefixtures("quick_compilation")`."""
    with compilation.quick(tmp_path_factory.getbasetemp() / "cache"):
        yield


def pytest_collection_modifyitems(items):
    """Longest files first, so that no worker runs one of them alone at the end."""
    items.sort(key=lambda item: item.path.name not in _LONGEST)


def pytest_collection_finish():
    """Exempts imported modules from garbage collection, and collects less often: large object graphs make it slow."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
