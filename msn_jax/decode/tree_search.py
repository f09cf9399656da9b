"""Which tree pays: the search for the tree that makes most of what drafts are right, on this model's texts.

The idea is that of Sequoia (arXiv 2402.12374) and OPT-Tree (arXiv 2406.17276), with joint statistics instead of a
product of marginal ones. A candidate tree is *replayed* on `records.py`: it walks through known answers, from the place
where one pass ends to where the next one starts, and accepts what the decoder would accept. For trees that only
retrieve, this is what the decoder does, pass by pass. Otherwise two things are approximate, beside the rows themselves:

- Where a row of a branching tree comes from the spine although another path was accepted (`TokenTree.continuations`),
  it lies behind more wrong tokens. It is taken to be row d + e of the draft for the place e tokens earlier, which it
  would be if the spine had been left there.
- Noise that happens to be right is not counted.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from msn_jax.decode import drafters, records
from msn_jax.decode import tree as trees
from msn_jax.decode.records import BRANCHES, DEPTH, NOTHING, WRONG, Records, Show
from msn_jax.decode.session import Model
from msn_jax.decode.tree import EITHER, JACOBI, NOISE, RETRIEVAL, TokenTree

# What the trees of a decoder are grown from, and the chain that its first records follow.
PALETTES = {
    "jacobi": (JACOBI, NOISE),
    "prompt_lookup": (RETRIEVAL,),
    "tr_jacobi": (EITHER, JACOBI, RETRIEVAL, NOISE),
}
_RANKS = {JACOBI: records.RANKS - BRANCHES, RETRIEVAL: BRANCHES, EITHER: 1, NOISE: 1}  # that are tried
_MIN_MATCHES = (1, 2, 3, 5)
_PACE = 2  # tokens a pass, of the first records
_OFFSETS = 4  # walks of a tree through each answer, begun one token after another
_BEAM = 3  # trees that are kept per width
_TRIED = 6  # additions to a tree that are replayed, of those that look best


@dataclasses.dataclass(frozen=True)
class Replay:
    """A tree's passes through all answers, V of them."""

    text: np.ndarray  # int [V], which answer
    start: np.ndarray  # int [V], tokens of it that were there before
    shifts: np.ndarray  # int [V, P], see `_shifts`
    right: np.ndarray  # bool [V, W], nodes whose whole path is right
    last: np.ndarray  # int [V], the deepest of them
    count: np.ndarray  # int [V], tokens emitted

    @property
    def tokens_per_pass(self) -> float:
        """The mean accept length."""
        return float(self.count.mean())

    def acceptance(self, tree: TokenTree) -> np.ndarray:
        """float [W]: the share of passes that accept each node."""
        return tree.mask[0][self.last].mean(axis=0)


# --- records --------------------------------------------------------------------------------------------------------


def collect(model: Model, texts: Sequence[records.Text], decoder: str, show: Show = iter) -> Records:
    """The first records: a chain of the decoder's first source, followed at a steady pace."""
    empty = records.without_rows(texts, min(records.RANKS, model.cfg.vocab_size))
    source = PALETTES[decoder][0]
    if source == RETRIEVAL:
        return empty
    chain = trees.chain(source, DEPTH, drafters.DEFAULT_TREES[decoder].min_match)
    return records.follow(model, texts, empty, chain, records.steady(empty, _PACE), show)


def collect_again(
    model: Model, texts: Sequence[records.Text], before: Records, tree: TokenTree, show: Show = iter
) -> Records:
    """The records `before`, with those that follow `tree` wherever its passes come by."""
    if not tree.count(JACOBI):
        return before
    walks = []
    for offset in range(min(_OFFSETS, int(before.sizes.min()))):
        seen = replay(tree, before, offset)
        walks += [(text, seen.start[seen.text == text]) for text in range(len(texts))]
    return records.follow(model, texts, before, tree, walks, show)


# --- replay ---------------------------------------------------------------------------------------------------------


def replay(tree: TokenTree, known: Records, start: int = 0) -> Replay:
    """The passes of `tree` through all answers, begun `start` tokens into each of them."""
    if tree.max_depth > DEPTH:
        raise ValueError(f"a tree of depth {tree.max_depth}: what is recorded ends at {DEPTH}")
    shifts, row, coming = _shifts(tree), np.maximum(tree.depth - 1, 0), known.coming
    descendants = tree.mask[0].T.astype(np.float32)  # [ancestor, node]
    at, last = np.full(len(known.sizes), start), np.full(len(known.sizes), tree.width)
    passes = []
    while len(text := np.flatnonzero(at < known.sizes)):
        here, shift = at[text], shifts[last[text]]
        wrong = node_tokens(tree, known, text, here, shift) != coming[text, here][:, row]
        wrong[:, 0] = False
        right = wrong.astype(np.float32) @ descendants == 0
        last[text] = np.argmax(np.where(right, tree.depth, -1), axis=1)
        count = np.minimum(tree.depth[last[text]] + 1, known.sizes[text] - here)
        passes.append((text, here, shift, right, last[text], count))
        at[text] += count
    return Replay(*map(np.concatenate, zip(*passes, strict=True)))


