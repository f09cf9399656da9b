"""Benchmark of token trees: the time of a forward pass by width, the best candidate trees, and their measured speed.

The estimated speed of a tree is `tokens / (passes * seconds per pass + prefill seconds)`. The number of passes comes
from the replay (`tree_search.py`), the time of a pass from the compiled loop at a typical length of the sequences. The
measured speed is that of complete requests. All measurements alternate between the trees, forwards and backwards, so
that a slow phase of the machine affects all trees alike.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from msn_jax.cli import InputError
from msn_jax.decode import batch as batches
from msn_jax.decode import draft_traces, drafters, loop, models, session, tree_search
from msn_jax.decode import tree as trees
from msn_jax.decode.draft_traces import Completion, DraftTraces
from msn_jax.decode.models import Model
from msn_jax.decode.request import Request
from msn_jax.decode.session import DecodeSession, RequestState
from msn_jax.decode.tree import TokenTree

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # timed widths
ROOT_ALONE = "autoregressive"
_MIN_TOKENS = 100  # of all completions together
_REPEATS = 9  # of a timed run of forward passes
_PASSES = 32  # of such a run, at most
_RUN_TOKENS = 64  # that such a run may emit
_ROUNDS = 3  # of complete requests
_STOP_CHECK_INTERVAL = 8  # forward passes between two searches for stop strings
_NUM_BEST = 3  # candidates with the highest estimates
_FIXED_WIDTHS = (4, 8, 16, 32)

TitledProgress = Callable[[Iterable, str], Iterable]  # wraps an iterable in a titled progress bar


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The estimated speed of a tree."""

    tree: TokenTree
    seconds: float  # per forward pass, measured
    mean_accepted_tokens: float
    rate: float  # tokens/s


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A benchmarked tree, estimated and measured."""

    name: str
    estimate: Estimate
    mean_accepted_tokens: float
    rate: float  # tokens/s
    exact_share: float  # completions equal to those of the root alone


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The result of `calibrate`."""

    widths: dict[int, Estimate]  # of the best tree of each width
    candidates: list[Candidate]  # the fastest first
    traces: DraftTraces


def complete(model: Model, prompt: list[int], request: Request) -> Completion:
    """The completion of a prompt under the request's settings, stop strings included."""
    decoding = DecodeSession(model, drafters.get(ROOT_ALONE), [prompt], [request], 1)
    state = RequestState(model, request)
    while state.finish_reason is None:
        decoding.run(_STOP_CHECK_INTERVAL if request.stop else session.UNLIMITED)
        session.collect(decoding, [state])
    return Completion(prompt, state.tokens, request)


def timed_completion(
    model: Model, decoder: str, tree: TokenTree, prompt: list[int], request: Request
) -> tuple[list[int], int, float]:
    """New tokens, forward passes and seconds for one prompt. Stop strings are ignored."""
    drafter, params = models.drafter_of(model, decoder, tree)
    began = time.perf_counter()
    decoding = DecodeSession(model, drafter, [prompt], [request], 1, params)
    decoding.run()
    seconds = time.perf_counter() - began
    [(tokens, accept_lengths)] = decoding.output_tokens()
    return tokens, len(accept_lengths), seconds


def pass_timers(
    model: Model, decoder: str, candidates: Mapping, sequence: Completion, committed: int
) -> dict[object, Callable[[], float]]:
    """For each candidate tree, by its key, a function that runs a few forward passes and returns the seconds per pass.

    Args:
      model: the model.
      decoder: its drafter fills the trees.
      candidates: trees by any keys.
      sequence: a known completion to decode within; prompt and completion have more than `committed` tokens.
      committed: number of its tokens in the cache when the passes start.
    """
    deepest = max(tree.max_depth for tree in candidates.values()) + 1
    capacity = batches.state_capacity(max(committed, _RUN_TOKENS) + deepest)
    decoded = min(committed, capacity - _RUN_TOKENS) - len(sequence.prompt)
    no_stop = np.full(len(model.tokenizer.stop_ids) + 1, -1, np.int32)

    def timer(tree: TokenTree) -> Callable[[], float]:
        drafter, params = models.drafter_of(model, decoder, tree)
        start_state = draft_traces.mid_decode_state(model, drafter, [(sequence, decoded)], capacity, params)

        def run() -> float:
            state = jax.block_until_ready(jax.tree.map(jnp.copy, start_state))
            began = time.perf_counter()
            state = loop.decode(model.params, model.cfg, drafter, no_stop, state, np.int32(_PASSES), params)
            passes = int(state.forward_passes[0])  # waits for the result
            return (time.perf_counter() - began) / passes

        return run

    return {key: timer(tree) for key, tree in candidates.items()}


