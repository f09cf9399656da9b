"""What the drafters draft. No text depends on it, so nothing else would notice if it were wrong."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_loop
import tiny
from jax import nn

from msn_jax.cli import InputError
from msn_jax.decode import draft_model, drafters, loop, retrieval, tree
from msn_jax.decode.drafters import Drafter, DraftTable
from msn_jax.decode.prefill import PromptBatch
from msn_jax.decode.tree import JACOBI, NOISE, RETRIEVAL, RETRIEVAL_OR_JACOBI
from msn_jax.decode.verify import Verified

pytestmark = pytest.mark.usefixtures("quick_compilation")

V = 11
TREE = tree.tr_jacobi_tree(jacobi=[(0, 0, 0), (1,)], retrieval=[2])  # 0-1-2-3, 4, 5-6
DRAFTER = drafters.self_drafter("tr_jacobi", TREE)


def proposed(drafter: Drafter, rows, tokens, length: int, passes: int = 1) -> list[int]:
    """What the nodes hold for one text with this table; the pass is number `passes`."""
    arrays = np.asarray(rows, np.int32), np.asarray(tokens, np.int32), np.int32(length), np.int32(passes - 1)
    return _propose(drafter, *(array[None] for array in arrays))[0].tolist()


@functools.partial(jax.jit, static_argnums=0)
def _propose(drafter: Drafter, rows, tokens, lengths, passes):
    state = types.SimpleNamespace(draft=DraftTable(rows), tokens=tokens, lengths=lengths, forward_passes=passes)
    nodes, draft = drafter.propose(drafter, None, state)
    assert draft is state.draft
    return nodes


def logits_for(best: list[int]) -> jnp.ndarray:
    """[1, W, V]: node w prefers token best[w], then the one after it, then the one after that."""
    best = jnp.array(best, jnp.int32)
    return sum(weight * nn.one_hot((best + 3 - weight) % V, V) for weight in (3, 2, 1))[None]


def verified_at(node: int) -> Verified:
    return Verified(
        path=jnp.asarray(TREE.paths)[None, node],
        last_accepted=jnp.array([node], jnp.int32),
        emitted=jnp.zeros((1, 4), jnp.int32),
        num_emitted=jnp.array([int(TREE.depth[node]) + 1], jnp.int32),
    )


def test_the_first_pass_drafts_from_the_prompt():
    text, length = [7, 1, 2, 9, 1, 2, 0, 0], 6
    prompt = PromptBatch(np.array([text], np.int32), np.array([length], np.int32), 8)
    table = drafters.init_table(DRAFTER, None, prompt)
    assert table.rows.tolist() == [[[-1] * 3] * 3]
    nodes = proposed(DRAFTER, table.rows[0], text, length)
    assert nodes[0] == 2  # the newest token
    assert nodes[5:] == [9, 1]  # retrieved: what followed `1 2` before
    assert set(nodes[1:5]) <= set(text[:length])  # noise


@pytest.mark.parametrize(
    ("last", "rows"),
    [
        (0, [2, 3, 4]),  # nothing was right: the logits behind 1, 2 and 3
        (1, [3, 4, None]),
        (3, [None] * 3),  # a leaf: nothing lies behind it, and nothing old is kept
        (4, [3, 4, None]),  # a leaf beside the spine: the spine goes on one deeper
        (5, [7, 4, None]),  # its own branch, then the spine
    ],
)
def test_the_next_draft_lies_behind_the_last_right_node(last, rows):
    stale = DraftTable(jnp.full((1, 3, 3), 9, jnp.int32))
    table = drafters.update_table(DRAFTER, stale, verified_at(last), logits_for([1, 2, 3, 4, 5, 6, 7]))
    assert table.rows.tolist() == [[[-1] * 3 if best is None else [best, best + 1, best + 2] for best in rows]]


def test_every_node_gets_what_its_source_has():
    rows = [[1, 2, 9], [3, 4, 9], [5, 0, 9]]
    assert proposed(DRAFTER, rows, [8, 6, 7, 8, 0, 0], 4) == [8, 1, 3, 5, 2, 6, 7]  # after 8 came 6, 7


@pytest.mark.parametrize(
    ("text", "rows", "nodes"),
    [
        ([1, 2, 8, 6, 7, 1, 2, 8], [[5, 9], [3, 4]], [8, 6, 7, 9, 4]),  # `2 8` was there before: what followed it
        ([3, 4, 8, 6, 7, 1, 2, 8], [[5, 9], [3, 4]], [8, 5, 3, 9, 4]),  # only `8` was: the table
        ([3, 4, 8, 6, 7, 1, 2, 8], [[5, 9], [-1, -1]], [8, 5, 7, 9, None]),  # as far as it reaches
    ],
)
def test_either_takes_retrieval_where_enough_matches(text, rows, nodes):
    chain = tree.build(
        [(0, RETRIEVAL_OR_JACOBI, 0), (1, RETRIEVAL_OR_JACOBI, 0), (0, JACOBI, 1), (3, JACOBI, 1)], min_match=2
    )
    found = proposed(drafters.self_drafter("either", chain), rows, [*text, 0, 0], len(text))
    assert [node if expected is not None else None for node, expected in zip(found, nodes, strict=True)] == nodes
    assert (chain.num_ranks(JACOBI), chain.num_ranks(RETRIEVAL), chain.num_ranks(RETRIEVAL_OR_JACOBI)) == (2, 1, 1)


def test_a_short_match_is_no_match():
    text = [*range(20, 50), 3, 8, 6, 7, 1, 8]  # only the `8` was there before

    def found(min_match: int) -> list[list[int]]:
        chain = drafters.self_drafter("chain", tree.chain(RETRIEVAL, 2, min_match))
        return [proposed(chain, np.zeros((2, 0)), [*text, 0], len(text), passes)[1:] for passes in range(1, 9)]

    assert found(1) == [[6, 7]] * 8
    assert len(set(map(tuple, found(2)))) > 4  # noise


def test_leaves_do_not_repeat_what_is_retrieved_beside_them():
    """Nor each other, nor a prediction that has children; of those it may be that one says what is retrieved."""
    rng, moved = np.random.default_rng(0), 0
    retrieve = jax.jit(retrieval.retrieve_batch, static_argnums=(2, 3))
    for _ in range(12):
        ranks, branches = rng.permutation(5)[: rng.integers(1, 5)].tolist(), int(rng.integers(1, 4))
        inner = int(rng.integers(0, len(ranks)))  # so many of the predictions have a child
        nodes = [(0, JACOBI, rank) for rank in ranks] + [(0, RETRIEVAL, branch) for branch in range(branches)]
        nodes += [(child, JACOBI, 0) for child in range(1, inner + 1)]
        drafter = drafters.self_drafter("leaves", tree.build(nodes))
        best = rng.permutation(V)[: drafter.tree.num_predictions]
        text = rng.integers(0, V, 60).tolist()
        [found], _ = retrieve(np.array([text], np.int32), np.array([60], np.int32), branches, 2)
        held = proposed(drafter, np.tile(best, (2, 1)), [*text, 0, 0], 60)[1 : 1 + len(ranks) + branches]
        fixed = [int(best[rank]) for rank in ranks[:inner]]
        retrieved = [int(token) for token in found[:, 0] if token >= 0]
        leaves = held[inner : len(ranks)]
        assert held[:inner] == fixed
        assert len(set(leaves)) == len(leaves) and not set(leaves) & {*fixed, *retrieved}
        assert set(leaves) <= set(best.tolist())
        at_their_ranks = [int(best[rank]) for rank in ranks[inner:]]
        moved += leaves != at_their_ranks
        assert leaves == at_their_ranks or set(retrieved) & set(best.tolist())
    assert moved > 2


def test_without_a_prediction_a_node_holds_fresh_noise_from_the_text():
    tokens = [*range(20, 60), *[0] * 8]  # no token twice: nothing to retrieve
    drawn = [proposed(DRAFTER, np.full((3, 3), -1), tokens, 40, passes) for passes in range(50)]
    assert all(nodes[0] == 59 for nodes in drawn)
    guesses = np.array([nodes[1:] for nodes in drawn])
    assert guesses.min() >= 20 and guesses.max() < 60
    assert len(set(guesses.ravel().tolist())) > 30
    assert all((guesses[i] != guesses[i + 1]).any() for i in range(49))


def test_noise_is_spread_evenly_over_the_text():
    tokens = jnp.arange(16, dtype=jnp.int32)[None, :]
    drawn = [drafters.ahead_noise(jnp.array([n]), tokens, jnp.array([10]), 40)[0].tolist() for n in range(50)]
    counts = np.bincount(np.ravel(drawn), minlength=16)
    assert counts[10:].sum() == 0
    assert ((counts[:10] - 200) ** 2 / 200).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001


def test_noise_of_a_row_does_not_depend_on_its_neighbours():
    tokens = jnp.arange(32, dtype=jnp.int32).reshape(2, 16)
    both = drafters.ahead_noise(jnp.array([3, 5]), tokens, jnp.array([16, 9]), 6)
    alone = drafters.ahead_noise(jnp.array([5]), tokens[1:], jnp.array([9]), 6)
    assert both[1].tolist() == alone[0].tolist()


def test_a_noise_tail_gives_an_accepted_leaf_its_next_draft():
    tails = tree.tr_jacobi_tree(jacobi=[(0, 0)], retrieval=[], noise=2)
    assert [tails.sources[node] for node in tails.continuations[2][:2]] == [NOISE, NOISE]


def test_a_perfect_drafter_emits_whole_chains():
    """A model whose text repeats with a period of one accepts everything that retrieval offers."""
    cfg, params = tiny.config(), tiny.params(tiny.config(), 0)
    constant = {**params, "embed": jnp.zeros_like(params["embed"])}  # all logits equal: the text is all zeros
    drafter = drafters.get("prompt_lookup")
    tokens = np.zeros((1, 64), np.int32)
    state = loop.prefill(constant, cfg, drafter, tokens, np.array([4]), np.array([28]), tiny.sampler(1), 16)
    state = loop.decode(constant, cfg, drafter, jnp.array([-1]), state, jnp.int32(99))
    assert state.accept_lengths[0, : state.forward_passes[0]].tolist() == [4] * 6


def test_a_tree_may_ask_for_more_predictions_than_there_are_tokens():
    assert drafters.top_k_tokens(jnp.array([[3.0, 9.0, 5.0]]), 5).tolist() == [[1, 2, 0, -1, -1]]
    wide = tree.tr_jacobi_tree([(rank,) for rank in range(5)], [2, 2])
    cfg = tiny.config(vocab_size=6)
    assert wide.num_predictions > cfg.vocab_size >= wide.num_ranks(JACOBI)
    params, prompts = tiny.params(cfg, 0), tiny.prompts(np.random.default_rng(0), 3, 6)
    expected = test_loop.texts(test_loop.run(cfg, params, drafters.get("autoregressive"), prompts, [12] * 3))
    for drafter, weights in ((drafters.self_drafter("wide", wide), None), (draft_model.drafter(wide, cfg), params)):
        assert test_loop.texts(test_loop.run(cfg, params, drafter, prompts, [12] * 3, weights=weights)) == expected


def test_an_unknown_name_is_refused():
    with pytest.raises(InputError, match="unknown decoder 'oracle': known decoders are autoregressive, jacobi"):
        drafters.get("oracle")
