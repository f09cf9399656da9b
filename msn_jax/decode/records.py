"""What a pass would find at each place of known answers: the statistics that `tree_search.py` searches with.

Every decoder gives the same answers, so they are known before any tree is. For every place of every answer it is
recorded what a pass that starts there has to fill its tree with:

    rows     the K best tokens of each Jacobi row; nothing at the beginning of an answer
    found    the tokens of each retrieved branch, and how many tokens of the text's suffix it matches

What is retrieved depends on the text alone. Jacobi rows depend on the wrong guesses that they were predicted behind, so
they are taken from a followed decoding: passes that end at given places, with the right tokens before the end of a pass
and a wrong guess there, and behind it whatever the tree holds. Every place is recorded, not only those where passes of
some tree start, because those of another tree start elsewhere.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from msn_jax import cache as caches
from msn_jax import llama
from msn_jax.config import LlamaConfig
from msn_jax.decode import drafters, loop, retrieval, session
from msn_jax.decode import tree as trees
from msn_jax.decode.drafters import Drafter
from msn_jax.decode.loop import DecodeState
from msn_jax.decode.requests import Request
from msn_jax.decode.session import Decoding, Model
from msn_jax.decode.tree import JACOBI, TokenTree
from msn_jax.decode.verify import Verified

DEPTH = 12  # D: rows and retrieved tokens, so the deepest tree
RANKS = 14  # K: ten ranks, and as many to spare as there are branches that may hold the same tokens
BRANCHES = 4  # R
NOTHING = np.int32(-1)  # no guess: noise
WRONG = np.int32(-2)  # a guess that is not known, taken for a wrong one
_END = np.int32(-3)  # of an answer: equal to no guess
_ROWS = 8  # walks followed at once

Text = tuple[list[int], list[int]]  # prompt and answer, token ids
Show = Callable[[Sequence], Iterable]  # wraps what is gone through: a progress bar
Walk = tuple[int, Sequence[int]]  # an answer, and the places of it where passes start


@dataclasses.dataclass(frozen=True)
class Records:
    """B answers, N tokens in the longest one."""

    sizes: np.ndarray  # int [B], tokens of each answer
    answers: np.ndarray  # int32 [B, N + D], the answers, then `_END`
    rows: np.ndarray  # int32 [B, N, D, K], `WRONG` where no walk came by
    found: np.ndarray  # int32 [B, N, R, D], `NOTHING` where nothing matches
    agreement: np.ndarray  # int32 [B, N, R], tokens that match

    @property
    def coming(self) -> np.ndarray:
        """int32 [B, N, D]: the tokens from each place on. A view."""
        return np.lib.stride_tricks.sliding_window_view(self.answers, DEPTH, axis=1)[:, : self.rows.shape[1]]


def without_rows(texts: Sequence[Text], ranks: int) -> Records:
    """What is retrieved at each place, and no Jacobi rows."""
    sizes = np.array([len(answer) for _, answer in texts])
    longest = int(sizes.max())
    answers = np.full((len(texts), longest + DEPTH), _END, np.int32)
    found = np.full((len(texts), longest, BRANCHES, DEPTH), NOTHING, np.int32)
    agreement = np.zeros((len(texts), longest, BRANCHES), np.int32)
    slots = session.bucket(max(len(prompt) + len(answer) for prompt, answer in texts))
    for number, (prompt, answer) in enumerate(texts):
        answers[number, : len(answer)] = answer
        tokens = np.zeros(slots, np.int32)
        tokens[: len(prompt) + len(answer)] = prompt + answer
        lengths = np.minimum(len(prompt) + np.arange(longest), slots).astype(np.int32)
        found[number], agreement[number] = _retrieve_everywhere(tokens, lengths)
    rows = np.full((len(texts), longest, DEPTH, ranks), WRONG, np.int32)
    return Records(sizes, answers, rows, found, agreement)


@jax.jit
def _retrieve_everywhere(tokens: Array, lengths: Array) -> tuple[Array, Array]:
    return jax.lax.map(lambda length: retrieval.retrieve(tokens, length, BRANCHES, DEPTH), lengths, batch_size=32)


def steady(records: Records, pace: int) -> list[Walk]:
    """Walks of `pace` tokens a pass that come by every place."""
    return [(text, range(first, size, pace)) for text, size in enumerate(records.sizes) for first in range(pace)]


def follow(
    model: Model,
    texts: Sequence[Text],
    records: Records,
    tree: TokenTree,
    walks: Sequence[Walk],
    show: Show = iter,
) -> Records:
    """`records` with fresh rows at the places where a walk comes by.

    Args:
      model: the model.
      texts: prompts and answers.
      records: of the same texts.
      tree: its spine is what passes hold behind the place where they end, prolonged by Jacobi nodes.
      walks: passes of at most D + 1 tokens, the one from the beginning of the answer to the first place included: each
        walk begins there, because nothing is predicted for its first pass.
      show: for a progress bar.
    """
    ranks = records.rows.shape[-1]
    drafter = drafters.self_drafter("probe", _probe(tree, ranks))
    walks = [(text, np.union1d(0, starts)) for text, starts in walks if len(starts)]
    passes = max(len(starts) for _, starts in walks)
    capacity = session.bucket(max(len(prompt) + len(answer) for prompt, answer in texts) + drafter.tree.max_depth + 1)
    rows = records.rows.copy()
    for first in show(range(0, len(walks), _ROWS)):
        batch = walks[first : first + _ROWS]
        padded = batch + batch[:1] * (_ROWS - len(batch))
        counts = np.zeros((passes, _ROWS), np.int32)
        for row, (_, starts) in enumerate(padded):
            counts[: len(starts) - 1, row] = np.diff(starts)
        ids = [texts[text][0] + texts[text][1] for text, _ in padded]
        lengths = [len(texts[text][0]) for text, _ in padded]
        state = state_within(model, drafter, ids, lengths, capacity)
        drafts = np.asarray(_drafts(model.params, model.cfg, drafter, state, counts))
        for row, (text, starts) in enumerate(batch):
            rows[text, starts] = drafts[: len(starts), row, :, :ranks]
    return dataclasses.replace(records, rows=rows)


def _probe(tree: TokenTree, ranks: int) -> TokenTree:
    """The spine of `tree`, prolonged to 2 D nodes, so that every pass leaves D rows; and a leaf that asks for K."""
    spine = [(tree.sources[node], tree.ranks[node]) for node in tree.continuations[0] if node >= 0]
    spine += [(JACOBI, 0)] * (2 * DEPTH - len(spine))
    nodes = [(node, *guess) for node, guess in enumerate(spine)]
    return trees.build([*nodes, (0, JACOBI, ranks - 1)], tree.min_match)


def state_within(
    model: Model, drafter: Drafter, texts: Sequence[Sequence[int]], lengths: Sequence[int], capacity: int
) -> DecodeState:
    """The state of a decoding that has come to the first `lengths` tokens of known texts. The others are there as well,
    where they are leftovers, and no row ends.
    """
    begun = [list(text[:length]) for text, length in zip(texts, lengths, strict=True)]
    state = Decoding(model, drafter, begun, [Request("", max_new_tokens=1)] * len(texts), len(texts)).state
    if state.capacity != capacity:
        state = loop.grow(drafter, state, capacity)
    tokens = np.zeros((len(texts), capacity), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    limits = np.full(len(texts), np.iinfo(np.int32).max, np.int32)
    return state.replace(tokens=tokens, limits=limits, done=np.zeros(len(texts), bool))


@functools.partial(jax.jit, static_argnames=("cfg", "drafter"))
def _drafts(params: dict, cfg: LlamaConfig, drafter: Drafter, state: DecodeState, counts: Array) -> Array:
    """int32 [passes, B, D, K]: the rows that passes have which emit `counts`, int32 [passes, B], of the known tokens.

    A pass is one of `loop.step`, but for two things. The nodes that it is to accept hold the right tokens, and the next
    one, which it is to reject, holds a wrong one: the drafter's guess, or the second best where that is right.
    """
    tree, batch = drafter.tree, jnp.arange(state.tokens.shape[0])
    depth = jnp.asarray(tree.depth)[None, :]
    nodes_of_spine = jnp.broadcast_to(jnp.arange(DEPTH + 1, dtype=jnp.int32)[None, :], (len(batch), DEPTH + 1))

    def one_pass(state: DecodeState, count: Array) -> tuple[DecodeState, Array]:
        rows = state.draft.rows[:, :DEPTH]
        guesses, draft = drafter.propose(drafter, None, state)
        positions = state.lengths[:, None] - 1 + depth
        right = jnp.take_along_axis(state.tokens, positions, axis=1, mode="clip")
        best = rows[batch, jnp.clip(count - 1, 0, DEPTH - 1), :2]  # [B, 2]
        other = jnp.where(best[:, :1] == right, best[:, 1:], best[:, :1])
        other = jnp.where((other < 0) | (other == right), (right + 1) % cfg.vocab_size, other)
        wrong = jnp.where(guesses == right, other, guesses)
        nodes = jnp.where(depth < count[:, None], right, jnp.where(depth == count[:, None], wrong, guesses))

        output = llama.forward(params, cfg, nodes, positions, jnp.asarray(tree.mask), state.cache)
        verified = Verified(nodes_of_spine, jnp.maximum(count - 1, 0), right[:, : DEPTH + 1], count)
        logits = llama.unembed(params, cfg, output.hidden)
        state = state.replace(
            lengths=state.lengths + count,
            cache=caches.commit(state.cache, output.kv, nodes_of_spine, count),
            draft=drafter.update(drafter, draft, verified, logits),
            forward_passes=state.forward_passes + 1,
        )
        return state, rows

    return jax.lax.scan(one_pass, state, counts)[1]