def _shifts(tree: TokenTree) -> np.ndarray:
    """int [W + 1, P]: where draft row d comes from if node w was the last one accepted; the last line is for the
    first pass.

    0: from behind w itself. e: from a node that left the accepted path e nodes above w. -1: from nowhere.
    """
    shifts = np.zeros((tree.width + 1, tree.max_depth), int)
    for last, behind in enumerate(tree.continuations):
        common = tree.mask[0, last] & tree.mask[0, behind]  # [P, W], ancestors of both
        above = tree.depth[last] - np.where(common, tree.depth, 0).max(axis=1, initial=0)
        shifts[last] = np.where(behind >= 0, above, -1)
    return shifts


def node_tokens(tree: TokenTree, known: Records, text: np.ndarray, start: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    """int32 [V, W]: what `drafters.fill_tree` fills the tree with in V passes; `NOTHING` where that is noise.

    Args:
      tree: the tree.
      known: the records.
      text: int [V], which answer.
      start: int [V], where in it.
      shifts: int [V, P], of each draft row, see `_shifts`.
    """
    tokens = _guesses(
        np.array(tree.sources), np.array(tree.ranks), tree.depth, tree.min_match, known, text, start, shifts
    )
    if tree.leaves_beside_retrieval:
        leaves, branches = tree.leaves_beside_retrieval
        branch = np.array(tree.ranks)[branches]
        enough = known.agreement[text, start][:, branch] >= tree.min_match
        first = np.where(enough, known.found[text, start][:, branch, 0], NOTHING)
        candidates = _rows(known, text, start, shifts[:, :1], np.zeros(1, int))[:, 0, : tree.predictions]
        in_use = np.isin(np.arange(candidates.shape[1]), [tree.ranks[node] for node in tree.inner_predictions])
        stays = ~np.any(candidates[:, :, None] == first[:, None, :], axis=-1) | in_use
        is_place = (np.cumsum(stays, axis=1) - 1)[:, None, :] == np.array(tree.ranks)[leaves][None, :, None]
        tokens[:, leaves] = np.take_along_axis(candidates, np.argmax(stays[:, None, :] & is_place, axis=-1), axis=1)
    return tokens


def _guesses(
    sources: np.ndarray,
    ranks: np.ndarray,
    depth: np.ndarray,
    min_match: int,
    known: Records,
    text: np.ndarray,
    start: np.ndarray,
    shifts: np.ndarray,
) -> np.ndarray:
    """`node_tokens` of single nodes, as if no guess were twice in a tree."""
    row, tokens = np.maximum(depth - 1, 0), np.full((len(text), len(sources)), NOTHING)
    predicts, retrieves = (sources == JACOBI) | (sources == EITHER), (sources == RETRIEVAL) | (sources == EITHER)
    if predicts.any():
        rank = np.where(predicts, ranks, 0)
        tokens = np.where(predicts, _rows(known, text, start, shifts[:, row], row, rank), tokens)
    if retrieves.any():
        branch = np.where(retrieves, ranks, 0)
        found = known.found[text[:, None], start[:, None], branch, row]
        enough = known.agreement[text[:, None], start[:, None], branch] >= min_match
        is_fallback = (sources == EITHER) & (tokens == NOTHING)
        tokens = np.where(retrieves & (found != NOTHING) & (enough | is_fallback), found, tokens)
    return tokens


def _rows(
    known: Records,
    text: np.ndarray,
    start: np.ndarray,
    shifts: np.ndarray,
    row: np.ndarray,
    rank: np.ndarray | None = None,
) -> np.ndarray:
    """int32 [V, n], or [V, n, K] of all ranks: tokens of draft rows `row`, int [n], which come from `shifts` [V, n]."""
    place, source = start[:, None] - shifts, row + shifts
    is_known = (shifts >= 0) & (place >= 0) & (source < DEPTH)
    index = (text[:, None], np.where(is_known, place, 0), np.where(is_known, source, 0))
    tokens = known.rows[index] if rank is None else known.rows[*index, rank]
    if rank is None:
        is_known, shifts = is_known[..., None], shifts[..., None]
    return np.where(is_known, tokens, np.where(shifts < 0, NOTHING, WRONG))


# --- search ---------------------------------------------------------------------------------------------------------


def search(known: Records, decoder: str, max_width: int, show: Show = iter, tails: bool = True) -> dict[int, TokenTree]:
    """For every width the tree with the most tokens a pass, grown node by node.

    Each of the best trees of a width is tried with every further node of the decoder's sources behind every node. What
    looks best by the passes that it would prolong is replayed, because a node also changes where later passes start and
    what drafts they find. So are tails of noise, which only leave drafts, and other values of `min_match`.

    Args:
      known: the records.
      decoder: a key of `PALETTES`.
      max_width: the widest tree.
      show: for a progress bar.
      tails: whether trees may have NOISE nodes.
    """
    root = trees.build([])
    sources = [source for source in PALETTES[decoder] if tails or source != NOISE]
    beam, best = [(root, replay(root, known))], {1: root}
    for width in show(range(2, max_width + 1)):
        grown = {}
        for tree, seen in beam:
            for larger in _additions(tree, seen, known, sources):
                grown.setdefault((frozenset(_names(larger)), larger.min_match), larger)
        if not grown:
            break
        beam = _best(list(grown.values()), known)
        if beam[0][0].count(RETRIEVAL):
            others = [dataclasses.replace(beam[0][0], min_match=match) for match in _MIN_MATCHES]
            beam = sorted(beam + _best(others, known)[:1], key=_badness)
        beam, best[width] = beam[:_BEAM], beam[0][0]
    return best


def _best(candidates: Sequence[TokenTree], known: Records) -> list[tuple[TokenTree, Replay]]:
    return sorted(((tree, replay(tree, known)) for tree in candidates), key=_badness)


def _badness(replayed: tuple[TokenTree, Replay]) -> float:
    return -replayed[1].tokens_per_pass


def _additions(tree: TokenTree, seen: Replay, known: Records, sources: Sequence[int]) -> list[TokenTree]:
    """The trees of one more node that look best."""
    options = _options(tree, sources, known.rows.shape[-1])
    if not options:
        return []
    parents, kinds, ranks = map(np.array, zip(*options, strict=True))
    depth = tree.depth[parents] + 1
    shifts = np.pad(seen.shifts, ((0, 0), (0, 1)))  # a tree that is deeper by one may have that row
    guesses = _guesses(kinds, ranks, depth, tree.min_match, known, seen.text, seen.start, shifts)
    right = guesses == known.coming[seen.text, seen.start][:, depth - 1]
    ends = seen.right & (tree.depth == tree.depth[seen.last][:, None])  # [V, W], nodes where more would be gained
    gains = np.sum(right & ends[:, parents], axis=0)
    chosen = list(np.argsort(-gains, kind="stable")[:_TRIED])
    is_leaf = ~np.isin(np.arange(tree.width), tree.parents)
    tails = np.where((kinds == NOISE) & is_leaf[parents], np.sum(ends, axis=0)[parents], 0)
    chosen += [option for option in np.argsort(-tails, kind="stable")[:2] if tails[option]]
    nodes = list(zip(tree.parents, tree.sources, tree.ranks, strict=True))[1:]
    return [trees.build([*nodes, options[option]], tree.min_match) for option in chosen]


def _options(tree: TokenTree, sources: Sequence[int], vocabulary: int) -> list[tuple[int, int, int]]:
    """(parent, source, rank) of every node that might be next: of each source the first rank that a parent lacks."""
    used = set(zip(tree.parents, tree.sources, tree.ranks, strict=True))
    options = []
    for parent in np.flatnonzero(tree.depth < DEPTH).tolist():
        for source in (NOISE,) if tree.sources[parent] == NOISE else sources:
            most = min(_RANKS[source], vocabulary)
            free = [(parent, source, rank) for rank in range(most) if (parent, source, rank) not in used]
            options += free[:1]
    return options


def _names(tree: TokenTree) -> list[tuple]:
    """Every node as the guesses on the way to it."""
    names: list[tuple] = [()]
    for node in range(1, tree.width):
        names.append((*names[tree.parents[node]], (tree.sources[node], tree.ranks[node])))
    return names


# --- the trees of others ----------------------------------------------------------------------------------------------


def authors_tree() -> TokenTree:
    """The tree of the paper's released code: 63 Jacobi nodes, 10, 28, 23, 2 at depths 1 to 4, and 5 retrieved tokens.

    The 63 nodes are `mc_sim_7b_63` of Medusa (github.com/FasterDecoding/Medusa, `medusa/model/medusa_choices.py`), a
    list of index paths. Ranks of siblings have no gaps there, so it is enough to say how many children a path has.
    """
    children = {
        (): 10,
        (0,): 10,
        (1,): 7,
        (2,): 3,
        (3,): 2,
        **{(rank,): 1 for rank in range(4, 10)},
        (0, 0): 10,
        (0, 1): 3,
        (0, 2): 2,
        **{(0, rank): 1 for rank in range(3, 8)},
        (1, 0): 2,
        (2, 0): 1,
        (0, 0, 0): 2,
    }
    paths = [(*path, rank) for path, count in children.items() for rank in range(count)]
    return trees.branches(sorted(paths, key=lambda path: (len(path), path)), retrieval=[5])
