"""The race of token trees: what a pass costs by width, which trees should be fastest, and which one is.

Expected is `tokens / (passes * seconds of a pass + prefill)`: passes from the replay (`tree_search.py`), the time of a
pass from the compiled loop at a typical place of the texts. Measured is what the same prompts take from beginning to
end. All runs are taken in turns, forwards and backwards, so that a slow moment of the machine meets all trees.
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
from msn_jax.decode import drafters, loop, records, session, tree_search
from msn_jax.decode import tree as trees
from msn_jax.decode.drafters import Drafter
from msn_jax.decode.records import Records, Text
from msn_jax.decode.requests import Request
from msn_jax.decode.session import Decoding, Model
from msn_jax.decode.tree import TokenTree

WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # that are timed
ROOT_ALONE = "autoregressive"
_FEWEST_TOKENS = 100  # of all answers
_REPEATS = 9  # of a timed run of passes
_PASSES = 32  # of such a run, at most
_ROOM = 64  # tokens that it may add
_ROUNDS = 3  # of the race
_RACERS = 3  # trees that should be fastest
_FIXED_WIDTHS = (4, 8, 16, 32)

Show = Callable[[Iterable, str], Iterable]  # wraps what is gone through, with a title: a progress bar


@dataclasses.dataclass(frozen=True)
class Expected:
    """What a tree should do."""

    tree: TokenTree
    seconds: float  # of a pass, measured
    tokens_per_pass: float
    rate: float  # tokens/s


@dataclasses.dataclass(frozen=True)
class Racer:
    """A tree in the race: expected, and measured."""

    name: str
    expected: Expected
    tokens_per_pass: float
    rate: float  # tokens/s
    exact_share: float  # answers equal to those of the root alone


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What came of it."""

    widths: dict[int, Expected]  # of the best tree of each width
    racers: list[Racer]  # the fastest first
    known: Records


def answer(model: Model, drafter: Drafter, prompt: list[int], max_new_tokens: int) -> tuple[list[int], int, float]:
    """New tokens, forward passes and seconds of one prompt."""
    began = time.perf_counter()
    decoding = Decoding(model, drafter, [prompt], [Request("", max_new_tokens=max_new_tokens)], 1)
    decoding.advance()
    seconds = time.perf_counter() - began
    [(tokens, accepted)] = decoding.answers()
    return tokens, len(accepted), seconds


def pass_timers(
    model: Model, decoder: str, candidates: Mapping, text: Sequence[int], committed: int
) -> dict[object, Callable[[], float]]:
    """For each candidate tree, by its key, a function that runs a few passes and returns the seconds of one.

    Args:
      model: the model.
      decoder: its drafter fills the trees.
      candidates: trees by any keys.
      text: token ids to decode within, more than `committed`.
      committed: tokens of it that are known when the passes begin.
    """
    deepest = max(tree.max_depth for tree in candidates.values()) + 1
    capacity = session.bucket(max(committed, _ROOM) + deepest)
    start = min(committed, capacity - _ROOM)
    never = np.full(len(model.tokenizer.stop_ids), -1, np.int32)

    def timer(tree: TokenTree) -> Callable[[], float]:
        drafter = drafters.get(decoder, tree)
        begun = records.state_within(model, drafter, [text[: start + 1]], [start], capacity)

        def run() -> float:
            state = jax.block_until_ready(jax.tree.map(jnp.copy, begun))
            began = time.perf_counter()
            state = loop.decode(model.params, model.cfg, drafter, never, state, np.int32(_PASSES))
            passes = int(state.forward_passes[0])  # waits for them
            return (time.perf_counter() - began) / passes

        return run

    return {key: timer(tree) for key, tree in candidates.items()}


def pass_seconds(timers: Mapping[object, Callable[[], float]], show: Show) -> dict[object, float]:
    """The median time of a pass of each candidate."""
    results: dict = {key: [] for key in timers}
    for repeat in show(range(_REPEATS + 1), "timing passes"):
        for key in _in_turns(timers, repeat):
            result = timers[key]()
            if repeat:  # the first one compiles
                results[key].append(result)
    return {key: statistics.median(values) for key, values in results.items()}


def _in_turns(names: Iterable, repeat: int) -> list:
    return list(names) if repeat % 2 else list(names)[::-1]


@dataclasses.dataclass
class Lap:
    """What a candidate did in the race."""

    seconds: list[list[float]]  # of every prompt and round, prefill included
    pass_seconds: list[float]  # measured in between
    passes: int = 0  # of all prompts
    exact: int = 0  # prompts with the known answer

    @property
    def total(self) -> float:
        """Seconds for all prompts, of each the median."""
        return sum(map(statistics.median, self.seconds))


