"""The compiled decoding programs: how often they are compiled, and how much memory they use."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny
from run_loop import STOP, UNLIMITED, run, start

from msn_jax.decode import drafters, engine, loop, programs, scheduler
from msn_jax.decode.request import Request

# Only LLVM's optimizations are disabled; they run after buffer assignment and do not change the memory of a program.
pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_each_program_is_compiled_once():
    cfg, drafter = tiny.config(vocab_size=17), drafters.get("jacobi")
    counts = []
    for seed in range(3):  # weights, prompts, lengths and limits differ; the programs do not
        rng = np.random.default_rng(seed)
        run(cfg, tiny.params(cfg, seed), drafter, tiny.prompts(rng, 5, 17), rng.integers(1, 40, 5))
        counts.append((loop.prefill._cache_size(), loop.decode._cache_size()))
    assert counts[0] == counts[1] == counts[2]


def test_programs_by_prompt_and_output_length():
    """One prefill per power of two of the prompt, one loop per power of two, at least 256, of the sequence."""
    model = tiny.endless(tiny.model(max_length=1024))
    decoder = engine.Decoder(model, "tr_jacobi")
    compiled = []
    for prompt_length, max_new_tokens in [(3, 9), (60, 120), (64, 128), (65, 9), (120, 120), (130, 9), (200, 128)]:
        before = loop.prefill._cache_size(), loop.decode._cache_size()
        decoder.start([[2] * prompt_length], [Request("", max_new_tokens)], 1).run()
        compiled.append((loop.prefill._cache_size() - before[0], loop.decode._cache_size() - before[1]))
    assert compiled == [(1, 1), (0, 0), (0, 0), (1, 0), (0, 0), (1, 0), (1, 1)]


@pytest.mark.parametrize("stop", ["", "never"])
def test_experience_compiles_nothing(monkeypatch, stop):
    monkeypatch.setattr(scheduler, "_LONG_PASS", 0.0)
    monkeypatch.setattr(scheduler, "_TIMING_SECONDS", 0.0)
    model = dataclasses.replace(tiny.endless(tiny.model(max_length=1024)), experience={})
    for _ in range(2):
        engine.generate(model, ["ab"], "auto", 64, stop=stop or ())
        engine.wait_for_compilation(model)
    [experience] = model.experience.values()
    with programs.recorded() as compilations:
        engine.generate(model, ["ab"], "auto", 64, stop=stop or ())
    assert not compilations
    assert experience.scheduler.rounds._newest  # the adaptive program ran


@pytest.mark.parametrize(("name", "layers"), [("autoregressive", 2), ("tr_jacobi", 5)])
def test_decoding_uses_less_temporary_memory_than_its_cache(name, layers):
    cfg = dataclasses.replace(tiny.config(max_length=8192, n_layers=layers), head_dim=64)  # mostly cache
    drafter, batch_size, capacity = drafters.get(name), 4, 8192
    state = jax.eval_shape(
        functools.partial(start, cfg, tiny.params(cfg, 0), drafter, [[1, 2]] * batch_size, [9] * batch_size, capacity)
    )
    compiled = loop.decode.lower(tiny.params(cfg, 0), cfg, drafter, STOP, state, UNLIMITED).compile()
    cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.cache))
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < cache_bytes
    assert memory.alias_size_in_bytes >= cache_bytes  # updated in place, not copied


def test_a_failed_compilation_in_the_background_does_not_stop_the_foreground():
    compiled = programs.Programs()

    def fail():
        raise RuntimeError("no memory")

    compiled.compile_in_background("key", fail)
    with compiled.calling("key"):
        pass
    assert compiled.is_compiled("key")
