"""Tree search: finds, for every number of nodes, the token tree that yields the most tokens per forward pass on known
completions of a model. `tree_benchmark.py` chooses among these trees by speed.

As Sequoia (arXiv 2402.12374) does, it searches once for a static tree with the largest expected acceptance, but it
counts the acceptance of whole paths instead of assuming that nodes are accepted independently. (OPT-Tree, arXiv
2406.17276, has the same objective, but builds a tree in every step.) A candidate tree is *replayed* on draft traces,
which hold, for every position of every completion, the drafts that a forward pass starting there would find
(`draft_traces.py`). The replay steps through the known completions, accepts what the decoder would accept, and starts
the next forward pass where the last one ended. It does not count noise that happens to match; apart from that, it
equals decoding, pass by pass, for trees of RETRIEVAL nodes. With JACOBI nodes it is approximate in two more ways:

- The Jacobi predictions were traced with another tree, so they are conditioned on other wrong drafts.
- After a pass of a branching tree, some predictions come from the spine (the chain of first children below the root)
  although another path was accepted (`TokenTree.continuations`). The nodes that make these predictions attend to the
  accepted path only up to the fork, so the last e > 0 tokens of the path are missing from their context. Where decoding
  would use such a prediction at depth d, the replay uses the one traced at depth d + e for a forward pass that starts e
  tokens earlier: both are for the same position, and the same e tokens are missing from the context of both.

The drafts of a gated adapter come from noise tails behind the nodes of the tree. The search first assumes tails behind
all nodes, which it does not count, and then keeps those behind the nodes where most passes end.

Axes in this module: n simulated forward passes, W tree nodes, P depth of the tree, K predictions per position.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from msn_jax.decode import draft_traces, drafters
from msn_jax.decode import tree as trees
from msn_jax.decode.draft_traces import BRANCHES, DEPTH, NO_DRAFT, UNKNOWN, Completion, DraftTraces, Progress
from msn_jax.decode.models import Model
from msn_jax.decode.tree import JACOBI, NOISE, RETRIEVAL, RETRIEVAL_OR_JACOBI, TokenTree

# Node sources of each decoder's trees. The initial traces are recorded with a chain of the first one.
NODE_SOURCES = {
    "jacobi": (JACOBI, NOISE),
    "prompt_lookup": (RETRIEVAL,),
    "tr_jacobi": (RETRIEVAL_OR_JACOBI, JACOBI, RETRIEVAL, NOISE),
}
_MAX_RANKS = {
    # The last BRANCHES + 1 traced ranks get no nodes of their own. They are spares for predictions that a retrieved
    # branch or a RETRIEVAL_OR_JACOBI child of the root already holds.
    JACOBI: draft_traces.RANKS - BRANCHES - 1,
    RETRIEVAL: BRANCHES,
    RETRIEVAL_OR_JACOBI: 1,
    NOISE: 1,
}
_MIN_MATCHES = (1, 2, 3, 5)  # values of `TokenTree.min_match` to try
_INITIAL_ACCEPT_LENGTH = 2  # tokens per forward pass in the initial traces
_NUM_TRAJECTORIES = 4  # replays per completion in `refine_traces`, starting at offsets 0, 1, ...
_BEAM = 3  # trees kept per number of nodes
_NUM_REPLAYED = 6  # extensions of a tree that are replayed, the most promising ones
_TAIL_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)  # noise tails to try for a gated adapter
_NUM_REPLAYED_TAILS = 2  # and extensions by a NOISE node at a leaf (a noise tail, see `search`)


@dataclasses.dataclass(frozen=True)
class Replay:
    """The n simulated forward passes of one tree over all completions."""

    completion: np.ndarray  # int [n], index of the completion
    start: np.ndarray  # int [n], number of its tokens emitted before this pass
    shifts: np.ndarray  # int [n, P], see `_shift_table`
    matches: np.ndarray  # bool [n, W], nodes whose whole path matches
    last_accepted: np.ndarray  # int [n], the deepest of them
    num_emitted: np.ndarray  # int [n], accepted drafts and the bonus token

    @property
    def mean_accepted_tokens(self) -> float:
        """Tokens per forward pass, the bonus token included: the metric of Spec-Bench (arXiv 2401.07851)."""
        return float(self.num_emitted.mean())

    def acceptance(self, tree: TokenTree) -> np.ndarray:
        """float [W]: the share of forward passes that accept each node."""
        return tree.mask[0][self.last_accepted].mean(axis=0)


# --- traces ---------------------------------------------------------------------------------------------------------


def collect_traces(
    model: Model, completions: Sequence[Completion], decoder: str, progress: Progress = iter
) -> DraftTraces:
    """The initial traces, recorded with a chain of the decoder's first source and a constant accept length.

    Those of a gated adapter are final.
    """
    traces = draft_traces.retrieval_traces(completions, min(draft_traces.RANKS, model.cfg.vocab_size))
    source = NODE_SOURCES[decoder][0]
    if source == RETRIEVAL:
        return traces
    if model.adapter is not None:
        return draft_traces.trace_tails(model, completions, traces, decoder, progress)
    chain = trees.chain(source, DEPTH, drafters.DEFAULT_TREES[decoder].min_match)
    trajectories = draft_traces.uniform_trajectories(traces, _INITIAL_ACCEPT_LENGTH)
    return draft_traces.trace(model, completions, traces, chain, trajectories, progress)


def refine_traces(
    model: Model, completions: Sequence[Completion], traces: DraftTraces, tree: TokenTree, progress: Progress = iter
) -> DraftTraces:
    """`traces` with the predictions of `tree` at every position where its forward passes start.

    A trajectory (`draft_traces.Trajectory`) has these positions for one replay of one completion.
    """
    if not tree.num_ranks(JACOBI) or model.adapter is not None:
        return traces
    trajectories = []
    for offset in range(min(_NUM_TRAJECTORIES, int(traces.lengths.min()))):
        replayed = replay(tree, traces, offset)
        trajectories += [(index, replayed.start[replayed.completion == index]) for index in range(len(completions))]
    return draft_traces.trace(model, completions, traces, tree, trajectories, progress)


# --- replay ---------------------------------------------------------------------------------------------------------


def replay(tree: TokenTree, traces: DraftTraces, offset: int = 0) -> Replay:
    """Replays `tree` on all completions, starting `offset` tokens into each of them."""
    if tree.max_depth > DEPTH:
        raise ValueError(f"a tree of depth {tree.max_depth}: the traces end at depth {DEPTH}")
    table, depth_index, future_tokens = (
        _shift_table(tree, traces.are_of_tails),
        np.maximum(tree.depth - 1, 0),
        traces.future_tokens,
    )
    descendants = tree.mask[0].T.astype(np.float32)  # [ancestor, node]
    position, last = np.full(len(traces.lengths), offset), np.full(len(traces.lengths), tree.width)
    passes = []
    while len(active := np.flatnonzero(position < traces.lengths)):
        start, shifts = position[active], table[last[active]]
        mismatches = node_tokens(tree, traces, active, start, shifts) != future_tokens[active, start][:, depth_index]
        mismatches[:, 0] = False
        matches = mismatches.astype(np.float32) @ descendants == 0
        last[active] = np.argmax(np.where(matches, tree.depth, -1), axis=1)
        num_emitted = np.minimum(tree.depth[last[active]] + 1, traces.lengths[active] - start)
        passes.append((active, start, shifts, matches, last[active], num_emitted))
        position[active] += num_emitted
    return Replay(*map(np.concatenate, zip(*passes, strict=True)))


def _shift_table(tree: TokenTree, only_tails: bool = False) -> np.ndarray:
    """int [W + 1, P]: for each prediction, how many tokens at the end of the accepted path its context lacks.

    Entry [w, d] is for the prediction at depth d + 1 if w was the last accepted node: 0 if w is an ancestor of the node
    that predicts, e > 0 if that node branches off the accepted path e nodes above w, and -1 if there is no prediction.
    The last row, [W], is for the first forward pass of a replay. It is 0, not -1, because a replay may start inside a
    completion; at the start of a completion, the traces hold no predictions anyway.

    With `only_tails`, the traces know only what noise tails behind accepted nodes predict: then the entry of any
    other prediction is DEPTH.
    """
    shifts = np.zeros((tree.width + 1, tree.max_depth), int)
    before_tail = np.arange(tree.width)  # for nodes of a noise tail, the node that the tail is behind
    for node, source in enumerate(tree.sources):
        if source == NOISE:
            before_tail[node] = before_tail[tree.parents[node]]
    for last, predictors in enumerate(tree.continuations):
        common = tree.mask[0, last] & tree.mask[0, predictors]  # [P, W], ancestors of both
        above = tree.depth[last] - np.where(common, tree.depth, 0).max(axis=1, initial=0)
        is_unknown = only_tails & ~tree.mask[0, last][before_tail[predictors]]
        shifts[last] = np.where(predictors >= 0, np.where(is_unknown, DEPTH, above), -1)
    return shifts


def node_tokens(
    tree: TokenTree, traces: DraftTraces, completion: np.ndarray, start: np.ndarray, shifts: np.ndarray
) -> np.ndarray:
    """int32 [n, W]: the tokens that `drafters.fill_tree` puts into the tree in n forward passes.

    `NO_DRAFT` for noise and at the root.

    Args:
      tree: the tree.
      traces: the traces.
      completion: int [n], index of the completion.
      start: int [n], position in it.
      shifts: int [n, P], see `_shift_table`.
    """
    sources, ranks = np.array(tree.sources), np.array(tree.ranks)
    tokens = _drafts(sources, ranks, tree.depth, tree.min_match, traces, completion, start, shifts)
    if tree.deduplication:
        leaves, branches, fixed_ranks, order = tree.deduplication
        branch = ranks[branches]
        long_enough = traces.match_lengths[completion, start][:, branch] >= tree.min_match
        first = np.where(long_enough, traces.retrieved[completion, start][:, branch, 0], NO_DRAFT)
        candidates = _predictions(traces, completion, start, shifts[:, :1], np.zeros(1, int))[:, 0]
        candidates = candidates[:, : tree.num_predictions]
        is_fixed = np.isin(np.arange(candidates.shape[1]), fixed_ranks)
        is_free = ~np.any(candidates[:, :, None] == first[:, None, :], axis=-1) & ~is_fixed
        free_rank = np.cumsum(is_free, axis=1) - 1
        chosen = np.argmax(is_free[:, None, :] & (free_rank[:, None, :] == order[None, :, None]), axis=-1)
        tokens[:, leaves] = np.take_along_axis(candidates, chosen, axis=1)
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
    """The drafts of nodes given by source, rank and depth, int [W] each, before duplicates are replaced."""
    depth_index, tokens = np.maximum(depth - 1, 0), np.full((len(completion), len(sources)), NO_DRAFT)
    retrieval_or_jacobi = sources == RETRIEVAL_OR_JACOBI
    predicts, retrieves = (sources == JACOBI) | retrieval_or_jacobi, (sources == RETRIEVAL) | retrieval_or_jacobi
    if predicts.any():
        rank = np.where(predicts, ranks, 0)
        predicted = _predictions(traces, completion, start, shifts[:, depth_index], depth_index, rank)
        tokens = np.where(predicts, predicted, tokens)
    if retrieves.any():
        branch = np.where(retrieves, ranks, 0)
        retrieved = traces.retrieved[completion[:, None], start[:, None], branch, depth_index]
        long_enough = traces.match_lengths[completion[:, None], start[:, None], branch] >= min_match
        is_fallback = retrieval_or_jacobi & (tokens == NO_DRAFT)
        tokens = np.where(retrieves & (retrieved != NO_DRAFT) & (long_enough | is_fallback), retrieved, tokens)
    return tokens


def _predictions(
    traces: DraftTraces,
    completion: np.ndarray,
    start: np.ndarray,
    shifts: np.ndarray,
    depth_index: np.ndarray,
    rank: np.ndarray | None = None,
) -> np.ndarray:
    """Jacobi predictions in n forward passes at m depths: int32 [n, m], or [n, m, K] for all ranks.

    Args:
      traces: the traces.
      completion: int [n], index of the completion.
      start: int [n], position in it.
      shifts: int [n, m], how many of the last accepted tokens the predictions' context lacks.
      depth_index: int [m], depths minus 1.
      rank: int [m], the rank at each depth, or None for all K ranks.
    """
    position, traced_depth_index = start[:, None] - shifts, depth_index + shifts
    is_traced = (shifts >= 0) & (position >= 0) & (traced_depth_index < DEPTH)
    index = (completion[:, None], np.where(is_traced, position, 0), np.where(is_traced, traced_depth_index, 0))
    tokens = traces.jacobi[index] if rank is None else traces.jacobi[*index, rank]
    if rank is None:
        is_traced, shifts = is_traced[..., None], shifts[..., None]
    return np.where(is_traced, tokens, np.where(shifts < 0, NO_DRAFT, UNKNOWN))


# --- search ---------------------------------------------------------------------------------------------------------


def search(
    traces: DraftTraces, decoder: str, max_width: int, progress: Progress = iter, allow_noise: bool = True
) -> dict[int, TokenTree]:
    """For every width (number of nodes) the tree with the most tokens per forward pass, found by beam search.

    Every tree of the beam is extended by every possible node of the decoder's sources. Only the most promising
    extensions are replayed: those that would add an accepted token to the most passes. That number only estimates the
    gain, because a new node also changes where later passes start and which drafts they find. Two other kinds of trees
    are replayed, too: the best tree with other values of `min_match`, and trees with one more NOISE node at a leaf.
    Chains of such nodes (noise tails) are not meant to be accepted. They only predict drafts for the next pass, so the
    estimate does not show what they gain.

    Args:
      traces: the traces. If they are of a gated adapter's tails, trees have noise tails, as described above, and no
        other noise.
      decoder: a key of `NODE_SOURCES`.
      max_width: nodes of the largest trees.
      progress: wraps the widths in a progress bar.
      allow_noise: whether trees may have NOISE nodes.
    """
    root, tail = trees.build([]), drafters.TAIL_LENGTH if traces.are_of_tails else 0
    sources = [source for source in NODE_SOURCES[decoder] if (allow_noise and not tail) or source != NOISE]
    beam, best = _replay_and_sort([root], traces, tail), {1: root}
    kept: dict[int, tuple[TokenTree, Replay]] = {}  # trees with tails, by width
    for width in progress(range(2, max_width + 1)):
        extended = {}
        for tree, replayed in beam:
            for larger in _extensions(tree, replayed, traces, sources, tail):
                extended.setdefault((frozenset(_node_paths(larger)), larger.min_match), larger)
        if not extended:
            break
        beam = _replay_and_sort(list(extended.values()), traces, tail)
        if beam[0][0].num_ranks(RETRIEVAL):
            variants = [dataclasses.replace(beam[0][0], min_match=match) for match in _MIN_MATCHES]
            beam = sorted(beam + _replay_and_sort(variants, traces, tail)[:1], key=_sort_key)
        beam, best[width] = beam[:_BEAM], beam[0][0]
        for tree in _with_fewer_tails(*beam[0], tail, max_width) if tail else ():
            candidate = (tree, replay(tree, traces))
            kept[tree.width] = min(kept.get(tree.width, candidate), candidate, key=_sort_key)
    return best if not tail else {1: root} | {width: kept[width][0] for width in sorted(kept)}


def _with_fewer_tails(tree: TokenTree, replayed: Replay, length: int, max_width: int) -> list[TokenTree]:
    """The tree with tails behind the m nodes where most passes of `replayed` end, for some m, up to `max_width`."""
    ends = np.bincount(replayed.last_accepted, minlength=tree.width)[: tree.width]
    order = np.argsort(-ends, kind="stable")
    counts = [count for count in _TAIL_COUNTS if count <= tree.width and tree.width + length * count <= max_width]
    return [trees.add_tails(tree, length, sorted(order[:count].tolist())) for count in counts]


def _replay_and_sort(candidates: Sequence[TokenTree], traces: DraftTraces, tail: int) -> list[tuple[TokenTree, Replay]]:
    """The candidates by their mean accepted tokens, replayed with noise tails of length `tail` behind all nodes."""
    return sorted(((tree, replay(trees.add_tails(tree, tail), traces)) for tree in candidates), key=_sort_key)


def _sort_key(replayed: tuple[TokenTree, Replay]) -> float:
    return -replayed[1].mean_accepted_tokens


def _extensions(
    tree: TokenTree, replayed: Replay, traces: DraftTraces, sources: Sequence[int], tail: int
) -> list[TokenTree]:
    """The most promising trees with one more node. `replayed` has tails of length `tail` behind all nodes."""
    options = _options(tree, sources, traces.jacobi.shape[-1], DEPTH - tail)
    if not options:
        return []
    parents, node_sources, ranks = map(np.array, zip(*options, strict=True))
    depth = tree.depth[parents] + 1
    # One more column, filled with 0, for a node one level deeper than the tree: its prediction is assumed to have the
    # full context.
    shifts = np.pad(replayed.shifts, ((0, 0), (0, 1)))
    completion, start = replayed.completion, replayed.start
    drafts = _drafts(node_sources, ranks, depth, tree.min_match, traces, completion, start, shifts)
    matches = drafts == traces.future_tokens[completion, start][:, depth - 1]
    is_deepest = tree.depth == tree.depth[replayed.last_accepted][:, None]
    # [n, W], nodes where a matching child would add an accepted token
    ends = replayed.matches[:, : tree.width] & is_deepest
    gains = np.sum(matches & ends[:, parents], axis=0)
    chosen = list(np.argsort(-gains, kind="stable")[:_NUM_REPLAYED])
    is_leaf = ~np.isin(np.arange(tree.width), tree.parents)
    tail_gains = np.where((node_sources == NOISE) & is_leaf[parents], np.sum(ends, axis=0)[parents], 0)
    best_tails = np.argsort(-tail_gains, kind="stable")[:_NUM_REPLAYED_TAILS]
    chosen += [option for option in best_tails if tail_gains[option]]
    nodes = list(zip(tree.parents, tree.sources, tree.ranks, strict=True))[1:]
    return [trees.build([*nodes, options[option]], tree.min_match) for option in chosen]


def _options(
    tree: TokenTree, sources: Sequence[int], num_traced_ranks: int, max_depth: int
) -> list[tuple[int, int, int]]:
    """(parent, source, rank) of every possible next node: per parent and source, the lowest unused rank."""
    used = set(zip(tree.parents, tree.sources, tree.ranks, strict=True))
    options = []
    for parent in np.flatnonzero(tree.depth < max_depth).tolist():
        for source in (NOISE,) if tree.sources[parent] == NOISE else sources:
            num_ranks = min(_MAX_RANKS[source], num_traced_ranks)
            unused = [(parent, source, rank) for rank in range(num_ranks) if (parent, source, rank) not in used]
            options += unused[:1]
    return options


def _node_paths(tree: TokenTree) -> list[tuple]:
    """Every node as its path of (source, rank) pairs, which identifies it whatever the order of the nodes."""
    paths: list[tuple] = [()]
    for node in range(1, tree.width):
        paths.append((*paths[tree.parents[node]], (tree.sources[node], tree.ranks[node])))
    return paths


# --- published trees --------------------------------------------------------------------------------------------------


def make_some_noise_tree() -> TokenTree:
    """The tree in the released code of Make Some Noise (arXiv 2406.17404): 63 Jacobi nodes and 5 retrieved tokens.

    The Jacobi nodes, 10, 28, 23 and 2 at depths 1 to 4, are `mc_sim_7b_63` of Medusa (github.com/FasterDecoding/Medusa,
    `medusa/model/medusa_choices.py`), a list of index paths. Sibling ranks have no gaps there, so the number of
    children per path describes it.
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
