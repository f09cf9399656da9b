"""A batch on its way: the host's part of decoding.

It pads prompts of different lengths into a batch, calls the compiled loop, gives the texts more room when they outgrow
it, and reads off what each row has got. Shapes come from powers of two, so that a few compiled programs serve all.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from msn_jax import cache as caches
from msn_jax import sharding
from msn_jax.cache import KVCache
from msn_jax.config import LlamaConfig
from msn_jax.data.tokenizer import Tokenizer
from msn_jax.decode import loop, requests
from msn_jax.decode.drafters import Drafter
from msn_jax.decode.requests import Request
from msn_jax.decode.text import TextStream

_SMALLEST_BUCKET = 64  # slots
_ROOM = 128  # tokens of an answer that its first cache has room for
_CHUNK = 512  # tokens of a prompt read in one pass: enough to keep an accelerator busy
_CHUNK_ON_CPU = 64
UNLIMITED = int(np.iinfo(np.int32).max)  # passes


@dataclasses.dataclass(frozen=True)
class Model:
    """What decoding needs of a model."""

    params: dict  # decoding layout
    cfg: LlamaConfig
    tokenizer: Tokenizer
    mesh: Mesh | None = None  # where the parameters lie, if on more than one device
    name: str = ""  # its directory, where it has one


@dataclasses.dataclass(frozen=True)
class Prefix:
    """The text of one row and what its cache knows of it: the beginning of a later prompt may be the same."""

    tokens: np.ndarray  # int32 [n], all of them in the cache
    cache: KVCache  # of one row


class Decoding:
    """Rows that are decoded together, from the prefill to their last tokens."""

    def __init__(
        self,
        model: Model,
        drafter: Drafter,
        prompts: Sequence[Sequence[int]],
        asked: Sequence[Request],
        batch_size: int,
        weights: Any = None,
        prefix: Prefix | None = None,
    ):
        """Reads the prompts.

        Args:
          model: the model.
          drafter: who guesses.
          prompts: token ids, at most `batch_size` lists of at least one; missing rows are idle.
          asked: a request per prompt; its own `prompt` is not looked at.
          batch_size: B.
          weights: the drafter's own parameters, if it has any.
          prefix: for a batch of one: what an earlier session left.
        """
        self.model, self.drafter, self.weights = model, drafter, weights
        self.prompt_lengths = [len(ids) for ids in prompts]
        self.reused = 0  # tokens of the prompt that did not have to be read
        idle = Request("", max_new_tokens=1)
        longest, answer = max(self.prompt_lengths), max(request.max_new_tokens for request in asked)
        slots = bucket(longest)
        capacity = bucket(longest + drafter.tree.max_depth + min(answer, _ROOM))
        chunk = min(_CHUNK_ON_CPU if jax.default_backend() == "cpu" else _CHUNK, slots)
        tokens = np.zeros((batch_size, slots), np.int32)
        lengths, limits = np.ones(batch_size, np.int32), np.ones(batch_size, np.int32)
        for row, (ids, request) in enumerate(zip(prompts, asked, strict=True)):
            tokens[row, : len(ids)] = ids
            lengths[row] = len(ids)
            limits[row] = min(len(ids) + request.max_new_tokens, model.cfg.max_length)
        sampler = requests.sampler([*asked, *[idle] * (batch_size - len(asked))])
        cache = None if prefix is None else self._known(prefix, prompts[0], slots, chunk)
        rows = self._by_rows((tokens, lengths, limits, sampler))
        self.state = loop.prefill(model.params, model.cfg, drafter, *rows, chunk, weights, cache, model.mesh, capacity)
        self._stop_ids = np.array(model.tokenizer.stop_ids, np.int32)

    def advance(self, passes: int = UNLIMITED) -> bool:
        """Decodes until every row is done or `passes` are over. Whether a row is left."""
        while passes > 0:
            before = int(self.state.forward_passes.max()) if passes < UNLIMITED else 0
            self.state = loop.decode(
                self.model.params,
                self.model.cfg,
                self.drafter,
                self._stop_ids,
                self.state,
                np.int32(passes),
                self.weights,
            )
            if self.done:
                return False
            if passes < UNLIMITED:
                passes -= int(self.state.forward_passes.max()) - before
            if passes > 0:
                self.state = loop.grow(self.drafter, self.state, 2 * self.state.capacity)
        return True

    @property
    def done(self) -> bool:
        """Whether every row is."""
        return bool(np.asarray(self.state.done).all())

    def cancel(self, rows: Sequence[int]) -> None:
        """Ends rows where they are; the others do not notice."""
        done = np.array(self.state.done)
        done[list(rows)] = True
        self.state = self.state.replace(done=jax.device_put(done, self.state.done.sharding))

    def answers(self) -> list[tuple[list[int], list[int]]]:
        """The new tokens of every prompt so far, and how many of them came with each pass."""
        state = jax.device_get((self.state.tokens, self.state.lengths, self.state.accept_lengths))
        passes = np.asarray(self.state.forward_passes)
        return [
            (tokens[prompt_length:length].tolist(), accepted[:count].tolist())
            for prompt_length, tokens, length, accepted, count in zip(self.prompt_lengths, *state, passes, strict=False)
        ]

    def prefix(self) -> Prefix:
        """What the next turn of a chat can go on from: the first row's text."""
        known = int(self.state.cache.lengths[0])
        return Prefix(np.asarray(self.state.tokens)[0, :known], self.state.cache)

    def _known(self, prefix: Prefix, ids: Sequence[int], slots: int, chunk: int) -> KVCache:
        """The cache with as many chunks as prompt and prefix share, the newest token left out."""
        longest = min(len(prefix.tokens), len(ids) - 1)
        differ = np.flatnonzero(prefix.tokens[:longest] != np.asarray(ids[:longest]))
        shared = int(differ[0]) if differ.size else longest
        self.reused = shared // chunk * chunk
        return caches.resize(prefix.cache, slots).replace(lengths=np.array([self.reused], np.int32))

    def _by_rows(self, arrays: Any) -> Any:
        """Arrays [B, ...] with their rows dealt to the devices."""
        if self.model.mesh is None:
            return arrays
        rows = sharding.batch_sharding(self.model.mesh, len(arrays[1]))
        return jax.device_put(arrays, rows)


