"""SPEED-Bench (arXiv 2604.09557), the successor of Spec-Bench: run and reported as that, with questions of its own.

The qualitative split has 80 questions in each of eleven categories, of one or more turns; the throughput splits have
prompts of fixed lengths. The prompts may not be redistributed, so users make the file with the benchmark's own
`prepare_data.py`, which writes test.parquet; the same records as JSON lines will do.
"""

from msn_jax.cli import InputError
from msn_jax.evals import conversations, spec_bench
from msn_jax.evals.questions import Question
from msn_jax.evals.suite import Suite

_PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED"  # begins a turn that the published file does not have
_NAME = "SPEED-Bench's test.parquet"


def read(path: str) -> list[Question]:
    """The questions of test.parquet, or of the same records as JSON lines; a question's group is its category.

    Raises:
      InputError: the file is malformed, or lacks the texts of some questions.
    """
    result = conversations.read(path, _NAME, categories=None, id_type=str)
    for question in result:
        if any(turn.startswith(_PLACEHOLDER) for turn in question.prompt):
            raise InputError(f"{question.location}: has no text yet: make {_NAME} with its prepare_data.py")
    return result


SUITE = Suite(
    read,
    spec_bench.run,
    max_new_tokens=4096,
    decoders=spec_bench.SUITE.decoders,
    key=spec_bench.SUITE.key,
    flags=spec_bench.SUITE.flags,
    protocol=spec_bench.SUITE.protocol,
    is_timed=True,
)
