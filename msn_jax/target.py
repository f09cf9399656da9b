"""The platform that programs compile for: that of the default backend, or one that is not there."""

import jax

_OTHER: list[str] = []


def platform() -> str:
    """'cpu', 'gpu' or 'tpu'."""
    return _OTHER[0] if _OTHER else jax.default_backend()


def compile_for(name: str) -> None:
    """Makes all programs of this process compile for another platform than that of the default backend.

    Call it before anything is traced, because traces are cached.
    """
    _OTHER[:] = [name]
