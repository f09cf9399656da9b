"""Tree search: finds the token tree with the most accepted tokens on this model's completions.

The idea is that of Sequoia (arXiv 2402.12374) and OPT-Tree (arXiv 2406.17276), with joint statistics instead of a
product of marginal ones. A candidate tree is *replayed* on draft traces (`draft_traces.py`): it steps through the known
completions, accepts what the decoder would accept, and starts the next forward pass where the last one ended. For trees
that only retrieve, the replay equals decoding, pass by pass. For other trees two things are approximate, in addition to
the traced rows themselves:

- A draft row of a branching tree may come from the spine although another path was accepted
  (`TokenTree.continuations`); it is then predicted after more wrong tokens. The replay takes row d + e of the draft for
  the position e tokens earlier, which is exact if the spine had been left there.
- Noise that happens to match is not counted.

Axes in this module: V forward passes of a replay, W tree nodes, P depth of the tree, K ranks of a draft row.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from msn_jax.decode import draft_traces, drafters
from msn_jax.decode import tree as trees
from msn_jax.decode.draft_traces import BRANCHES, DEPTH, NO_DRAFT, UNKNOWN, Completion, DraftTraces, Progress
from msn_jax.decode.session import Model
from msn_jax.decode.tree import JACOBI, NOISE, RETRIEVAL, RETRIEVAL_OR_JACOBI, TokenTree

# Node sources of each decoder's trees; the first one makes the chain that the first traces follow.
PALETTES = {
    "jacobi": (JACOBI, NOISE),
    "prompt_lookup": (RETRIEVAL,),
    "tr_jacobi": (RETRIEVAL_OR_JACOBI, JACOBI, RETRIEVAL, NOISE),
}
_MAX_RANKS = {JACOBI: draft_traces.RANKS - BRANCHES, RETRIEVAL: BRANCHES, RETRIEVAL_OR_JACOBI: 1, NOISE: 1}
_MIN_MATCHES = (1, 2, 3, 5)  # values of `TokenTree.min_match` to try
_FIRST_ACCEPT_LENGTH = 2  # tokens per forward pass in the first traces
_OFFSETS = 4  # replays of a tree per completion, started one token apart
_BEAM = 3  # trees kept per width
_NUM_REPLAYED = 6  # most promising additions to a tree that are replayed


@dataclasses.dataclass(frozen=True)
class Replay:
    """The V forward passes of a tree through all completions."""

    completion: np.ndarray  # int [V], index of the completion
    start: np.ndarray  # int [V], its tokens before this pass
    shifts: np.ndarray  # int [V, P], see `_row_shifts`
    matches: np.ndarray  # bool [V, W], nodes whose whole path matches
    last_accepted: np.ndarray  # int [V], the deepest of them
    num_emitted: np.ndarray  # int [V]

    @property
    def mean_accepted_tokens(self) -> float:
        """Tokens per forward pass."""
        return float(self.num_emitted.mean())

    def acceptance(self, tree: TokenTree) -> np.ndarray:
        """float [W]: the share of forward passes that accept each node."""
        return tree.mask[0][self.last_accepted].mean(axis=0)


# --- traces ---------------------------------------------------------------------------------------------------------


def collect_traces(
    model: Model, completions: Sequence[Completion], decoder: str, progress: Progress = iter
) -> DraftTraces:
    """The first traces: of a chain of the decoder's first source, with a constant accept length."""
    traces = draft_traces.retrieval_traces(completions, min(draft_traces.RANKS, model.cfg.vocab_size))
    source = PALETTES[decoder][0]
    if source == RETRIEVAL:
        return traces
    chain = trees.chain(source, DEPTH, drafters.DEFAULT_TREES[decoder].min_match)
    trajectories = draft_traces.uniform_trajectories(traces, _FIRST_ACCEPT_LENGTH)
    return draft_traces.trace(model, completions, traces, chain, trajectories, progress)


