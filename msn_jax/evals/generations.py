"""Generates the samples of a suite: one request each, decoded in batches by every decoder."""

import dataclasses
import time
from collections.abc import Callable, Sequence

from msn_jax import outputs
from msn_jax.decode import display, engine
from msn_jax.decode.engine import Generation
from msn_jax.decode.request import Request
from msn_jax.evals.questions import Question
from msn_jax.evals.suite import Evaluation


@dataclasses.dataclass(frozen=True)
class Task:
    """One sample to generate."""

    question: Question
    request: Request
    fields: dict  # of the sample's key, next to 'question_id' and 'decoder'


def generate(evaluation: Evaluation, tasks: Sequence[Task], score: Callable[[Question, str], dict]) -> dict:
    """Generates and logs the samples that the log lacks. All prompts are checked first.

    Args:
      evaluation: decoders, settings and log.
      tasks: the samples, the same for every decoder.
      score: further fields of a sample, from its question and text.

    Returns:
      All samples of these tasks by decoder, in order.

    Raises:
      InputError: a prompt is too long for the model.
    """
    requests = [task.request for task in tasks]
    locations = [task.question.location for task in tasks]
    samples = {}
    for name, decoder in evaluation.decoders.items():
        keys = [evaluation.log.key_of({**_key_fields(task), "decoder": name}) for task in tasks]
        done = frozenset(i for i, key in enumerate(keys) if key in evaluation.log)
        batch_size = evaluation.settings.batch_size
        generations = engine.generate_iter(decoder, requests, Request(""), batch_size, locations, done)
        for generation in outputs.with_progress(generations, len(done), len(tasks), f"generations of {name}"):
            task = tasks[generation.index]
            passes = display.passes(decoder.model.tokenizer, generation)
            sample = _key_fields(task) | _describe(generation, passes) | score(task.question, generation.text)
            evaluation.log.append(sample)
        samples[name] = [evaluation.log[key] for key in keys]
    return samples


def _key_fields(task: Task) -> dict:
    return {"question_id": task.question.id, "group": task.question.group, **task.fields}


def _describe(generation: Generation, passes: Sequence[str]) -> dict:
    return {
        "decoder": generation.decoder,
        "text": generation.text,
        "passes": passes,
        "tokens": generation.tokens,
        "forward_passes": generation.forward_passes,
        "finish_reason": generation.finish_reason,
        "time": time.time(),
    }
