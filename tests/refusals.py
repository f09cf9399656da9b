"""Refusals: errors of one line about invalid input."""

from collections.abc import Callable

import pytest

from msn_jax.cli import InputError


def refusal(call: Callable, *arguments: object) -> str:
    """The message of the InputError that `call(*arguments)` raises; asserts that it is one line."""
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)