def refine_traces(
    model: Model, completions: Sequence[Completion], traces: DraftTraces, tree: TokenTree, progress: Progress = iter
) -> DraftTraces:
    """`traces`, replaced by those of `tree` at every position where its forward passes start."""
    if not tree.num_ranks(JACOBI):
        return traces
    trajectories = []
    for offset in range(min(_OFFSETS, int(traces.lengths.min()))):
        replayed = replay(tree, traces, offset)
        trajectories += [(index, replayed.start[replayed.completion == index]) for index in range(len(completions))]
    return draft_traces.trace(model, completions, traces, tree, trajectories, progress)


# --- replay ---------------------------------------------------------------------------------------------------------


def replay(tree: TokenTree, traces: DraftTraces, offset: int = 0) -> Replay:
    """Replays `tree` on all completions, starting `offset` tokens into each of them."""
    if tree.max_depth > DEPTH:
        raise ValueError(f"a tree of depth {tree.max_depth}: the traces end at depth {DEPTH}")
    shifts, row, future_tokens = _row_shifts(tree), np.maximum(tree.depth - 1, 0), traces.future_tokens
    descendants = tree.mask[0].T.astype(np.float32)  # [ancestor, node]
    position, last = np.full(len(traces.lengths), offset), np.full(len(traces.lengths), tree.width)
    passes = []
    while len(active := np.flatnonzero(position < traces.lengths)):
        start, shift = position[active], shifts[last[active]]
        mismatches = node_tokens(tree, traces, active, start, shift) != future_tokens[active, start][:, row]
        mismatches[:, 0] = False
        matches = mismatches.astype(np.float32) @ descendants == 0
        last[active] = np.argmax(np.where(matches, tree.depth, -1), axis=1)
        num_emitted = np.minimum(tree.depth[last[active]] + 1, traces.lengths[active] - start)
        passes.append((active, start, shift, matches, last[active], num_emitted))
        position[active] += num_emitted
    return Replay(*map(np.concatenate, zip(*passes, strict=True)))


def _row_shifts(tree: TokenTree) -> np.ndarray:
    """int [W + 1, P]: the origin of draft row d if node w was the last accepted one; row W is for the first pass.

    0: predicted after w itself. e > 0: predicted at a node that branches off the accepted path e nodes above w.
    -1: not predicted.
    """
    shifts = np.zeros((tree.width + 1, tree.max_depth), int)
    for last, sources in enumerate(tree.continuations):
        common = tree.mask[0, last] & tree.mask[0, sources]  # [P, W], ancestors of both
        above = tree.depth[last] - np.where(common, tree.depth, 0).max(axis=1, initial=0)
        shifts[last] = np.where(sources >= 0, above, -1)
    return shifts


def node_tokens(
    tree: TokenTree, traces: DraftTraces, completion: np.ndarray, start: np.ndarray, shifts: np.ndarray
) -> np.ndarray:
    """int32 [V, W]: the tokens that `drafters.fill_tree` puts into the tree in V forward passes; `NO_DRAFT` for noise.

    Args:
      tree: the tree.
      traces: the traces.
      completion: int [V], index of the completion.
      start: int [V], position in it.
      shifts: int [V, P], of each draft row, see `_row_shifts`.
    """
    sources, ranks = np.array(tree.sources), np.array(tree.ranks)
    tokens = _drafts(sources, ranks, tree.depth, tree.min_match, traces, completion, start, shifts)
    if tree.dedup_nodes:
        leaves, branches = tree.dedup_nodes
        branch = ranks[branches]
        long_enough = traces.match_lengths[completion, start][:, branch] >= tree.min_match
        first = np.where(long_enough, traces.retrieved[completion, start][:, branch, 0], NO_DRAFT)
        candidates = _rows(traces, completion, start, shifts[:, :1], np.zeros(1, int))[:, 0, : tree.num_predictions]
        in_use = np.isin(np.arange(candidates.shape[1]), [tree.ranks[node] for node in tree.kept_predictions])
        kept = ~np.any(candidates[:, :, None] == first[:, None, :], axis=-1) | in_use
        has_rank = (np.cumsum(kept, axis=1) - 1)[:, None, :] == ranks[leaves][None, :, None]
        tokens[:, leaves] = np.take_along_axis(candidates, np.argmax(kept[:, None, :] & has_rank, axis=-1), axis=1)
    return tokens