def race(
    model: Model,
    texts: Sequence[Text],
    lined_up: Mapping[str, tuple[Drafter, int]],
    timers: Mapping[str, Callable[[], float]],
    show: Show,
) -> dict[str, Lap]:
    """All prompts answered by all candidates, drafter and `max_new_tokens` by name, in turns, prompt by prompt."""
    laps = {name: Lap([[] for _ in texts], []) for name in lined_up}
    for number in show(range(_ROUNDS + 1), "race"):
        for place, (prompt, known) in enumerate(texts):
            for name in _in_turns(lined_up, number):
                lap, (drafter, max_new_tokens) = laps[name], lined_up[name]
                tokens, passes, seconds = answer(model, drafter, prompt, max_new_tokens)
                own = timers[name]()
                if number == 0:  # compiles
                    lap.passes += passes
                    lap.exact += tokens == known
                else:
                    lap.seconds[place].append(seconds)
                    lap.pass_seconds.append(own)
    return laps


def calibrate(
    model: Model, prompts: Sequence[list[int]], decoder: str, max_new_tokens: int, max_width: int, show: Show
) -> Calibration:
    """The fastest tree and all that was measured on the way.

    Args:
      model: the model.
      prompts: token ids.
      decoder: a key of `tree_search.PALETTES`.
      max_new_tokens: limit of each answer.
      max_width: of the widest tree that is searched for.
      show: for progress bars.

    Raises:
      InputError: the answers are too short to learn from.
    """
    root = drafters.get(decoder, trees.build([]))
    texts = [(ids, answer(model, root, ids, max_new_tokens)[0]) for ids in show(prompts, "answering")]
    total = sum(len(tokens) for _, tokens in texts)
    if total < _FEWEST_TOKENS:
        raise InputError(
            f"--prompts: {len(texts)} answers of {total} tokens in all: give more prompts or a larger "
            f"--max_new_tokens: {_FEWEST_TOKENS} tokens are needed, thousands are better"
        )
    known = tree_search.collect(model, texts, decoder, functools.partial(show, title="recording drafts"))
    found = tree_search.search(known, decoder, max_width, functools.partial(show, title="searching"))
    typical = sorted(texts, key=lambda text: len(text[0]) + len(text[1]))[len(texts) // 2]
    place = (typical[0] + typical[1], len(typical[0]) + len(typical[1]) // 2)
    grid = {width: found[width] for width in WIDTHS if width in found}
    seconds = pass_seconds(pass_timers(model, decoder, grid, *place), show)

    fastest = max(seconds, key=lambda width: _expected(found[width], seconds[width], known, 0.0).rate)
    known = tree_search.collect_again(
        model, texts, known, found[fastest], functools.partial(show, title="recording drafts again")
    )
    found = tree_search.search(known, decoder, max_width, functools.partial(show, title="searching again"))
    widths = {width: _expected(found[width], seconds[width], known, 0.0) for width in seconds if width in found}

    candidates = line_up(widths, decoder, max_width)
    lined_up = {name: (drafters.get(decoder, tree), max_new_tokens) for name, tree in candidates.items()}
    timers = pass_timers(model, decoder, candidates, *place)
    prefill_alone = {"": (root, 1)}
    laps = race(model, texts, lined_up | prefill_alone, timers | {"": timers[ROOT_ALONE]}, show)
    prefill = max(laps[""].total - len(texts) * statistics.median(laps[""].pass_seconds), 0.0)
    racers = []
    for name, tree in candidates.items():
        lap = laps[name]
        guess = _expected(tree, statistics.median(lap.pass_seconds), known, prefill)
        racers.append(Racer(name, guess, total / lap.passes, total / lap.total, lap.exact / len(texts)))
    widths = {width: _expected(found[width], seconds[width], known, prefill) for width in widths}
    return Calibration(widths, sorted(racers, key=lambda racer: -racer.rate), known)


def _expected(tree: TokenTree, seconds: float, known: Records, prefill: float) -> Expected:
    """`prefill` is in seconds, of all texts together."""
    seen = tree_search.replay(tree, known)
    tokens, passes = int(seen.count.sum()), len(seen.count)
    return Expected(tree, seconds, tokens / passes, tokens / (passes * seconds + prefill))


def line_up(widths: Mapping[int, Expected], decoder: str, max_width: int) -> dict[str, TokenTree]:
    """Who races, by name: what should be fastest, and what it has to beat."""
    by_rate = sorted((width for width in widths if width > 1), key=lambda width: -widths[width].rate)
    candidates = {f"width {width}": widths[width].tree for width in by_rate[:_RACERS]}
    candidates |= {f"width {width}": widths[width].tree for width in _FIXED_WIDTHS if width in widths}
    candidates[ROOT_ALONE] = trees.build([])
    candidates["default"] = drafters.DEFAULT_TREES[decoder]
    if decoder == "tr_jacobi" and max_width >= 64:
        candidates["authors' 69 nodes"] = tree_search.authors_tree()
    first = {tree: name for name, tree in reversed(candidates.items())}  # a tree that has several names keeps the first
    return {name: tree for name, tree in candidates.items() if first[tree] == name}