def pass_seconds(timers: Mapping[object, Callable[[], float]], progress: TitledProgress) -> dict[object, float]:
    """The median seconds per forward pass of each candidate."""
    results: dict = {key: [] for key in timers}
    for repeat in progress(range(_REPEATS + 1), "timing forward passes"):
        for key in _alternate(timers, repeat):
            result = timers[key]()
            if repeat:  # the first one compiles
                results[key].append(result)
    return {key: statistics.median(values) for key, values in results.items()}


def _alternate(names: Iterable, repeat: int) -> list:
    return list(names) if repeat % 2 else list(names)[::-1]


@dataclasses.dataclass
class Timing:
    """Measurements of one candidate."""

    seconds: list[list[float]]  # of every prompt and round, prefill included
    pass_seconds: list[float]  # measured in between
    passes: int = 0  # of all prompts
    exact: int = 0  # prompts with the known completion

    @property
    def total(self) -> float:
        """Seconds for all prompts, of each the median."""
        return sum(map(statistics.median, self.seconds))


def time_candidates(
    model: Model,
    completions: Sequence[Completion],
    decoder: str,
    candidates: Mapping[str, tuple[TokenTree, int | None]],
    timers: Mapping[str, Callable[[], float]],
    progress: TitledProgress,
) -> dict[str, Timing]:
    """Times complete requests, alternating between the candidates prompt by prompt.

    Args:
      model: the model.
      completions: known completions; their lengths are the limits, so that stop strings need no search.
      decoder: its drafter fills the trees.
      candidates: by name, a tree and a smaller limit of new tokens or None.
      timers: by name, from `pass_timers`.
      progress: wraps the rounds in a progress bar.
    """
    timings = {name: Timing([[] for _ in completions], []) for name in candidates}
    for number in progress(range(_ROUNDS + 1), "benchmarking trees"):
        for index, completion in enumerate(completions):
            for name in _alternate(candidates, number):
                timing, (tree, limit) = timings[name], candidates[name]
                request = dataclasses.replace(completion.request, max_new_tokens=limit or len(completion.tokens))
                tokens, passes, seconds = timed_completion(model, decoder, tree, completion.prompt, request)
                seconds_per_pass = timers[name]()
                if number == 0:  # compiles
                    timing.passes += passes
                    timing.exact += tokens == completion.tokens
                else:
                    timing.seconds[index].append(seconds)
                    timing.pass_seconds.append(seconds_per_pass)
    return timings


