"""Token trees: the static shape of a draft. NumPy only, built once, hashable, so that a tree is part of a program.

Node 0 is the root: the newest token of the text, already certain, not yet in the cache. Every other node is a guess
for the token after its parent. One forward pass runs all W nodes at once, each seeing the committed text and its own
ancestors, and verification walks down the path of right guesses.

    0 ── 1 ── 2 ── 3        parents  (-1, 0, 1, 2, 0, 4)
    └─── 4 ── 5             depth    ( 0, 1, 2, 3, 1, 2)

A node's `source` says where its guess comes from, and `rank` which of that source's guesses it takes:

    JACOBI     rank r: the r-th best token of draft row depth - 1 (what the last pass, or the draft model, predicted)
    RETRIEVAL  rank r: the r-th best continuation of the text's own suffix (`retrieval.py`)
    EITHER     RETRIEVAL where enough of the suffix matches, else JACOBI, else RETRIEVAL at all; of the same rank
    NOISE      fresh ahead noise: never right on purpose, but the logits behind it are the next draft (a "tail")

Enough is `min_match` tokens; where fewer match, a RETRIEVAL node holds noise.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from msn_jax import masks
from msn_jax.cli import InputError

FILE_NAME = "tree.json"  # in a model's directory: the tree that `calibrate` found for it

ROOT, JACOBI, RETRIEVAL, NOISE, EITHER = range(5)
LONGEST_MATCH = 16  # tokens of the text's suffix that retrieval compares
SOURCES = ("root", "jacobi", "retrieval", "noise", "retrieval_or_jacobi")
# How many ranks there can be; a model's vocabulary ends sooner.
_RANKS = {JACOBI: 1 << 20, RETRIEVAL: 64, NOISE: 1, EITHER: 64}


@dataclasses.dataclass(frozen=True)
class TokenTree:
    """A static tree of W nodes, parents before children."""

    parents: tuple[int, ...]  # -1 for the root
    sources: tuple[int, ...]
    ranks: tuple[int, ...]
    min_match: int = 1  # tokens of the text's suffix that must match for what is retrieved to count

    def __post_init__(self):
        if type(self.min_match) is not int or not 1 <= self.min_match <= LONGEST_MATCH:
            wanted = f"must be an integer from 1 to {LONGEST_MATCH}"
            raise InputError(f"min_match={self.min_match!r} of the token tree: {wanted}")
        if not len(self.parents) == len(self.sources) == len(self.ranks) >= 1:
            raise InputError("a token tree needs as many sources and ranks as parents")
        if self.parents[0] != -1 or self.sources[0] != ROOT:
            raise InputError("node 0 of a token tree is its root: parent -1, source 'root'")
        for node, (parent, source, rank) in enumerate(zip(self.parents, self.sources, self.ranks, strict=True)):
            if not all(type(value) is int for value in (parent, source, rank)):  # 0.5 and true are numbers in JSON
                raise InputError(f"node {node} of the token tree: parent {parent!r} or rank {rank!r} is not an integer")
            if node == 0:
                continue
            if not 0 <= parent < node:
                raise InputError(f"node {node} of the token tree: parent {parent} is not an earlier node")
            if source not in _RANKS:
                raise InputError(f"node {node} of the token tree: its source is none of {', '.join(SOURCES[1:])}")
            if not 0 <= rank < _RANKS[source]:
                raise InputError(
                    f"node {node} of the token tree: rank {rank} of {SOURCES[source]} is not in 0..{_RANKS[source] - 1}"
                )

    @property
    def width(self) -> int:
        """W: nodes with the root, the tokens of one forward pass."""
        return len(self.parents)

    @property
    def max_depth(self) -> int:
        """P: the longest path below the root, so a pass emits at most P + 1 tokens."""
        return int(self.depth.max())

    @functools.cached_property
    def depth(self) -> np.ndarray:
        """int32 [W]: steps below the root."""
        depth = np.zeros(self.width, np.int32)
        for node in range(1, self.width):
            depth[node] = depth[self.parents[node]] + 1
        return depth

    @functools.cached_property
    def mask(self) -> np.ndarray:
        """bool [1, W, W]: who sees whom in the forward pass."""
        return masks.tree(self.parents)

    @functools.cached_property
    def paths(self) -> np.ndarray:
        """int32 [W, P + 1]: the nodes from the root to each node; entries beyond its depth repeat the node itself.

        The repetitions only fill the array: verification counts, it never compares them.
        """
        paths = np.zeros((self.width, self.max_depth + 1), np.int32)
        for node in range(self.width):
            ancestors = np.flatnonzero(self.mask[0, node])  # parents come first, so this is root to node
            paths[node] = node
            paths[node, : len(ancestors)] = ancestors
        return paths

    @functools.cached_property
    def continuations(self) -> np.ndarray:
        """int32 [W, P]: where the drafts of the next pass come from if node w is the last one accepted.

        Entry [w, d] is the node whose logits predict draft row d, or -1 if the tree has none. The token after w is
        emitted as the bonus, so row d lies behind a node of depth(w) + 1 + d. Those nodes hold wrong tokens, which is
        what MSN trains for. They are taken from below w, along first children, and where that ends from the chain of
        first children below the root: the same places in the text, behind one more wrong token.
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
        chain = []
        while node in self.parents:
            node = self.parents.index(node)
            chain.append(node)
        return chain

    def count(self, source: int) -> int:
        """How many ranks of `source` the tree uses (the K of a top-K, the number of retrieved branches), those of
        EITHER included where it may become `source`.
        """
        kinds = (source, EITHER) if source in (JACOBI, RETRIEVAL) else (source,)
        return max((rank + 1 for rank, kind in zip(self.ranks, self.sources, strict=True) if kind in kinds), default=0)

    @property
    def predictions(self) -> int:
        """K: predictions per draft row that the tree may use, with those that move up for a retrieved duplicate."""
        spare = len(self.leaves_beside_retrieval[1]) if self.leaves_beside_retrieval else 0
        return self.count(JACOBI) + spare

    @functools.cached_property
    def inner_predictions(self) -> list[int]:
        """JACOBI nodes below the root that are no leaves, or children of the root of both kinds (EITHER)."""
        children = [node for node in range(self.width) if self.parents[node] == 0]
        kinds = {JACOBI: lambda node: node in self.parents, EITHER: lambda node: True}
        return [node for node in children if kinds.get(self.sources[node], lambda node: False)(node)]

    @functools.cached_property
    def leaves_beside_retrieval(self) -> tuple[np.ndarray, np.ndarray] | None:
        """JACOBI leaves right below the root, and RETRIEVAL nodes there, if the tree has both."""
        children = np.array([node for node in range(1, self.width) if self.parents[node] == 0], np.int32)
        sources = np.array(self.sources)[children] if children.size else children
        leaves = children[(sources == JACOBI) & ~np.isin(children, self.parents)]
        retrieved = children[sources == RETRIEVAL]
        return (leaves, retrieved) if leaves.size and retrieved.size else None