def _drafts(
    sources: np.ndarray,
    ranks: np.ndarray,
    depth: np.ndarray,
    min_match: int,
    traces: DraftTraces,
    completion: np.ndarray,
    start: np.ndarray,
    shifts: np.ndarray,
) -> np.ndarray:
    """`node_tokens` of independent nodes, before duplicates are replaced."""
    row, tokens = np.maximum(depth - 1, 0), np.full((len(completion), len(sources)), NO_DRAFT)
    is_either = sources == RETRIEVAL_OR_JACOBI
    predicts, retrieves = (sources == JACOBI) | is_either, (sources == RETRIEVAL) | is_either
    if predicts.any():
        rank = np.where(predicts, ranks, 0)
        tokens = np.where(predicts, _rows(traces, completion, start, shifts[:, row], row, rank), tokens)
    if retrieves.any():
        branch = np.where(retrieves, ranks, 0)
        retrieved = traces.retrieved[completion[:, None], start[:, None], branch, row]
        long_enough = traces.match_lengths[completion[:, None], start[:, None], branch] >= min_match
        is_fallback = is_either & (tokens == NO_DRAFT)
        tokens = np.where(retrieves & (retrieved != NO_DRAFT) & (long_enough | is_fallback), retrieved, tokens)
    return tokens


def _rows(
    traces: DraftTraces,
    completion: np.ndarray,
    start: np.ndarray,
    shifts: np.ndarray,
    row: np.ndarray,
    rank: np.ndarray | None = None,
) -> np.ndarray:
    """int32 [V, n], or [V, n, K] for all ranks: tokens of the draft rows `row`, int [n], with origins `shifts`."""
    position, source_row = start[:, None] - shifts, row + shifts
    is_traced = (shifts >= 0) & (position >= 0) & (source_row < DEPTH)
    index = (completion[:, None], np.where(is_traced, position, 0), np.where(is_traced, source_row, 0))
    tokens = traces.jacobi[index] if rank is None else traces.jacobi[*index, rank]
    if rank is None:
        is_traced, shifts = is_traced[..., None], shifts[..., None]
    return np.where(is_traced, tokens, np.where(shifts < 0, NO_DRAFT, UNKNOWN))


# --- search ---------------------------------------------------------------------------------------------------------


def search(
    traces: DraftTraces, decoder: str, max_width: int, progress: Progress = iter, tails: bool = True
) -> dict[int, TokenTree]:
    """For every width the tree with the most tokens per forward pass, grown node by node (beam search).

    Every tree of the beam is extended by every possible node of the decoder's sources. The extensions that would
    lengthen the most passes are replayed, because a new node also changes where later passes start and which drafts
    they find. Noise tails, which only leave drafts for the next pass, and other values of `min_match` are replayed too.

    Args:
      traces: the traces.
      decoder: a key of `PALETTES`.
      max_width: the widest tree.
      progress: wraps the widths in a progress bar.
      tails: whether trees may have NOISE nodes.
    """
    root = trees.build([])
    sources = [source for source in PALETTES[decoder] if tails or source != NOISE]
    beam, best = [(root, replay(root, traces))], {1: root}
    for width in progress(range(2, max_width + 1)):
        extended = {}
        for tree, replayed in beam:
            for larger in _extensions(tree, replayed, traces, sources):
                extended.setdefault((frozenset(_node_paths(larger)), larger.min_match), larger)
        if not extended:
            break
        beam = _replay_and_sort(list(extended.values()), traces)
        if beam[0][0].num_ranks(RETRIEVAL):
            variants = [dataclasses.replace(beam[0][0], min_match=match) for match in _MIN_MATCHES]
            beam = sorted(beam + _replay_and_sort(variants, traces)[:1], key=_cost)
        beam, best[width] = beam[:_BEAM], beam[0][0]
    return best


