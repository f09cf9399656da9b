"""Token trees: topology, and tree.json."""

import json

import numpy as np
import pytest
import tiny

from msn_jax.cli import InputError
from msn_jax.decode import tree as trees
from msn_jax.decode.tree import JACOBI, NOISE, RETRIEVAL, RETRIEVAL_OR_JACOBI


def example() -> trees.TokenTree:
    # 0 - 1 - 2 - 3; also children of 0: leaf 4, and the branch 5 - 6
    return trees.tr_jacobi_tree(jacobi=[(0, 0, 0), (1,)], retrieval=[2])


def test_topology_of_the_example():
    tree = example()
    assert tree.parents == (-1, 0, 1, 2, 0, 0, 5)
    assert tree.sources == (0, JACOBI, JACOBI, JACOBI, JACOBI, RETRIEVAL, RETRIEVAL)
    assert tree.ranks == (0, 0, 0, 0, 1, 0, 0)
    assert tree.depth.tolist() == [0, 1, 2, 3, 1, 1, 2]
    assert (tree.width, tree.max_depth, tree.num_ranks(JACOBI), tree.num_ranks(RETRIEVAL)) == (7, 3, 2, 1)
    assert tree.paths.tolist() == [
        [0, 0, 0, 0],
        [0, 1, 1, 1],
        [0, 1, 2, 2],
        [0, 1, 2, 3],
        [0, 4, 4, 4],
        [0, 5, 5, 5],
        [0, 5, 6, 6],
    ]


def test_mask_holds_exactly_the_ancestors():
    tree = example()
    for node in range(tree.width):
        ancestors, at = {node}, node
        while at > 0:
            at = tree.parents[at]
            ancestors.add(at)
        assert set(np.flatnonzero(tree.mask[0, node])) == ancestors


def test_continuations_follow_first_children_then_the_spine():
    # After the root, the next draft is predicted at 1, 2, 3; after node 1, at 2, 3. Node 4 has no children, so its
    # draft comes from the spine one node deeper; node 5 continues with its own branch, then with the spine.
    assert example().continuations.tolist() == [
        [1, 2, 3],
        [2, 3, -1],
        [3, -1, -1],
        [-1, -1, -1],
        [2, 3, -1],
        [6, 3, -1],
        [3, -1, -1],
    ]


def test_continuation_depths_are_consecutive():
    rng = np.random.default_rng(0)
    for _ in range(50):
        nodes = [
            (int(rng.integers(0, node)), JACOBI, int(rng.integers(0, 3))) for node in range(1, rng.integers(2, 20))
        ]
        tree = trees.build(nodes)
        for node, chain in enumerate(tree.continuations):
            used = chain[chain >= 0]
            assert (chain[: len(used)] >= 0).all()
            assert tree.depth[used].tolist() == [tree.depth[node] + 1 + d for d in range(len(used))]


def test_the_noise_tail_extends_the_spine():
    tree = trees.tr_jacobi_tree(jacobi=[(0, 0)], retrieval=[1], noise=2)
    assert tree.sources == (0, JACOBI, JACOBI, NOISE, NOISE, RETRIEVAL)
    assert tree.parents == (-1, 0, 1, 2, 3, 0)
    assert tree.continuations[2].tolist() == [3, 4, -1, -1]


def test_noise_tails_extend_any_node():
    tree = tiny.with_noise_tails(example(), [3, 4], 2)
    assert tree.parents == (*example().parents, 3, 7, 4, 9)
    assert tree.sources[7:] == (NOISE,) * 4
    assert tree.continuations[3].tolist() == [7, 8, -1, -1, -1]
    assert tree.continuations[4].tolist()[:2] == [9, 10]  # an accepted leaf continues with its own tail
    assert tiny.with_noise_tails(trees.chain(RETRIEVAL_OR_JACOBI, 2, min_match=3), [2], 1).min_match == 3


def test_predictions_are_added_to_replace_retrieved_duplicates():
    assert example().num_predictions == 3  # two ranks, and a third in case the branch begins with one of them
    assert trees.chain(JACOBI, 3).num_predictions == 1
    assert trees.tr_jacobi_tree([(0, 0)], [2]).num_predictions == 1  # no leaf to replace


def test_a_tree_of_the_root_only():
    tree = trees.build([])
    assert (tree.width, tree.max_depth) == (1, 0)
    assert tree.paths.tolist() == [[0]]
    assert tree.continuations.shape == (1, 0)


def test_equal_trees_hash_equal():
    assert example() == example()
    assert hash(example()) == hash(example())
    assert example() != trees.chain(JACOBI, 6)


@pytest.mark.parametrize("tree", [example(), trees.build([]), trees.chain(RETRIEVAL_OR_JACOBI, 3, min_match=2)])
def test_a_saved_tree_loads_again(tmp_path, tree):
    trees.save(tree, tmp_path / "tree.json", [{"share": 0.5}] * (tree.width - 1), {"decoder": "tr_jacobi"})
    assert trees.load(tmp_path / "tree.json") == tree
    assert trees.find(tmp_path, "tr_jacobi") == tree
    assert trees.find(tmp_path, "jacobi") is None
    assert trees.find(tmp_path / "elsewhere", "tr_jacobi") is None


@pytest.mark.parametrize("min_match", [0, -1, 17, 10**30, 1.0, True, "2", None])
def test_an_invalid_min_match_is_refused(tmp_path, min_match):
    path = tmp_path / "tree.json"
    path.write_text(json.dumps({"min_match": min_match, "nodes": []}))
    with pytest.raises(InputError, match=r"min_match=.* must be an integer from 1 to 16") as error:
        trees.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a tree file"),
        ("[]", "not a tree file"),
        (json.dumps({"nodes": [{"parent": 0, "source": "oracle", "rank": 0}]}), "not a tree file"),
        (json.dumps({"nodes": [{"parent": 1, "source": "jacobi", "rank": 0}]}), "node 1"),
        (json.dumps({"nodes": [{"parent": -1, "source": "jacobi", "rank": 0}]}), "node 1"),
        (json.dumps({"nodes": [{"parent": 0, "source": "jacobi", "rank": -1}]}), "node 1"),
        (json.dumps({"nodes": [{"parent": 0, "source": "root", "rank": 0}]}), "node 1"),
        (json.dumps({"nodes": [{"parent": "0", "source": "jacobi", "rank": 0}]}), "node 1"),
        (json.dumps({"nodes": [{"parent": 0.5, "source": "jacobi", "rank": 0}]}), "parent 0.5"),
        (json.dumps({"nodes": [{"parent": False, "source": "jacobi", "rank": 0}]}), "parent False"),
        (json.dumps({"nodes": [{"parent": 0, "source": "jacobi", "rank": 1.5}]}), "rank 1.5"),
        (json.dumps({"nodes": [{"parent": 0, "source": "jacobi", "rank": 10**30}]}), "rank 1000"),
        (json.dumps({"nodes": [{"parent": 0, "source": "retrieval", "rank": 64}]}), "rank 64"),
        (json.dumps({"nodes": [{"parent": 0, "source": "noise", "rank": 1}]}), "rank 1"),
        (json.dumps({"nodes": {}}), "not a list"),
        ("[" * 100_000, "not a tree file"),
        ('{"nodes": ' + "9" * 6000 + "}", "not a tree file"),
    ],
)
def test_an_invalid_file_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "tree.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as error:
        trees.load(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        trees.load(tmp_path / "no.json")
