"""Tests of EvalPlus (arXiv 2305.01210) from its own files, which hold inputs, and the solution that gives the outputs.

The comparison is close to EvalPlus's: equality, or closeness where the output is a float or a list of floats or the
problem has a tolerance. Closeness is that of `math.isclose`, and it does not tell a list from a tuple. `find_zero` has
many right answers, so the polynomial is evaluated there.
"""

import json
from collections.abc import Mapping

from msn_jax.cli import InputError
from msn_jax.evals import questions

_FIELDS = {"prompt": str, "canonical_solution": str, "entry_point": str, "base_input": list, "plus_input": list}
_FLOAT_TOLERANCE, _RELATIVE_TOLERANCE = 1e-6, 1e-7

_TEST = """
def check(candidate):
    import copy, json, math
    reference = {{}}
    exec({solution!r}, reference)
    tolerance = {tolerance!r}

    def is_float(value):
        return isinstance(value, float) or (
            isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(item, float) for item in value)
        )

    def is_close(found, expected, tolerance):
        if isinstance(expected, (list, tuple)):
            pairs = zip(found, expected)
            return len(found) == len(expected) and all(is_close(a, b, tolerance) for a, b in pairs)
        if isinstance(expected, (int, float)):
            return math.isclose(found, expected, rel_tol={relative!r}, abs_tol=tolerance)
        return found == expected

    for inputs in json.loads({inputs!r}):
        found = candidate(*copy.deepcopy(inputs))
        if {entry_point!r} == "find_zero":
            assert abs(sum(c * found**i for i, c in enumerate(inputs[0]))) <= (tolerance or {float_tolerance!r}), inputs
            continue
        expected = reference[{entry_point!r}](*copy.deepcopy(inputs))
        within = tolerance or ({float_tolerance!r} if is_float(expected) else 0)
        assert found == expected or (within and is_close(found, expected, within)), inputs
"""


def has_inputs(record: Mapping[str, object]) -> bool:
    """Whether a problem has EvalPlus's inputs."""
    return "plus_input" in record


def to_test(record: Mapping[str, object], location: str, name: str) -> str:
    """A function `check(candidate)` that compares the outputs for all inputs with those of the solution.

    Args:
      record: a line of HumanEvalPlus.jsonl.
      location: of the record, for error messages.
      name: what the file should be, for error messages.

    Raises:
      InputError: a field is missing or malformed.
    """
    questions.check_fields(record, _FIELDS, location, name)
    tolerance = record.get("atol", 0)
    if not isinstance(tolerance, (int, float)):
        raise InputError(f"{location}: field 'atol' must be a number: expected {name}")
    return _TEST.format(
        solution=record["prompt"] + record["canonical_solution"],
        entry_point=record["entry_point"],
        inputs=json.dumps([*record["base_input"], *record["plus_input"]]),
        tolerance=tolerance,
        float_tolerance=_FLOAT_TOLERANCE,
        relative=_RELATIVE_TOLERANCE,
    )
