"""Timed forward passes of the decoding loop, at a committed length that does not depend on draft acceptance.

The cost of a pass does not depend on how many drafts it accepts, but the sequence grows with every accepted token, and
attention is more expensive in a longer sequence. So all drafts are invalidated: each pass of any width commits exactly
one token.
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
from msn_jax.decode import batch as batches
from msn_jax.decode import drafters, loop
from msn_jax.decode import tree as trees
from msn_jax.decode.drafters import Drafter, Proposal
from msn_jax.decode.loop import DecodeState
from msn_jax.decode.models import Model
from msn_jax.decode.request import Request, make_sampler
from msn_jax.decode.tree import JACOBI, RETRIEVAL, RETRIEVAL_OR_JACOBI, TokenTree
from msn_jax.decode.verify import Sampler

SOURCES = {"jacobi": JACOBI, "prompt_lookup": RETRIEVAL, "tr_jacobi": RETRIEVAL_OR_JACOBI}
UNLIMITED = 1 << 30  # tokens
_CHUNK = 64  # tokens
_STOP_IDS = np.array([-1], np.int32)  # matches no token


@dataclasses.dataclass(frozen=True)
class Setting:
    """The decoding state in which forward passes are timed."""

    batch_size: int  # rows, all of the same length
    length: int  # tokens per row before a run, including the newest one
    capacity: int  # cache slots per row
    passes: int  # forward passes per run; each adds one token to every row
    limit: int = UNLIMITED  # the length at which a row ends


@dataclasses.dataclass(frozen=True)
class NoTokenizer:
    """Stand-in for the tokenizer of a random model: prompts are token ids and there are no stop tokens."""

    stop_ids: tuple[int, ...] = ()


@dataclasses.dataclass
class TimedLoop:
    """A compiled decoding loop and a state that every run starts from."""

    program: jax.stages.Compiled
    params: dict
    state: DecodeState
    setting: Setting
    compile_seconds: float

    def run(self) -> float:
        """Runs the loop once. Returns seconds per forward pass."""
        lengths = jnp.full_like(self.state.lengths, self.setting.length)
        cache = self.state.cache.replace(lengths=lengths - 1)
        rewound = self.state.replace(lengths=lengths, cache=cache, forward_passes=jnp.zeros_like(lengths))
        seconds, self.state = _timed(self.program, self.params, _STOP_IDS, rewound, np.int32(self.setting.passes))
        num_passes = np.asarray(self.state.forward_passes)
        if (num_passes != self.setting.passes).any():
            raise RuntimeError(f"the loop ended after {num_passes.min()} of {self.setting.passes} forward passes")
        return seconds / self.setting.passes

    @property
    def temporary_bytes(self) -> int | None:
        """Temporary memory of the compiled program, without arguments and results."""
        return getattr(self.program.memory_analysis(), "temp_size_in_bytes", None)


def compile_loop(model: Model, drafter: Drafter, setting: Setting) -> TimedLoop:
    """Compiles the decoding loop with a drafter whose drafts are never accepted, and runs it once to warm up."""
    drafter = _never_accepted(drafter)
    state = initial_state(model, drafter, setting)
    start = time.perf_counter()
    lowered = loop.decode.lower(model.params, model.cfg, drafter, _STOP_IDS, state, np.int32(setting.passes))
    timed_loop = TimedLoop(lowered.compile(), model.params, state, setting, time.perf_counter() - start)
    timed_loop.run()
    return timed_loop


def drafter(decoder: str, topology: str, width: int) -> Drafter:
    """The drafter of a decoder with a chain, or a binary tree, of `width` nodes."""
    if width == 1:
        return drafters.get("autoregressive")
    if decoder not in SOURCES:
        raise InputError(f"--decoders={decoder}: has no tree of variable width; choose from {', '.join(SOURCES)}")
    return drafters.get(decoder, tree(SOURCES[decoder], topology, width))


def tree(source: int, topology: str, width: int) -> TokenTree:
    """A chain, or a tree filled level by level whose nodes have two children each, of ranks 0 and 1."""
    if topology == "chain":
        return trees.chain(source, width - 1)
    return trees.build([((node - 1) // 2, source, (node - 1) % 2) for node in range(1, width)])


def capacity(length: int, passes: int, width: int) -> int:
    """Cache slots that the engine allocates for a sequence that grows from `length` by one token per pass."""
    return batches.bucket_size(length + passes + width)


@functools.partial(jax.jit, static_argnames=("cfg", "parents", "passes"))
def bare(params: dict, cfg: LlamaConfig, parents: tuple[int, ...], cache: KVCache, tokens: Array, passes: int) -> Array:
    """The lower bound for passes of this width: forward, unembed and argmax, in a loop of fixed length.

    It proposes, verifies and writes nothing. The argmax tokens are the input of the next pass.

    Args:
      params: decoding layout.
      cfg: the model.
      parents: the tree's parents, W entries.
      cache: committed keys and values.
      tokens: int32 [B, W].
      passes: iterations of the loop.

    Returns:
      int32 [B, W], the argmax tokens of the last pass.
    """
    mask = masks.tree(parents)
    depth = mask[0].sum(axis=-1, dtype=np.int32) - 1

    def body(number: Array, tokens: Array) -> Array:
        positions = cache.lengths[:, None] + depth[None, :] + number
        hidden = llama.forward(params, cfg, tokens, positions, jnp.asarray(mask), cache).hidden
        return cpu.argmax(llama.unembed(params, cfg, hidden))

    return jax.lax.fori_loop(0, passes, body, tokens)


def bare_timer(model: Model, tree: TokenTree, cache: KVCache, passes: int) -> Callable[[], float]:
    """A function that runs `bare` and returns seconds per pass. Compiles it and runs it once to warm up."""
    tokens = jnp.zeros((len(cache.lengths), tree.width), jnp.int32)
    run = functools.partial(bare, model.params, model.cfg, tree.parents, cache, tokens, passes)
    jax.block_until_ready(run())
    return lambda: _timed(run)[0] / passes


def _never_accepted(drafter: Drafter) -> Drafter:
    """The same drafter, at the same cost, but none of its drafts can be accepted."""

    def propose(*arguments: object) -> tuple[Proposal, object]:
        proposal, draft = drafter.propose(*arguments)
        tokens = proposal.tokens
        invalid = -1 - tokens[:, 1:]  # negative indices still select embedding rows, but no target token is negative
        return proposal.replace(tokens=tokens.at[:, 1:].set(invalid)), draft

    return dataclasses.replace(drafter, propose=propose)


def initial_state(model: Model, drafter: Drafter, setting: Setting) -> DecodeState:
    """The state after a prefill of that length, with random tokens, keys and values and an all-zero draft state."""
    sampler = make_sampler([Request("")] * setting.batch_size)
    shape = (setting.batch_size, setting.capacity)
    tokens = np.random.default_rng(0).integers(0, model.cfg.vocab_size, shape, np.int32)
    lengths = np.full((setting.batch_size,), setting.length, np.int32)

    def prefill(params: dict, tokens: Array, lengths: Array, sampler: Sampler) -> DecodeState:
        return loop.prefill(params, model.cfg, drafter, tokens, lengths, lengths, sampler, _CHUNK)

    like = jax.eval_shape(prefill, model.params, tokens, lengths, sampler)
    draft, accept_lengths = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (like.draft, like.accept_lengths)
    )
    layers = jax.tree.map(lambda slots: shapes.draw(np.uint32(0), slots.shape, slots.dtype, 1.0), like.cache.layers)
    return like.replace(
        tokens=jnp.asarray(tokens),
        lengths=jnp.asarray(lengths),
        limits=jnp.full_like(lengths, setting.limit),
        done=jnp.zeros_like(lengths, bool),
        cache=like.cache.replace(layers=layers, lengths=jnp.asarray(lengths - 1)),
        draft=draft,
        sampler=sampler,
        accept_lengths=accept_lengths,
        forward_passes=jnp.zeros_like(lengths),
    )


def _timed(run: Callable, *arguments: object) -> tuple[float, object]:
    jax.block_until_ready(arguments)
    start = time.perf_counter()
    result = jax.block_until_ready(run(*arguments))
    return time.perf_counter() - start, result


def copy_bandwidth(array_bytes: int, repeats: int) -> float:
    """Bytes per second read and written by one pass over a large array; the best of `repeats` runs."""
    increment = jax.jit(lambda array: array + 1, donate_argnums=0)
    array = increment(jnp.zeros((array_bytes // 4,), jnp.float32))
    seconds = []
    for _ in range(repeats):
        elapsed, array = _timed(increment, array)
        seconds.append(elapsed)
    return 2 * array.size * array.dtype.itemsize / min(seconds)
