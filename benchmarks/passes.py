"""Timed passes of the decoding loop, at a committed length that does not depend on how good the guesses are.

A pass costs the same whatever it accepts, but the text grows by what was accepted, and attention costs more the longer
the text is. So every guess is spoiled: each pass of each width commits exactly one token.
"""

import dataclasses
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks import shapes
from msn_jax import cpu, llama, masks
from msn_jax.cache import KVCache
from msn_jax.cli import InputError
from msn_jax.config import LlamaConfig
from msn_jax.decode import drafters, loop, session
from msn_jax.decode import tree as trees
from msn_jax.decode.drafters import Drafter
from msn_jax.decode.loop import DecodeState
from msn_jax.decode.request import Request, make_sampler
from msn_jax.decode.session import Model
from msn_jax.decode.tree import JACOBI, RETRIEVAL, RETRIEVAL_OR_JACOBI, TokenTree
from msn_jax.decode.verify import Sampler

SOURCES = {"jacobi": JACOBI, "prompt_lookup": RETRIEVAL, "tr_jacobi": RETRIEVAL_OR_JACOBI}
UNLIMITED = 1 << 30  # tokens
_CHUNK = 64  # tokens
_STOP_IDS = np.array([-1], np.int32)  # nothing stops


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where a pass is timed."""

    batch_size: int  # rows, all of the same length
    length: int  # committed tokens of each before a run, the newest included
    capacity: int  # slots of the cache
    passes: int  # of a run; every row grows by one token in each
    limit: int = UNLIMITED  # the length at which a row would end


@dataclasses.dataclass(frozen=True)
class NoTokenizer:
    """Stands in for one where texts are token ids that nothing stops."""

    stop_ids: tuple[int, ...] = ()


@dataclasses.dataclass
class Passes:
    """A compiled loop, with a state to run it on over and over."""

    program: jax.stages.Compiled
    params: dict
    state: DecodeState
    setting: Setting
    compile_seconds: float

    def run(self) -> float:
        """Seconds a pass."""
        whole = jnp.full_like(self.state.lengths, self.setting.length)
        cache = self.state.cache.replace(lengths=whole - 1)
        rewound = self.state.replace(lengths=whole, cache=cache, forward_passes=jnp.zeros_like(whole))
        seconds, self.state = _timed(self.program, self.params, _STOP_IDS, rewound, np.int32(self.setting.passes))
        done = np.asarray(self.state.forward_passes)
        if (done != self.setting.passes).any():
            raise RuntimeError(f"the loop ended after {done.min()} of {self.setting.passes} passes")
        return seconds / self.setting.passes

    @property
    def temporary_bytes(self) -> int | None:
        """Of the compiled program, beside its arguments and results."""
        return getattr(self.program.memory_analysis(), "temp_size_in_bytes", None)


def compiled(model: Model, drafter: Drafter, setting: Setting) -> Passes:
    """The loop of a drafter, its guesses spoiled, compiled and run once."""
    drafter = _spoiled(drafter)
    begun = state(model, drafter, setting)
    start = time.perf_counter()
    lowered = loop.decode.lower(model.params, model.cfg, drafter, _STOP_IDS, begun, np.int32(setting.passes))
    timed = Passes(lowered.compile(), model.params, begun, setting, time.perf_counter() - start)
    timed.run()
    return timed


def drafter(decoder: str, topology: str, width: int) -> Drafter:
    """A decoder with a chain, or a binary tree, of `width` nodes."""
    if width == 1:
        return drafters.get("autoregressive")
    if decoder not in SOURCES:
        raise InputError(f"--decoders={decoder}: has no tree of a given width: take some of {', '.join(SOURCES)}")
    return drafters.get(decoder, tree(SOURCES[decoder], topology, width))


def tree(source: int, topology: str, width: int) -> TokenTree:
    """A chain, or a tree whose nodes have two children each, of ranks 0 and 1, level by level."""
    if topology == "chain":
        return trees.chain(source, width - 1)
    return trees.build([((node - 1) // 2, source, (node - 1) % 2) for node in range(1, width)])


def capacity(length: int, passes: int, width: int) -> int:
    """The slots that the engine gives a text that grows from `length` by one token a pass."""
    return session.bucket_size(length + passes + width)


@functools.partial(jax.jit, static_argnames=("cfg", "parents", "passes"))
def bare(params: dict, cfg: LlamaConfig, parents: tuple[int, ...], cache: KVCache, tokens: Array, passes: int) -> Array:
    """The least that passes of this width can be: forward, unembed and argmax, in a loop of known length, with nothing
    proposed, verified or written. The choices are the next pass's tokens, int32 [B, W].
    """

    mask = masks.tree(parents)
    depth = mask[0].sum(axis=-1, dtype=np.int32) - 1

    def body(number: Array, tokens: Array) -> Array:
        positions = cache.lengths[:, None] + depth[None, :] + number
        hidden = llama.forward(params, cfg, tokens, positions, jnp.asarray(mask), cache).hidden
        return cpu.argmax(llama.unembed(params, cfg, hidden))

    return jax.lax.fori_loop(0, passes, body, tokens)


def bare_run(model: Model, tree: TokenTree, cache: KVCache, passes: int) -> Callable[[], float]:
    """A function that times `bare`: seconds a pass. Compiled and run once."""
    tokens = jnp.zeros((len(cache.lengths), tree.width), jnp.int32)
    run = functools.partial(bare, model.params, model.cfg, tree.parents, cache, tokens, passes)
    jax.block_until_ready(run())
    return lambda: _timed(run)[0] / passes


def _spoiled(drafter: Drafter) -> Drafter:
    """The same drafter, at the same cost, whose guesses are never right."""

    def propose(*arguments: object) -> tuple[Array, object]:
        nodes, draft = drafter.propose(*arguments)
        wrong = -1 - nodes[:, 1:]  # rows counted from the end of the embedding; no choice is negative
        return nodes.at[:, 1:].set(wrong), draft

    return dataclasses.replace(drafter, propose=propose)


def state(model: Model, drafter: Drafter, setting: Setting) -> DecodeState:
    """Rows of random tokens with random keys and values, as if prompts of that length had been read. The draft is all
    zeros: nobody minds a wrong one.
    """
    sampler = make_sampler([Request("")] * setting.batch_size)
    shape = (setting.batch_size, setting.capacity)
    tokens = np.random.default_rng(0).integers(0, model.cfg.vocab_size, shape, np.int32)
    lengths = np.full((setting.batch_size,), setting.length, np.int32)

    def prefill(params: dict, tokens: Array, lengths: Array, sampler: Sampler) -> DecodeState:
        return loop.prefill(params, model.cfg, drafter, tokens, lengths, lengths, sampler, _CHUNK)

    like = jax.eval_shape(prefill, model.params, tokens, lengths, sampler)
    draft, accepted = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (like.draft, like.accept_lengths))
    layers = jax.tree.map(lambda slots: shapes.draw(np.uint32(0), slots.shape, slots.dtype, 1.0), like.cache.layers)
    return like.replace(
        tokens=jnp.asarray(tokens),
        lengths=jnp.asarray(lengths),
        limits=jnp.full_like(lengths, setting.limit),
        done=jnp.zeros_like(lengths, bool),
        cache=like.cache.replace(layers=layers, lengths=jnp.asarray(lengths - 1)),
        draft=draft,
        sampler=sampler,
        accept_lengths=accepted,
        forward_passes=jnp.zeros_like(lengths),
    )


def _timed(run: Callable, *arguments: object) -> tuple[float, object]:
    jax.block_until_ready(arguments)
    start = time.perf_counter()
    result = jax.block_until_ready(run(*arguments))
    return time.perf_counter() - start, result


def copy_bandwidth(array_bytes: int, repeats: int) -> float:
    """Bytes a second that the device reads and writes when it goes once through a big array, the best of `repeats`."""
    increment = jax.jit(lambda array: array + 1, donate_argnums=0)
    array = increment(jnp.zeros((array_bytes // 4,), jnp.float32))
    seconds = []
    for _ in range(repeats):
        elapsed, array = _timed(increment, array)
        seconds.append(elapsed)
    return 2 * array.size * array.dtype.itemsize / min(seconds)
