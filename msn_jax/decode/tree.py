"""Token trees: the static shape of a draft. NumPy only, built once and hashable: a tree is part of a compiled program.

Node 0 is the root: the newest token of the sequence, already verified, not yet in the cache. Every other node holds a
draft for the token after its parent. One forward pass runs all W nodes; each attends to the committed prefix and its
own ancestors. Verification accepts the longest path of matching drafts.

    0 ── 1 ── 2 ── 3        parents  (-1, 0, 1, 2, 0, 4)
    └─── 4 ── 5             depth    ( 0, 1, 2, 3, 1, 2)

A node's `source` says where its draft token comes from, and `rank` which of the source's candidates it takes:

    JACOBI     the r-th best prediction for its depth, counted from 0, of the last forward pass (or the draft model)
    RETRIEVAL  the r-th continuation of the sequence's current suffix (`retrieval.py`)
    RETRIEVAL_OR_JACOBI  RETRIEVAL if the match is long enough, else JACOBI, else RETRIEVAL whatever the match
    NOISE      fresh ahead noise: not meant to be accepted; the predictions after it are next drafts (a "noise tail")

A match is long enough if it has at least `min_match` tokens; a RETRIEVAL node with a shorter match holds noise.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from msn_jax import masks
from msn_jax.cli import InputError

FILE_NAME = "tree.json"  # written by `calibrate` into a model's directory

ROOT, JACOBI, RETRIEVAL, NOISE, RETRIEVAL_OR_JACOBI = range(5)
LONGEST_MATCH = 16  # tokens of the suffix that retrieval compares
SOURCES = ("root", "jacobi", "retrieval", "noise", "retrieval_or_jacobi")
# Allowed ranks per source; the vocabulary limits those of JACOBI further.
_MAX_RANKS = {JACOBI: 1 << 20, RETRIEVAL: 64, NOISE: 1, RETRIEVAL_OR_JACOBI: 64}


class Deduplication(NamedTuple):
    """Children of the root that could hold the same token, and how duplicates are avoided.

    A prediction at depth 1 is *free* if no retrieved branch begins with it and no other child of the root holds it.
    Each JACOBI leaf takes a free one instead of the prediction of its rank.
    """

    leaves: np.ndarray  # int [n], JACOBI leaves
    branches: np.ndarray  # int [m], RETRIEVAL nodes
    fixed_ranks: np.ndarray  # ranks of the predictions that inner JACOBI nodes and RETRIEVAL_OR_JACOBI nodes hold
    order: np.ndarray  # int [n]: leaf i takes free prediction number order[i], the most probable one being number 0


@dataclasses.dataclass(frozen=True)
class TokenTree:
    """A static tree of W nodes, parents before children."""

    parents: tuple[int, ...]  # -1 for the root
    sources: tuple[int, ...]
    ranks: tuple[int, ...]
    min_match: int = 1  # tokens of the suffix that a retrieved continuation must match

    def __post_init__(self):
        if type(self.min_match) is not int or not 1 <= self.min_match <= LONGEST_MATCH:
            expected = f"an integer from 1 to {LONGEST_MATCH}"
            raise InputError(f"min_match={self.min_match!r} of the token tree: must be {expected}")
        if not len(self.parents) == len(self.sources) == len(self.ranks) >= 1:
            raise InputError("a token tree needs equal numbers of parents, sources and ranks")
        if self.parents[0] != -1 or self.sources[0] != ROOT:
            raise InputError("node 0 of a token tree must be the root: parent -1, source 'root'")
        for node, (parent, source, rank) in enumerate(zip(self.parents, self.sources, self.ranks, strict=True)):
            if not all(type(value) is int for value in (parent, source, rank)):  # 0.5 and true are numbers in JSON
                raise InputError(f"node {node} of the token tree: parent {parent!r} or rank {rank!r} is not an integer")
            if node == 0:
                continue
            if not 0 <= parent < node:
                raise InputError(f"node {node} of the token tree: parent {parent} is not an earlier node")
            if source not in _MAX_RANKS:
                raise InputError(f"node {node} of the token tree: its source must be one of {', '.join(SOURCES[1:])}")
            if not 0 <= rank < _MAX_RANKS[source]:
                last = _MAX_RANKS[source] - 1
                raise InputError(f"node {node} of the token tree: rank {rank} of {SOURCES[source]} is not in 0..{last}")

    @property
    def width(self) -> int:
        """W: nodes including the root, the tokens of one forward pass."""
        return len(self.parents)

    @property
    def max_depth(self) -> int:
        """P: length of the longest path below the root; a forward pass emits at most P + 1 tokens."""
        return int(self.depth.max())

    def first(self, width: int) -> "TokenTree":
        """The tree of the first `width` nodes. Parents precede children, so it is one."""
        return TokenTree(self.parents[:width], self.sources[:width], self.ranks[:width], self.min_match)

    @functools.cached_property
    def depth(self) -> np.ndarray:
        """int32 [W]: steps below the root."""
        depth = np.zeros(self.width, np.int32)
        for node in range(1, self.width):
            depth[node] = depth[self.parents[node]] + 1
        return depth

    @functools.cached_property
    def draft_depth(self) -> np.ndarray:
        """int32 [W]: the depth of each node, 0 for noise, which is not meant to be accepted."""
        return np.where(np.array(self.sources) == NOISE, 0, self.depth)

    @functools.cached_property
    def tail_length(self) -> int:
        """Nodes of the longest noise tail, if one is behind the root and tails follow all other nodes; else 0."""
        first = self.width - self.sources.count(NOISE)
        length = np.zeros(self.width, int)
        for node in range(first, self.width):
            length[node] = length[self.parents[node]] + 1
        is_behind_root = NOISE in [
            source for source, parent in zip(self.sources, self.parents, strict=True) if not parent
        ]
        return int(length.max()) if is_behind_root and NOISE not in self.sources[:first] else 0

    @functools.cached_property
    def mask(self) -> np.ndarray:
        """bool [1, W, W]: the attention mask of the forward pass."""
        return masks.tree(self.parents)

    @functools.cached_property
    def paths(self) -> np.ndarray:
        """int32 [W, P + 1]: the path from the root to each node, padded with the node itself.

        The padding is never compared: verification accepts nodes, not path entries.
        """
        paths = np.zeros((self.width, self.max_depth + 1), np.int32)
        for node in range(self.width):
            ancestors = np.flatnonzero(self.mask[0, node])  # parents precede children, so this runs from root to node
            paths[node] = node
            paths[node, : len(ancestors)] = ancestors
        return paths

    @functools.cached_property
    def continuations(self) -> np.ndarray:
        """int32 [W, P]: the nodes that predict the next drafts if node w is the last accepted one.

        Entry [w, d] is the node whose logits predict draft row d, or -1 if there is none. The token after w is emitted
        as the bonus token, so row d is predicted by a node at depth(w) + 1 + d. These nodes hold wrong tokens: the
        inputs that MSN trains for. They are the first children below w, or its noise tail, if it has one; where that
        chain ends, the nodes at the same depth of the chain of first children below the root, which condition on wrong
        tokens from the fork on, in place of the accepted ones.
        """
        table = np.full((self.width, max(self.max_depth, 1)), -1, np.int32)
        spine = self._first_children(0)
        for node in range(self.width):
            below = self._first_children(node)
            fallback = spine[self.depth[node] + len(below) :]
            chain = (below + fallback)[: self.max_depth]
            table[node, : len(chain)] = chain
        return table[:, : self.max_depth]

    def _first_children(self, node: int) -> list[int]:
        """The chain of first children below `node`, a noise child before others."""
        chain = []
        while node in self.parents:
            children = [child for child, parent in enumerate(self.parents) if parent == node]
            node = next((child for child in children if self.sources[child] == NOISE), children[0])
            chain.append(node)
        return chain

    def num_ranks(self, source: int) -> int:
        """Ranks of `source` that the tree uses: the K of a top-K, or the number of retrieved branches.

        RETRIEVAL_OR_JACOBI counts for both of its sources.
        """
        kinds = (source, RETRIEVAL_OR_JACOBI) if source in (JACOBI, RETRIEVAL) else (source,)
        return max((rank + 1 for rank, kind in zip(self.ranks, self.sources, strict=True) if kind in kinds), default=0)

    @property
    def num_predictions(self) -> int:
        """K: predictions per position, including spares that replace duplicates of retrieved tokens."""
        dedup = self.deduplication
        if dedup is None:
            return self.num_ranks(JACOBI)
        deepest = int(dedup.order.max()) + 1 + len(dedup.fixed_ranks)
        return max(self.num_ranks(JACOBI), deepest) + len(dedup.branches)

    @functools.cached_property
    def deduplication(self) -> Deduplication | None:
        """How JACOBI leaves avoid duplicates among the root's children; None without such leaves or branches."""
        children = np.array([node for node in range(1, self.width) if self.parents[node] == 0], np.int32)
        sources, ranks = (np.array(values)[children] for values in (self.sources, self.ranks))
        is_leaf = ~np.isin(children, self.parents)
        is_moved = (sources == JACOBI) & is_leaf
        leaves, branches = children[is_moved], children[sources == RETRIEVAL]
        if not leaves.size or not branches.size:
            return None
        fixed_ranks = np.unique(ranks[((sources == JACOBI) & ~is_leaf) | (sources == RETRIEVAL_OR_JACOBI)])
        order, previous = np.zeros(len(leaves), np.int32), -1
        for index in np.argsort(ranks[is_moved], kind="stable"):
            below = np.count_nonzero(fixed_ranks < ranks[is_moved][index])
            order[index] = previous = max(ranks[is_moved][index] - below, previous + 1)
        return Deduplication(leaves, branches, fixed_ranks, order)


