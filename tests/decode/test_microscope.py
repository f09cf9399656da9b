"""A trace describes the passes that the decoding loop really runs."""

import itertools

import pytest
import tiny
from matplotlib.figure import Figure

from msn_jax.cli import InputError
from msn_jax.decode import engine, microscope
from msn_jax.decode import tree as trees
from msn_jax.decode.tree import JACOBI, NOISE, RETRIEVAL, RETRIEVAL_OR_JACOBI, ROOT

pytestmark = pytest.mark.usefixtures("quick_compilation")
PROMPT = "the cat sat on the mat, and a dog sat on the"
TREE = trees.add_tails(
    trees.build([(0, JACOBI, 0), (0, JACOBI, 1), (0, RETRIEVAL, 0), (3, RETRIEVAL, 0), (1, RETRIEVAL_OR_JACOBI, 0)], 2),
    2,
    behind=[0, 1],
)


@pytest.fixture(scope="module")
def model():
    return tiny.endless(tiny.model(seed=3))


@pytest.fixture(scope="module")
def traced(model):
    [generation] = engine.generate(model, [PROMPT], "tr_jacobi", 40, tree=TREE)
    return generation, microscope.trace(model, PROMPT, "tr_jacobi", TREE, max_new_tokens=40)


def test_the_passes_emit_what_generate_does(traced):
    generation, passes = traced
    assert [len(one.emitted) for one in passes] == generation.accept_lengths
    assert [token for one in passes for token in one.emitted] == generation.tokens
    assert max(generation.accept_lengths) > 1


def test_accepted_nodes_hold_what_the_model_predicts_after_their_parents(traced):
    for one in traced[1]:
        assert one.accepted[0] == 0
        for parent, node in itertools.pairwise(one.accepted):
            assert one.tree.parents[node] == parent and one.tokens[node] == one.predictions[parent]
        bonus = [one.predictions[node] for node in one.accepted]
        assert one.emitted == bonus[: len(one.emitted)]
        last = one.accepted[-1]
        children = [node for node in range(one.tree.width) if one.tree.parents[node] == last]
        assert all(one.tokens[node] != one.predictions[last] for node in children)


def test_next_drafts_are_predictions_of_the_pass_and_drafts_of_the_next_one(traced):
    passes = traced[1]
    for one, following in itertools.pairwise(passes):
        for draft, node in zip(one.next_drafts, one.next_nodes, strict=True):
            assert draft == (None if node is None else one.predictions[node])
        assert following.tokens[0] == one.emitted[-1]
        for node, source in enumerate(following.sources):
            if source == JACOBI and following.tree.ranks[node] == 0 and following.tree.sources[node] != JACOBI:
                assert following.tokens[node] == one.next_drafts[following.tree.depth[node] - 1]


def test_sources_are_those_of_the_tokens(traced):
    passes = traced[1]
    seen = set()
    for number, one in enumerate(passes):
        assert (one.sources[0], one.named_sources()[0]) == (ROOT, "root")
        seen |= set(one.sources)
        for planned, source in zip(one.tree.sources, one.sources, strict=True):
            allowed = {
                ROOT: {ROOT},
                NOISE: {NOISE},
                JACOBI: {JACOBI, NOISE},
                RETRIEVAL: {RETRIEVAL, NOISE},
                RETRIEVAL_OR_JACOBI: {RETRIEVAL, JACOBI, NOISE},
            }[planned]
            assert source in allowed
            if planned == RETRIEVAL:
                assert (source == RETRIEVAL) == (one.match_length >= one.tree.min_match)
            if planned == JACOBI and number == 0:
                assert source == NOISE  # nothing has been predicted yet
    assert {ROOT, JACOBI, RETRIEVAL} <= seen


def test_acceptance_counts_every_draft_once(traced):
    passes = traced[1]
    counts = microscope.acceptance(passes)
    assert sum(total for _, total in counts.values()) == len(passes) * (TREE.width - 1)
    assert sum(accepted for accepted, _ in counts.values()) == sum(len(one.accepted) - 1 for one in passes)
    by_depth = sum(total for (_, depth), (_, total) in counts.items() if depth == 2)
    assert by_depth == len(passes) * int((TREE.depth == 2).sum())


def test_decoders_without_a_fixed_tree_are_refused(model):
    with pytest.raises(InputError, match=r"'auto': cannot be traced.*choose one of autoregressive, jacobi"):
        microscope.trace(model, PROMPT, "auto")


def test_the_drawing_has_every_node_and_its_prediction(traced):
    one = traced[1][1]
    axis = Figure().add_subplot()
    microscope.draw(axis, one, str)
    texts = [text.get_text() for text in axis.texts]
    assert texts[::2] == [repr(str(token)) for token in one.tokens]
    assert texts[1::2] == [f"→ {str(token)!r}" for token in one.predictions]