def _replay_and_sort(candidates: Sequence[TokenTree], traces: DraftTraces) -> list[tuple[TokenTree, Replay]]:
    return sorted(((tree, replay(tree, traces)) for tree in candidates), key=_cost)


def _cost(replayed: tuple[TokenTree, Replay]) -> float:
    return -replayed[1].mean_accepted_tokens


def _extensions(tree: TokenTree, replayed: Replay, traces: DraftTraces, sources: Sequence[int]) -> list[TokenTree]:
    """The most promising trees with one more node."""
    options = _options(tree, sources, traces.jacobi.shape[-1])
    if not options:
        return []
    parents, node_sources, ranks = map(np.array, zip(*options, strict=True))
    depth = tree.depth[parents] + 1
    shifts = np.pad(replayed.shifts, ((0, 0), (0, 1)))  # a tree that is deeper by one may have that row
    completion, start = replayed.completion, replayed.start
    drafts = _drafts(node_sources, ranks, depth, tree.min_match, traces, completion, start, shifts)
    matches = drafts == traces.future_tokens[completion, start][:, depth - 1]
    is_deepest = tree.depth == tree.depth[replayed.last_accepted][:, None]
    ends = replayed.matches & is_deepest  # [V, W], nodes where a matching child would lengthen the pass
    gains = np.sum(matches & ends[:, parents], axis=0)
    chosen = list(np.argsort(-gains, kind="stable")[:_NUM_REPLAYED])
    is_leaf = ~np.isin(np.arange(tree.width), tree.parents)
    tails = np.where((node_sources == NOISE) & is_leaf[parents], np.sum(ends, axis=0)[parents], 0)
    chosen += [option for option in np.argsort(-tails, kind="stable")[:2] if tails[option]]
    nodes = list(zip(tree.parents, tree.sources, tree.ranks, strict=True))[1:]
    return [trees.build([*nodes, options[option]], tree.min_match) for option in chosen]


def _options(tree: TokenTree, sources: Sequence[int], vocab_size: int) -> list[tuple[int, int, int]]:
    """(parent, source, rank) of every possible next node: per parent and source, the lowest unused rank."""
    used = set(zip(tree.parents, tree.sources, tree.ranks, strict=True))
    options = []
    for parent in np.flatnonzero(tree.depth < DEPTH).tolist():
        for source in (NOISE,) if tree.sources[parent] == NOISE else sources:
            max_rank = min(_MAX_RANKS[source], vocab_size)
            unused = [(parent, source, rank) for rank in range(max_rank) if (parent, source, rank) not in used]
            options += unused[:1]
    return options


def _node_paths(tree: TokenTree) -> list[tuple]:
    """Every node as its path of (source, rank) pairs, which identifies it whatever the order of the nodes."""
    paths: list[tuple] = [()]
    for node in range(1, tree.width):
        paths.append((*paths[tree.parents[node]], (tree.sources[node], tree.ranks[node])))
    return paths


# --- published trees --------------------------------------------------------------------------------------------------


def authors_tree() -> TokenTree:
    """The tree of the paper's released code: 63 Jacobi nodes (10, 28, 23, 2 at depths 1 to 4) and 5 retrieved tokens.

    The 63 nodes are `mc_sim_7b_63` of Medusa (github.com/FasterDecoding/Medusa, `medusa/model/medusa_choices.py`), a
    list of index paths. Sibling ranks have no gaps there, so the number of children per path describes it.
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
    return trees.tr_jacobi_tree(sorted(paths, key=lambda path: (len(path), path)), retrieval=[5])