def build(nodes: list[tuple[int, int, int]], min_match: int = 1) -> TokenTree:
    """A tree from (parent, source, rank) triples of the nodes below the root, which is node 0."""
    parents, sources, ranks = zip((-1, ROOT, 0), *nodes, strict=True)
    return TokenTree(parents, sources, ranks, min_match)


def chain(source: int, length: int, min_match: int = 1) -> TokenTree:
    """A tree without branches: the root and `length` guesses of one source."""
    return build([(node, source, 0) for node in range(length)], min_match)


def with_tails(tree: TokenTree, nodes: Sequence[int], length: int) -> TokenTree:
    """The same tree with `length` NOISE nodes behind each of `nodes`.

    Whichever of them is accepted, the choices behind its tail are fresh drafts for the next pass: an accepted leaf
    does not leave the drafter empty-handed (BiTA, arXiv 2401.12522).
    """
    parents, sources, ranks = (list(values) for values in (tree.parents, tree.sources, tree.ranks))
    for node in nodes:
        for _ in range(length):
            parents.append(node)
            sources.append(NOISE)
            ranks.append(0)
            node = len(parents) - 1
    return TokenTree(tuple(parents), tuple(sources), tuple(ranks), tree.min_match)


def branches(jacobi: list[tuple[int, ...]], retrieval: list[int], noise: int = 0) -> TokenTree:
    """The tree of TR-Jacobi decoding (paper section 3.3).

    Args:
      jacobi: paths of ranks: (0,) is the best first guess, (0, 1) the second best behind it. Prefixes are implied.
        The first path is the spine.
      retrieval: length of each retrieved branch, best match first.
      noise: noise nodes at the end of the spine.
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


def save(
    tree: TokenTree, path: str | pathlib.Path, notes: Sequence[dict] | None = None, about: dict | None = None
) -> None:
    """Writes the tree as JSON, one node a line below the root.

    Args:
      tree: the tree.
      path: the file, replaced.
      notes: more keys for the line of each node below the root.
      about: more keys of the file. `load` passes over both.
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
    """JSON, the items of a list one a line."""
    if not isinstance(value, list) or not value:
        return json.dumps(value)
    return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n]"


def load(path: str | pathlib.Path) -> TokenTree:
    """Reads what `save` wrote. InputError names the file and the node that is wrong."""
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
            f"{path}: not a tree file ({error}): it holds "
            '{"nodes": [{"parent": 0, "source": "jacobi", "rank": 0}, ...]}'
        ) from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def find(model_dir: str | pathlib.Path, decoder: str) -> TokenTree | None:
    """The tree that `calibrate` left in a model's directory for `decoder`: FILE_NAME there.

    None if there is none, or one for another decoder. InputError if the file is broken or does not name its decoder.
    """
    path = pathlib.Path(model_dir) / FILE_NAME
    if not path.is_file():
        return None
    tree = load(path)
    made_for = json.loads(path.read_text(encoding="utf-8-sig")).get("decoder")
    if not isinstance(made_for, str):
        raise InputError(f'{path}: found "decoder": {json.dumps(made_for)}: name the decoder that the tree is for')
    return tree if made_for == decoder else None
