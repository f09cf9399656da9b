"""Host-side driver for one decoding batch.

It pads prompts of different lengths into a batch, calls the compiled loop, grows the state when sequences outgrow it,
and collects the new tokens of each row. Capacities are powers of two, so a few compiled programs serve all batches of
one size.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from msn_jax import cache as caches
from msn_jax.cache import KVCache
from msn_jax.cli import InputError
from msn_jax.decode import adaptive, loop
from msn_jax.decode.batch import PaddedBatch, stop_ids
from msn_jax.decode.drafters import Drafter
from msn_jax.decode.models import Model, recall
from msn_jax.decode.programs import abstract, is_compiling
from msn_jax.decode.request import Request
from msn_jax.decode.scheduler import Scheduler
from msn_jax.decode.text import TextStream

UNLIMITED = int(np.iinfo(np.int32).max)  # forward passes


@dataclasses.dataclass(frozen=True)
class Prefix:
    """A sequence and its cache, for a later prompt that begins with the same tokens."""

    tokens: np.ndarray  # int32 [n], all of them in the cache
    cache: KVCache  # of one row


class DecodeSession:
    """One batch of requests, from the prefill to the last token."""

    def __init__(
        self,
        model: Model,
        drafter: Drafter,
        prompts: Sequence[Sequence[int]],
        requests: Sequence[Request],
        batch_size: int,
        drafter_params: Any = None,
        prefix: Prefix | None = None,
    ):
        """Runs the prefill.

        Args:
          model: the model.
          drafter: proposes the draft tokens.
          prompts: token ids, at most `batch_size` non-empty lists; the remaining rows are idle.
          requests: one per prompt. Only their settings are used, not their `prompt`.
          batch_size: B.
          drafter_params: the drafter's own parameters, if it has any.
          prefix: from an earlier session; only for a batch of one.
        """
        self.model, self.drafter, self.drafter_params = model, drafter, drafter_params
        self.prompt_lengths = [len(ids) for ids in prompts]
        self.num_cached_tokens = 0  # prompt tokens taken from the prefix instead of being run through the model
        batch = PaddedBatch(model, drafter, prompts, requests, batch_size, reuses_prefix=prefix is not None)
        cache = None if prefix is None else self._reuse_prefix(prefix, prompts[0], batch.slots, batch.chunk)
        self._experience = recall(model, drafter, batch_size)
        if self._experience.scheduler is not None:
            self._experience.scheduler.rounds.restart()
        with self._experience.programs.calling(batch.prefill_key(cache is None)):
            self.state = loop.prefill(*batch.prefill_arguments(drafter_params, cache))
        self._passes_before = 0  # the largest of `state.forward_passes` after the last run
        self._stop_ids = stop_ids(model)

    def run(self, passes: int = UNLIMITED) -> bool:
        """Decodes until every row is done, or for `passes` forward passes; returns whether any row is unfinished.

        Raises:
          InputError: the model's logits are not finite.
        """
        while passes > 0:
            if self._experience.scheduler is None:
                self._compile(None)
                passes -= self._decode(passes)
            else:
                passes -= self._decode_scheduled(passes, self._experience.scheduler)
            if self.done:
                break
            if passes > 0 and not self._fits:
                self.state = loop.grow(self.drafter, self.state, 2 * self.state.capacity, self.model.mesh)
                if self._experience.scheduler is not None:
                    self._experience.scheduler.rounds.restart()
        self._check_finite()
        if self.state.policy is not None:
            self._experience.policy = jax.device_get(self.state.policy)
        return not self.done

    def _decode(self, passes: int, width_index: int | None = None) -> int:
        """Runs the compiled loop; returns the number of passes that it ran."""
        if width_index is None:
            self._attach_policy()
        # A fixed width does not use the policy, which is taken out of the state for this call, so that states with and
        # without one run the same compiled program.
        unused = None if width_index is None else self.state.policy
        self.state = loop.decode(
            self.model.params,
            self.model.cfg,
            self.drafter,
            self._stop_ids,
            self.state if unused is None else self.state.replace(policy=None),
            np.int32(passes),
            self.drafter_params,
            self.model.mesh,
            width_index,
        )
        if unused is not None:
            self.state = self.state.replace(policy=unused)
        before, self._passes_before = self._passes_before, int(np.asarray(self.state.forward_passes).max())
        return self._passes_before - before

    def _decode_scheduled(self, passes: int, scheduler: Scheduler) -> int:
        """Executes the scheduler's next run, of at most `passes` passes; returns the same as `_decode`.

        In the adaptive program (`width_index` None), the policy chooses the width of each pass. In a forced run of it,
        every pass runs one given width, which times that width. A round of such runs, one for each width, gives the
        policy its relative times (`scheduler.py`).
        """
        run = scheduler.next(self._is_adaptive_ready)
        if self._compile(run.width_index):
            run = dataclasses.replace(run, is_timed=False)  # the first pass of a program is slow
        is_forced = run.forced != adaptive.UNFORCED
        if is_forced:
            self._set_policy(forced=np.int32(run.forced))
        # Reading `lengths` waits for the prefill, which the clock must not include; untimed runs need not wait for it.
        tokens_before = np.asarray(self.state.lengths).sum() if run.is_timed else 0
        began = time.perf_counter()
        count = self._decode(min(passes, run.passes), run.width_index)
        seconds = time.perf_counter() - began
        tokens = int(np.asarray(self.state.lengths).sum() - tokens_before) if run.is_timed else 0
        scheduler.record(run, count, tokens, seconds)
        if is_forced:
            self._set_policy(forced=np.int32(adaptive.UNFORCED), relative_time=scheduler.rounds.relative_time())
        return count

    def _compile(self, width_index: int | None) -> bool:
        """Calls a program for 0 passes if it has not been called yet, so that no timed run includes its compilation.

        Returns whether this was its first call.
        """
        key = (width_index, self.state.capacity)
        if self._experience.programs.was_called(key):
            return False
        with self._experience.programs.calling(key):
            self._decode(0, width_index)
        return True

    def _is_adaptive_ready(self) -> bool:
        """Whether the adaptive program (`width_index` None) is compiled, and no compilation runs in the background.

        If the program is new, this starts its compilation in the background. If it is ready for the first time, the
        scheduler first inserts a round that does not count: one short run of each width.
        """
        programs, key = self._experience.programs, (None, self.state.capacity)
        if programs.is_new(key):
            self._attach_policy()
            model, state = self.model, abstract(self.state)
            args = (model.params, model.cfg, self.drafter, self._stop_ids, state, np.int32(0), self.drafter_params)
            programs.compile_in_background(key, lambda: loop.decode.lower(*args, model.mesh, None))
        if not programs.is_compiled(key) or is_compiling():
            return False
        if self._compile(None):
            self._experience.scheduler.rounds.warm_up()
        return True

    def _attach_policy(self) -> None:
        """Puts the policy, with the latest times, into the state, unless it is there or the drafter has none."""
        experience, done = self._experience, self.state.done
        if experience.policy is None or self.state.policy is not None:
            return
        policy = experience.policy.replace(relative_time=experience.scheduler.rounds.relative_time())
        is_named = isinstance(done.sharding, NamedSharding)
        replicated = NamedSharding(done.sharding.mesh, PartitionSpec()) if is_named else done.sharding
        self.state = self.state.replace(policy=_place(policy, replicated, done.committed))

    def _set_policy(self, **values: np.ndarray) -> None:
        """Replaces fields of the policy."""
        self._attach_policy()
        policy = self.state.policy
        old = {name: getattr(policy, name) for name in values}
        placed = {name: _place(value, old[name].sharding, old[name].committed) for name, value in values.items()}
        self.state = self.state.replace(policy=policy.replace(**placed))

    @property
    def _fits(self) -> bool:
        """Whether the next forward pass fits into the state's capacity."""
        most_emitted = self.drafter.tree.max_depth + 1
        return int(np.asarray(self.state.lengths).max()) + most_emitted <= self.state.capacity

    @property
    def done(self) -> bool:
        """Whether every row is done."""
        return bool(np.asarray(self.state.done).all())

    def cancel(self, rows: Sequence[int]) -> None:
        """Ends the given rows; the other rows are not affected."""
        if not rows:
            return
        old, done = self.state.done, np.array(self.state.done)
        done[list(rows)] = True
        self.state = self.state.replace(done=_place(done, old.sharding, old.committed))

    def output_tokens(self) -> list[tuple[list[int], list[int]]]:
        """For every request: all tokens after the prompt, and how many of them each forward pass emitted."""
        state = jax.device_get((self.state.tokens, self.state.lengths, self.state.accept_lengths))
        passes = np.asarray(self.state.forward_passes)
        return [
            (tokens[prompt_length:length].tolist(), accepted[:count].tolist())
            for prompt_length, tokens, length, accepted, count in zip(self.prompt_lengths, *state, passes, strict=False)
        ]

    def passes_by_width(self) -> list[dict[int, int]]:
        """For every row: forward passes by the number of tree nodes that they ran."""
        if self.state.passes_by_width is None:
            return [{self.drafter.tree.width: int(count)} for count in self.state.forward_passes]
        counts = np.asarray(self.state.passes_by_width)
        return [
            {width: int(count) for width, count in zip(self.drafter.widths, row, strict=True) if count}
            for row in counts
        ]

    def prefix(self) -> Prefix:
        """The sequence and cache of a batch of one, for the next turn of a chat."""
        committed = int(self.state.cache.lengths[0])
        return Prefix(np.asarray(self.state.tokens)[0, :committed], self.state.cache)

    def _reuse_prefix(self, prefix: Prefix, ids: Sequence[int], slots: int, chunk: int) -> KVCache:
        """The prefix's cache, truncated to the tokens that it shares with the prompt, rounded down to whole chunks.

        The last prompt token is never taken from the cache, because it is the root of the first tree.
        """
        longest = min(len(prefix.tokens), len(ids) - 1)
        differs = np.flatnonzero(prefix.tokens[:longest] != np.asarray(ids[:longest]))
        shared = int(differs[0]) if differs.size else longest
        self.num_cached_tokens = shared // chunk * chunk
        return caches.resize(prefix.cache, slots).replace(lengths=np.array([self.num_cached_tokens], np.int32))

    def _check_finite(self) -> None:
        newest = np.asarray(self.state.tokens)[np.arange(len(self.state.lengths)), np.asarray(self.state.lengths) - 1]
        if (newest == self.model.cfg.vocab_size).any():
            raise InputError(
                f"{self.model.name or 'model'}: the logits, computed in {self.model.cfg.dtype}, are not finite; check "
                f"the checkpoint{'' if self.model.cfg.dtype == 'float32' else ', or decode in float32'}"
            )


