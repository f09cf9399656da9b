"""The drafts themselves. Output does not depend on them, so no other test would fail if they were wrong."""

import functools
import types

import chi_square
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import run_loop
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
    """Tokens of the tree nodes for one row and its draft table, in forward pass number `passes`."""
    arrays = np.asarray(rows, np.int32), np.asarray(tokens, np.int32), np.int32(length), np.int32(passes - 1)
    return _propose(drafter, *(array[None] for array in arrays))[0].tolist()


@functools.partial(jax.jit, static_argnums=0)
def _propose(drafter: Drafter, rows, tokens, lengths, passes):
    state = types.SimpleNamespace(draft=DraftTable(rows), tokens=tokens, lengths=lengths, forward_passes=passes)
    proposal, draft = drafter.propose(drafter, None, state)
    assert draft is state.draft
    return proposal.tokens


def logits_for(best: list[int]) -> jnp.ndarray:
    """[1, W, V]: the top 3 tokens at node w are best[w], best[w] + 1 and best[w] + 2."""
    best = jnp.array(best, jnp.int32)
    return sum(weight * nn.one_hot((best + 3 - weight) % V, V) for weight in (3, 2, 1))[None]


def verified_at(node: int) -> Verified:
    return Verified(
        path=jnp.asarray(TREE.paths)[None, node],
        last_accepted=jnp.array([node], jnp.int32),
        emitted=jnp.zeros((1, 4), jnp.int32),
        num_emitted=jnp.array([int(TREE.depth[node]) + 1], jnp.int32),
    )


def test_the_first_forward_pass_drafts_from_the_prompt():
    tokens, length = [7, 1, 2, 9, 1, 2, 0, 0], 6
    prompt = PromptBatch(np.array([tokens], np.int32), np.array([length], np.int32), 8)
    table = drafters.init_table(DRAFTER, None, prompt)
    assert table.predictions.tolist() == [[[-1] * 3] * 3]
    nodes = proposed(DRAFTER, table.predictions[0], tokens, length)
    assert nodes[0] == 2  # the newest token
    assert nodes[5:] == [9, 1]  # retrieved: the continuation of the earlier `1 2`
    assert set(nodes[1:5]) <= set(tokens[:length])  # noise


@pytest.mark.parametrize(
    ("last", "rows"),
    [
        (0, [2, 3, 4]),  # no draft accepted: the predictions at nodes 1, 2 and 3
        (1, [3, 4, None]),
        (3, [None] * 3),  # a leaf has no continuation, and stale rows are dropped
        (4, [3, 4, None]),  # a leaf off the spine: continues with the spine, one deeper
        (5, [7, 4, None]),  # its own branch, then the spine
    ],
)
def test_the_next_draft_continues_the_last_accepted_node(last, rows):
    stale = DraftTable(jnp.full((1, 3, 3), 9, jnp.int32))
    top = drafters.top_k_tokens(logits_for([1, 2, 3, 4, 5, 6, 7]), DRAFTER.tree.num_predictions)
    table = drafters.update_table(DRAFTER, stale, verified_at(last), top)
    assert table.predictions.tolist() == [[[-1] * 3 if best is None else [best, best + 1, best + 2] for best in rows]]


def test_every_node_is_filled_from_its_source():
    rows = [[1, 2, 9], [3, 4, 9], [5, 0, 9]]
    assert proposed(DRAFTER, rows, [8, 6, 7, 8, 0, 0], 4) == [8, 1, 3, 5, 2, 6, 7]  # after 8 came 6, 7


@pytest.mark.parametrize(
    ("tokens", "rows", "nodes"),
    [
        ([1, 2, 8, 6, 7, 1, 2, 8], [[5, 9], [3, 4]], [8, 6, 7, 9, 4]),  # `2 8` occurred before: its continuation
        ([3, 4, 8, 6, 7, 1, 2, 8], [[5, 9], [3, 4]], [8, 5, 3, 9, 4]),  # only `8` occurred: the draft table
        ([3, 4, 8, 6, 7, 1, 2, 8], [[5, 9], [-1, -1]], [8, 5, 7, 9, None]),  # the table as far as it is filled
    ],
)
def test_retrieval_or_jacobi_uses_retrieval_for_matches_of_min_match_tokens(tokens, rows, nodes):
    chain = tree.build(
        [(0, RETRIEVAL_OR_JACOBI, 0), (1, RETRIEVAL_OR_JACOBI, 0), (0, JACOBI, 1), (3, JACOBI, 1)], min_match=2
    )
    actual = proposed(drafters.self_drafter("either", chain), rows, [*tokens, 0, 0], len(tokens))
    assert [node if expected is not None else None for node, expected in zip(actual, nodes, strict=True)] == nodes
    assert (chain.num_ranks(JACOBI), chain.num_ranks(RETRIEVAL), chain.num_ranks(RETRIEVAL_OR_JACOBI)) == (2, 1, 1)


def test_matches_below_min_match_are_not_used():
    tokens = [*range(20, 50), 3, 8, 6, 7, 1, 8]  # only the `8` occurred before

    def drafts(min_match: int) -> list[list[int]]:
        chain = drafters.self_drafter("chain", tree.chain(RETRIEVAL, 2, min_match))
        return [proposed(chain, np.zeros((2, 0)), [*tokens, 0], len(tokens), passes)[1:] for passes in range(1, 9)]

    assert drafts(1) == [[6, 7]] * 8
    assert len(set(map(tuple, drafts(2)))) > 4  # noise