def build(nodes: list[tuple[int, int, int]], min_match: int = 1) -> TokenTree:
    """A tree from (parent, source, rank) triples of the nodes after the root, which is node 0."""
    parents, sources, ranks = zip((-1, ROOT, 0), *nodes, strict=True)
    return TokenTree(parents, sources, ranks, min_match)


def chain(source: int, length: int, min_match: int = 1) -> TokenTree:
    """A tree without branches: the root and `length` drafts of one source."""
    return build([(node, source, 0) for node in range(length)], min_match)


def add_tails(tree: TokenTree, length: int, behind: Sequence[int] | None = None) -> TokenTree:
    """The tree with a tail of `length` noise nodes behind the nodes `behind` (None: behind all), after all nodes."""
    nodes = list(zip(tree.parents, tree.sources, tree.ranks, strict=True))[1:]
    for node in range(tree.width) if behind is None else behind:
        for _ in range(length):
            nodes.append((node, NOISE, 0))
            node = len(nodes)
    return build(nodes, tree.min_match)


def tr_jacobi_tree(jacobi: list[tuple[int, ...]], retrieval: list[int], noise: int = 0) -> TokenTree:
    """The tree of TR-Jacobi decoding (paper section 3.3).

    Args:
      jacobi: paths of ranks: (0,) is the top-1 draft at depth 1, (0, 1) the second-best draft after it. Prefixes are
        implied. The noise tail follows the end of the first path.
      retrieval: length of each retrieved branch, best match first.
      noise: length of the noise tail.
    """
    index = {(): 0}
    nodes = []
    for path in jacobi:
        for end in range(1, len(path) + 1):
            if path[:end] not in index:
                nodes.append((index[path[: end - 1]], JACOBI, path[end - 1]))
                index[path[:end]] = len(nodes)
    tail = index[tuple(jacobi[0])] if jacobi else 0
    for _ in range(noise):
        nodes.append((tail, NOISE, 0))
        tail = len(nodes)
    for branch, length in enumerate(retrieval):
        tail = 0
        for _ in range(length):
            nodes.append((tail, RETRIEVAL, branch))
            tail = len(nodes)
    return build(nodes)