def _place(values: Any, placement: jax.sharding.Sharding, committed: bool) -> Any:
    """Puts host arrays on devices, like the arrays that they replace: otherwise programs would compile again.

    Args:
      values: host arrays.
      placement: the sharding of the replaced arrays.
      committed: their `jax.Array.committed`: whether they were placed explicitly.
    """
    return jax.device_put(values, placement) if committed else jax.tree.map(jnp.asarray, values)


class RequestState:
    """The output of one request so far: its text, truncated at a stop string, and its tokens."""

    def __init__(self, model: Model, request: Request):
        """An empty output."""
        self._stop_ids = model.tokenizer.stop_ids
        self.text = ""
        # The reply to chat messages is a text of its own. The output continues a prompt that is a string, or a reply
        # that is begun, so a leading space is kept.
        is_own = not isinstance(request.prompt, str) and not request.response_prefix
        self.stream = TextStream(model.tokenizer, start=is_own, stop=request.stop)
        self.tokens: list[int] = []  # including the final stop token, if any
        self.accept_lengths: list[int] = []
        self.finish_reason: str | None = None  # 'eos', 'stop', 'length', or None while unfinished

    def append(self, tokens: Sequence[int], accept_lengths: Sequence[int], done: bool) -> str:
        """Appends new tokens and the accept lengths of their forward passes; returns the text that is new."""
        if self.finish_reason is not None:
            return ""
        self.tokens += tokens
        ends_with_stop_token = done and self.tokens and self.tokens[-1] in self._stop_ids
        new_text = self.stream.push(tokens[:-1] if ends_with_stop_token and tokens else tokens)
        if done:
            new_text += self.stream.finish()
        if self.stream.stopped:
            self.tokens = list(self.stream.tokens)
            self.finish_reason = "stop"
        elif done:
            self.finish_reason = "eos" if ends_with_stop_token else "length"
        self.accept_lengths = _truncate([*self.accept_lengths, *accept_lengths], len(self.tokens))
        self.text += new_text
        return new_text


def collect(session: DecodeSession, states: Sequence[RequestState]) -> list[str]:
    """Appends to each `RequestState` its row's tokens since the last `collect`; returns the new text of each."""
    done = session.state.done.tolist()
    return [
        state.append(tokens[len(state.tokens) :], accept_lengths[len(state.accept_lengths) :], is_done)
        for state, (tokens, accept_lengths), is_done in zip(states, session.output_tokens(), done, strict=False)
    ]


def _truncate(accept_lengths: Sequence[int], count: int) -> list[int]:
    """The accept lengths of the forward passes that emitted the first `count` tokens, the last one shortened."""
    kept: list[int] = []
    for length in accept_lengths:
        if count > 0:
            kept.append(min(length, count))
            count -= length
    return kept