def test_jacobi_leaves_do_not_duplicate_their_siblings():
    """Neither retrieved siblings, nor each other, nor predictions with children (which may equal a retrieved one)."""
    rng, moved = np.random.default_rng(0), 0
    retrieve = jax.jit(retrieval.retrieve_batch, static_argnums=(2, 3))
    for _ in range(12):
        ranks, branches = rng.permutation(5)[: rng.integers(1, 5)].tolist(), int(rng.integers(1, 4))
        inner = int(rng.integers(0, len(ranks)))  # number of predictions that have a child
        nodes = [(0, JACOBI, rank) for rank in ranks] + [(0, RETRIEVAL, branch) for branch in range(branches)]
        nodes += [(child, JACOBI, 0) for child in range(1, inner + 1)]
        drafter = drafters.self_drafter("leaves", tree.build(nodes))
        best = rng.permutation(V)[: drafter.tree.num_predictions]
        tokens = rng.integers(0, V, 60).tolist()
        [branch_tokens], _ = retrieve(np.array([tokens], np.int32), np.array([60], np.int32), branches, 2)
        drafts = proposed(drafter, np.tile(best, (2, 1)), [*tokens, 0, 0], 60)[1 : 1 + len(ranks) + branches]
        fixed = [int(best[rank]) for rank in ranks[:inner]]
        retrieved = [int(token) for token in branch_tokens[:, 0] if token >= 0]
        leaves = drafts[inner : len(ranks)]
        assert drafts[:inner] == fixed
        assert len(set(leaves)) == len(leaves) and not set(leaves) & {*fixed, *retrieved}
        assert set(leaves) <= set(best.tolist())
        at_their_ranks = [int(best[rank]) for rank in ranks[inner:]]
        moved += leaves != at_their_ranks
        assert leaves == at_their_ranks or set(retrieved) & set(best.tolist())
    assert moved > 2


def test_nodes_without_a_prediction_hold_noise_drawn_from_the_sequence_in_every_pass():
    tokens = [*range(20, 60), *[0] * 8]  # every token is unique, so nothing can be retrieved
    drawn = [proposed(DRAFTER, np.full((3, 3), -1), tokens, 40, passes) for passes in range(50)]
    assert all(nodes[0] == 59 for nodes in drawn)
    noise = np.array([nodes[1:] for nodes in drawn])
    assert noise.min() >= 20 and noise.max() < 60
    assert len(set(noise.ravel().tolist())) > 30
    assert all((noise[i] != noise[i + 1]).any() for i in range(49))


def test_noise_is_uniform_over_the_sequence():
    tokens = jnp.arange(16, dtype=jnp.int32)[None, :]
    drawn = [drafters.ahead_noise(jnp.array([n]), tokens, jnp.array([10]), 40)[0].tolist() for n in range(50)]
    counts = np.bincount(np.ravel(drawn), minlength=16)
    assert counts[10:].sum() == 0
    assert chi_square.statistic(counts[:10], np.full(10, 0.1)) < 27.9  # 9 degrees of freedom, p = 0.001


def test_noise_of_a_row_does_not_depend_on_other_rows():
    tokens = jnp.arange(32, dtype=jnp.int32).reshape(2, 16)
    both = drafters.ahead_noise(jnp.array([3, 5]), tokens, jnp.array([16, 9]), 6)
    alone = drafters.ahead_noise(jnp.array([5]), tokens[1:], jnp.array([9]), 6)
    assert both[1].tolist() == alone[0].tolist()


def test_a_noise_tail_continues_an_accepted_leaf():
    tails = tree.tr_jacobi_tree(jacobi=[(0, 0)], retrieval=[], noise=2)
    assert [tails.sources[node] for node in tails.continuations[2][:2]] == [NOISE, NOISE]


def test_whole_chains_are_accepted_when_every_draft_matches():
    """The model repeats one token, so retrieval always predicts it."""
    cfg, params = tiny.config(), tiny.params(tiny.config(), 0)
    constant = {**params, "embed": jnp.zeros_like(params["embed"])}  # all logits are equal, so every token is 0
    drafter = drafters.get("prompt_lookup")
    tokens = np.zeros((1, 64), np.int32)
    state = loop.prefill(constant, cfg, drafter, tokens, np.array([4]), np.array([28]), tiny.sampler(1), 16)
    state = loop.decode(constant, cfg, drafter, jnp.array([-1]), state, jnp.int32(99))
    assert state.accept_lengths[0, : state.forward_passes[0]].tolist() == [4] * 6


def test_a_tree_may_need_more_predictions_than_the_vocabulary_has_tokens():
    assert drafters.top_k_tokens(jnp.array([[3.0, 9.0, 5.0]]), 5).tolist() == [[1, 2, 0, -1, -1]]
    wide = tree.tr_jacobi_tree([(rank,) for rank in range(5)], [2, 2])
    cfg = tiny.config(vocab_size=6, n_layers=1)
    assert wide.num_predictions > cfg.vocab_size >= wide.num_ranks(JACOBI)
    params, prompts = tiny.params(cfg, 0), tiny.prompts(np.random.default_rng(0), 3, 6)
    expected = run_loop.sequences(run_loop.run(cfg, params, drafters.get("autoregressive"), prompts, [12] * 3))
    for drafter, drafter_params in (
        (drafters.self_drafter("wide", wide), None),
        (draft_model.drafter(wide, cfg), params),
    ):
        state = run_loop.run(cfg, params, drafter, prompts, [12] * 3, drafter_params=drafter_params)
        assert run_loop.sequences(state) == expected


def test_an_unknown_decoder_is_refused():
    with pytest.raises(InputError, match="unknown decoder 'oracle': known decoders are auto, autoregressive, jacobi"):
        drafters.get("oracle")
