"""The compiled decoding programs: how often they are compiled, and how much memory they use."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny
from run_loop import STOP, UNLIMITED, run, start

from msn_jax.decode import drafters, loop

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