def columns(tree: TokenTree) -> np.ndarray:
    """float [W]: a column for each node in a drawing: leaves side by side, the others centred above their children."""
    x, leaves = np.zeros(tree.width), 0

    def layout(node: int) -> None:
        nonlocal leaves
        children = [child for child in range(tree.width) if tree.parents[child] == node]
        for child in children:
            layout(child)
        x[node] = np.mean(x[children]) if children else leaves
        leaves += not children

    layout(0)
    return x


def save(
    tree: TokenTree, path: str | pathlib.Path, notes: Sequence[dict] | None = None, about: dict | None = None
) -> None:
    """Writes the tree as JSON, one line per node after the root.

    Args:
      tree: the tree.
      path: the file, replaced.
      notes: additional keys for each node after the root.
      about: additional keys of the file. `load` ignores both.
    """
    triples = list(zip(tree.parents, tree.sources, tree.ranks, strict=True))[1:]
    nodes = [
        {"parent": parent, "source": SOURCES[source], "rank": rank, **note}
        for (parent, source, rank), note in zip(triples, notes or [{}] * len(triples), strict=True)
    ]
    content = {**(about or {}), "min_match": tree.min_match, "nodes": nodes}
    lines = [f"{json.dumps(key)}: {_by_lines(value)}" for key, value in content.items()]
    pathlib.Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _by_lines(value: object) -> str:
    """JSON with one list item per line."""
    if not isinstance(value, list) or not value:
        return json.dumps(value)
    return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n]"


def load(path: str | pathlib.Path) -> TokenTree:
    """Reads a tree that `save` wrote. InputError names the file and the invalid node."""
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8-sig"))
        nodes = content["nodes"]
        if not isinstance(nodes, list):
            raise TypeError("its nodes are not a list")
        triples = [(node["parent"], SOURCES.index(node["source"]), node["rank"]) for node in nodes]
        return build(triples, content.get("min_match", 1))
    except OSError as error:
        raise InputError(f"{path}: cannot read the tree: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path}: not a tree file ({error}); expected "
            '{"nodes": [{"parent": 0, "source": "jacobi", "rank": 0}, ...]}'
        ) from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def find(model_dir: str | pathlib.Path, decoder: str) -> TokenTree | None:
    """The tree that `calibrate` stored for `decoder` in a model's directory, as FILE_NAME.

    None if there is no file or it is for another decoder. InputError if it is invalid or does not name its decoder.
    """
    path = pathlib.Path(model_dir) / FILE_NAME
    if not path.is_file():
        return None
    tree = load(path)
    made_for = json.loads(path.read_text(encoding="utf-8-sig")).get("decoder")
    if not isinstance(made_for, str):
        raise InputError(
            f'{path}: has "decoder": {json.dumps(made_for)}; it must name the decoder that the tree is for'
        )
    return tree if made_for == decoder else None