def bucket(slots: int) -> int:
    """The capacity for texts of `slots` tokens: a power of two, so that few programs are compiled."""
    return max(_SMALLEST_BUCKET, 1 << (slots - 1).bit_length())


class Row:
    """What one row of a session has given so far: its text, cut at a stop string, and how it came about."""

    def __init__(self, model: Model, request: Request):
        """Nothing yet."""
        self._stop_ids = model.tokenizer.stop_ids
        self.text = ""
        self.stream = TextStream(model.tokenizer, start=not isinstance(request.prompt, str), stop=request.stop)
        self.tokens: list[int] = []  # a stop token included
        self.accept_lengths: list[int] = []
        self.finish_reason: str | None = None  # 'eos', 'stop', 'length', or None while it goes on

    def take(self, tokens: Sequence[int], accept_lengths: Sequence[int], done: bool) -> str:
        """All tokens of the row so far and how many came with each pass; returns the text that is new."""
        if self.finish_reason is not None:
            return ""
        is_end = done and tokens and tokens[-1] in self._stop_ids
        piece = self.stream.push(tokens[len(self.stream.tokens) : len(tokens) - bool(is_end)])
        if done:
            piece += self.stream.finish()
        self.tokens = list(tokens)
        if self.stream.stopped:
            self.tokens = list(self.stream.tokens)
            self.finish_reason = "stop"
        elif done:
            self.finish_reason = "eos" if is_end else "length"
        self.accept_lengths = _cut(accept_lengths, len(self.tokens))
        self.text += piece
        return piece


def _cut(accept_lengths: Sequence[int], count: int) -> list[int]:
    """The passes that gave the first `count` tokens; the last one only as far as they go."""
    kept: list[int] = []
    for length in accept_lengths:
        if count > 0:
            kept.append(min(length, count))
            count -= length
    return kept