def calibrate(
    model: Model,
    prompts: Sequence[list[int]],
    requests: Sequence[Request],
    decoder: str,
    max_width: int,
    progress: TitledProgress,
) -> Calibration:
    """Finds the fastest tree.

    Args:
      model: the model.
      prompts: token ids.
      requests: one per prompt; only their settings are used.
      decoder: a key of `tree_search.NODE_SOURCES`.
      max_width: of the widest tree to search for.
      progress: wraps iterables in progress bars.

    Raises:
      InputError: the completions are too short.
    """
    completions = _complete_all(model, prompts, requests, progress)
    titled, is_adapted = functools.partial, model.adapter is not None
    traces = tree_search.collect_traces(model, completions, decoder, titled(progress, title="tracing drafts"))
    best = tree_search.search(traces, decoder, max_width, titled(progress, title="searching trees"))
    typical = sorted(completions, key=lambda one: len(one.prompt) + len(one.tokens))[len(completions) // 2]
    middle = len(typical.prompt) + len(typical.tokens) // 2
    timed = {width: best[width] for width in WIDTHS if width in best}
    seconds = pass_seconds(pass_timers(model, decoder, timed, typical, middle), progress)

    if not is_adapted:
        fastest = max(seconds, key=lambda width: _estimate(best[width], seconds[width], traces, 0.0).rate)
        traces = tree_search.refine_traces(
            model, completions, traces, best[fastest], titled(progress, title="tracing drafts again")
        )
        best = tree_search.search(traces, decoder, max_width, titled(progress, title="searching trees again"))
    widths = {width: _estimate(best[width], seconds[width], traces, 0.0) for width in seconds if width in best}

    trees_by_name = select_candidates(widths, decoder, max_width, is_adapted)
    timers = pass_timers(model, decoder, trees_by_name, typical, middle)
    candidates, prefill = _benchmark(model, completions, traces, decoder, trees_by_name, timers, progress)
    widths = {width: _estimate(best[width], seconds[width], traces, prefill) for width in widths}
    return Calibration(widths, candidates, traces)


def _complete_all(
    model: Model, prompts: Sequence[list[int]], requests: Sequence[Request], progress: TitledProgress
) -> list[Completion]:
    """The completions that are not empty. InputError if they are too short."""
    pairs = progress(list(zip(prompts, requests, strict=True)), "generating")
    completions = [complete(model, ids, request) for ids, request in pairs]
    total = sum(len(completion.tokens) for completion in completions)
    if total < _MIN_TOKENS:
        raise InputError(
            f"--prompts: {len(completions)} completions of {total} tokens in total; at least {_MIN_TOKENS} are needed, "
            "thousands are better: give more prompts or a larger --max_new_tokens"
        )
    return [completion for completion in completions if completion.tokens]


def _benchmark(
    model: Model,
    completions: Sequence[Completion],
    traces: DraftTraces,
    decoder: str,
    trees_by_name: Mapping[str, TokenTree],
    timers: Mapping[str, Callable[[], float]],
    progress: TitledProgress,
) -> tuple[list[Candidate], float]:
    """The measured trees, the fastest first, and the seconds that all prefills together take."""
    candidates = {name: (tree, None) for name, tree in trees_by_name.items()}
    candidates[""] = (trees_by_name[ROOT_ALONE], 1)  # the prefill and one forward pass
    timings = time_candidates(model, completions, decoder, candidates, timers | {"": timers[ROOT_ALONE]}, progress)
    prefill = max(timings[""].total - len(completions) * statistics.median(timings[""].pass_seconds), 0.0)
    total = sum(len(completion.tokens) for completion in completions)
    results = []
    for name, tree in trees_by_name.items():
        timing = timings[name]
        estimate = _estimate(tree, statistics.median(timing.pass_seconds), traces, prefill)
        exact_share = timing.exact / len(completions)
        results.append(Candidate(name, estimate, total / timing.passes, total / timing.total, exact_share))
    return sorted(results, key=lambda candidate: -candidate.rate), prefill


def _estimate(tree: TokenTree, seconds: float, traces: DraftTraces, prefill: float) -> Estimate:
    """`prefill` is in seconds, for all prompts together."""
    replayed = tree_search.replay(tree, traces)
    tokens, passes = int(replayed.num_emitted.sum()), len(replayed.num_emitted)
    return Estimate(tree, seconds, tokens / passes, tokens / (passes * seconds + prefill))


def select_candidates(
    widths: Mapping[int, Estimate], decoder: str, max_width: int, is_adapted: bool = False
) -> dict[str, TokenTree]:
    """The trees to benchmark, by name: those with the best estimates, and the baselines."""
    by_rate = sorted((width for width in widths if width > 1), key=lambda width: -widths[width].rate)
    candidates = {f"width {width}": widths[width].tree for width in by_rate[:_NUM_BEST]}
    candidates |= {f"width {width}": widths[width].tree for width in _FIXED_WIDTHS if width in widths}
    candidates[ROOT_ALONE] = trees.build([])
    candidates["default"] = (drafters.ADAPTED_TREES if is_adapted else drafters.DEFAULT_TREES)[decoder]
    if not is_adapted and decoder == "tr_jacobi" and max_width >= 64:
        candidates["authors' 69 nodes"] = tree_search.make_some_noise_tree()
    first = {tree: name for name, tree in reversed(candidates.items())}  # a tree with several names keeps the first
    return {name: tree for name, tree in candidates.items() if first[tree] == name}
