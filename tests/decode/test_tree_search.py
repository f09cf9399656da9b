"""Tree replay against the decoder, and the tree search against brute force."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from msn_jax.cli import InputError
from msn_jax.decode import draft_traces, drafters, tree_search
from msn_jax.decode import tree as trees
from msn_jax.decode.draft_traces import BRANCHES, DEPTH, NO_DRAFT, Completion, DraftTraces
from msn_jax.decode.models import Model
from msn_jax.decode.request import Request
from msn_jax.decode.session import DecodeSession
from msn_jax.decode.tree import JACOBI, NOISE, RETRIEVAL, RETRIEVAL_OR_JACOBI, TokenTree

pytestmark = pytest.mark.usefixtures("quick_compilation")


class NoStop:
    """The part of a tokenizer that decoding needs."""

    stop_ids = (-1,)


def tiny_model(vocab_size: int, seed: int) -> Model:
    cfg = tiny.config(vocab_size=vocab_size, n_layers=1)
    return Model(tiny.params(cfg, seed), cfg, NoStop())


def decode(model: Model, tree: TokenTree, prompts, max_new: int) -> list[tuple[list[int], list[int]]]:
    """New tokens and accept lengths of every prompt."""
    drafter = drafters.self_drafter("any", tree)
    decoding = DecodeSession(
        model, drafter, prompts, [Request("", max_new_tokens=max_new)] * len(prompts), len(prompts)
    )
    decoding.run()
    return decoding.output_tokens()


def reference_completions(model: Model, prompts, max_new: int) -> list[Completion]:
    decoded = decode(model, trees.build([]), prompts, max_new)
    return [Completion(prompt, completion) for prompt, (completion, _) in zip(prompts, decoded, strict=True)]


def random_tree(rng: np.random.Generator, width: int, sources) -> TokenTree:
    return trees.build(tiny.random_nodes(rng, width, sources), min_match=int(rng.integers(1, 4)))


def synthetic(seed: int, completions: int = 6, size: int = 40, vocabulary: int = 4) -> DraftTraces:
    """Random traces whose drafts match less often the deeper they are."""
    rng = np.random.default_rng(seed)
    completion = np.full((completions, size + DEPTH), -3, np.int32)
    completion[:, :size] = rng.integers(0, vocabulary, (completions, size))
    future = np.lib.stride_tricks.sliding_window_view(completion, DEPTH, axis=1)[:, :size]
    rows = np.argsort(rng.random((completions, size, DEPTH, vocabulary)), axis=-1).astype(np.int32)
    best = (rng.random((completions, size, DEPTH)) < 0.8 ** np.arange(1, DEPTH + 1)) & (future >= 0)
    where = np.argmax(rows == future[..., None], axis=-1)
    index, position, row = np.nonzero(best)
    rows[index, position, row, where[best]] = rows[index, position, row, 0]
    rows[index, position, row, 0] = future[best]
    retrieved = rng.integers(0, vocabulary, (completions, size, BRANCHES, DEPTH)).astype(np.int32)
    copies = rng.random((completions, size, BRANCHES)) < 0.3
    retrieved = np.where(copies[..., None], future[:, :, None, :], retrieved)
    match_lengths = np.where(copies, 4, rng.integers(0, 4, copies.shape)).astype(np.int32)
    retrieved[match_lengths == 0] = NO_DRAFT
    return DraftTraces(np.full(completions, size), completion, rows, retrieved, match_lengths)


def test_replayed_draft_tokens_equal_the_drafters():
    """Random trees over random completions and rows: all nodes other than noise hold the same token."""
    rng = np.random.default_rng(0)
    completions = [Completion(rng.integers(0, 6, 20).tolist(), rng.integers(0, 6, 30).tolist()) for _ in range(3)]
    traces = draft_traces.retrieval_traces(completions, 14)
    traces.jacobi[:] = np.argsort(rng.random((*traces.jacobi.shape[:3], 14)), axis=-1)
    traces.jacobi[rng.random(traces.jacobi.shape[:3]) < 0.2] = NO_DRAFT
    index, position = np.repeat(np.arange(3), 25), np.tile(np.arange(25), 3)
    tokens = jnp.asarray([prompt + completion for prompt, completion, _ in completions], jnp.int32)[index]
    lengths = jnp.asarray(20 + position, jnp.int32)
    compared = deduplicated = 0
    shapes = [
        random_tree(rng, width, [JACOBI, JACOBI, RETRIEVAL, RETRIEVAL_OR_JACOBI, NOISE]) for width in (3, 8, 14, 20)
    ]
    shapes += [tree_search.make_some_noise_tree(), trees.tr_jacobi_tree([(0, 0), (1,), (2,), (3,)], [2, 2, 1])]
    shapes += [  # leaves and other children of the root with the same or neighbouring ranks
        trees.build([(0, RETRIEVAL_OR_JACOBI, 0), (0, JACOBI, 0), (0, JACOBI, 1), (0, RETRIEVAL, 0)]),
        trees.build([(0, JACOBI, 0), (0, JACOBI, 1), (0, RETRIEVAL, 0), (2, JACOBI, 0)]),
    ]
    ahead_noise = jax.jit(drafters.ahead_noise, static_argnums=3)
    for tree in shapes:
        ours = tree_search.node_tokens(tree, traces, index, position, np.zeros((75, tree.max_depth), int))
        rows = jnp.asarray(traces.jacobi[index, position, : tree.max_depth, : tree.num_predictions])
        with jax.numpy_rank_promotion("allow"):
            theirs = jax.jit(drafters.fill_tree, static_argnums=0)(tree, rows, tokens, lengths, lengths).tokens
        filled = ours >= 0
        noise = np.asarray(ahead_noise(lengths, tokens, lengths, tree.width))
        np.testing.assert_array_equal(np.where(filled, ours, noise)[:, 1:], np.asarray(theirs)[:, 1:])
        compared += filled.sum()
        deduplicated += tree.deduplication is not None
    assert compared > 2000
    assert deduplicated >= 2


def test_retrieval_trees_are_replayed_exactly():
    """Every forward pass of every tree. The prompts contain all pairs of tokens, so no node falls back to noise."""
    model, rng = tiny_model(4, 0), np.random.default_rng(1)
    pairs = np.array(list(itertools.product(range(4), repeat=2)))
    prompts = [rng.permutation(pairs).ravel().tolist() for _ in range(6)]
    completions = reference_completions(model, prompts, 24)
    traces = draft_traces.retrieval_traces(completions, 4)
    shapes = [trees.chain(RETRIEVAL, 7), trees.tr_jacobi_tree([], [4, 3, 2]), random_tree(rng, 9, [RETRIEVAL])]
    accepted_drafts = 0
    for tree in shapes:
        tree = trees.TokenTree(tree.parents, tree.sources, tree.ranks, min_match=1)
        replayed = tree_search.replay(tree, traces)
        for index, (_, accept_lengths) in enumerate(decode(model, tree, prompts, 24)):
            assert replayed.num_emitted[replayed.completion == index].tolist() == accept_lengths
            accepted_drafts += sum(accept_lengths) - len(accept_lengths)
    assert accepted_drafts > 100


@pytest.mark.parametrize("tree", [trees.chain(JACOBI, 3), trees.chain(RETRIEVAL_OR_JACOBI, 4, 2)])
def test_chains_are_replayed_exactly_from_their_own_draft_tables(tree):
    """The replay of the draft tables of a chain's forward passes gives the same passes.

    Noise may match in the decoder but never in the replay; completions where it does are excluded, and counted.
    """
    model, rng = tiny_model(40, 2), np.random.default_rng(2)
    prompts = tiny.prompts(rng, 12, 40)
    completions = reference_completions(model, prompts, 30)
    traces = draft_traces.retrieval_traces(completions, 14)
    drafter = drafters.self_drafter("any", tree)
    decoding = DecodeSession(model, drafter, prompts, [Request("", max_new_tokens=30)] * 12, 12)
    propose = jax.jit(lambda state: drafter.propose(drafter, None, state)[0].tokens)
    noise_matched, begins = set(), np.array([len(prompt) for prompt in prompts])
    while True:
        starts, rows = np.asarray(decoding.state.lengths) - begins, np.asarray(decoding.state.draft.predictions)
        left = np.flatnonzero(~np.asarray(decoding.state.done))
        traces.jacobi[left, starts[left], : tree.max_depth, :1] = rows[left]
        tokens = propose(decoding.state)
        ours = tree_search.node_tokens(tree, traces, left, starts[left], np.zeros((len(left), tree.max_depth), int))
        correct = np.asarray(tokens)[left, 1:] == traces.future_tokens[left, starts[left], : tree.max_depth]
        noise_matched |= set(left[np.any((ours[:, 1:] == NO_DRAFT) & correct, axis=1)].tolist())
        if not decoding.run(1):
            break
    replayed = tree_search.replay(tree, traces)
    exact = [index for index in range(12) if index not in noise_matched]
    assert len(exact) >= 4
    for index in exact:
        assert replayed.num_emitted[replayed.completion == index].tolist() == decoding.output_tokens()[index][1]


def test_shift_table_of_a_branching_tree():
    tree = trees.tr_jacobi_tree([(0, 0, 0), (1,)], [2])  # 0 - 1 - 2 - 3; also children of 0: 4, and 5 - 6
    assert tree_search._shift_table(tree).tolist() == [
        [0, 0, 0],
        [0, 0, -1],
        [0, -1, -1],
        [-1, -1, -1],
        [1, 1, -1],  # the path left the spine at the root, one node above
        [0, 1, -1],
        [2, -1, -1],
        [0, 0, 0],
    ]


def test_traced_rows_are_predictions_after_a_rejected_token():
    """Row 0 of a one-token trajectory is the model's prediction after correct tokens followed by a wrong one."""
    model = tiny_model(30, 1)
    prompts = tiny.prompts(np.random.default_rng(3), 3, 30)
    completions = reference_completions(model, prompts, 20)
    traces = tree_search.collect_traces(model, completions, "jacobi")
    trajectories = draft_traces.uniform_trajectories(traces, 1)
    traces = draft_traces.trace(model, completions, traces, trees.chain(JACOBI, DEPTH), trajectories)
    for index, (prompt, completion, _) in enumerate(completions):
        for position in (2, 7, 15):
            correct = (prompt + completion)[: len(prompt) + position - 1]
            wrong = next(token for token in traces.jacobi[index, position - 1, 0] if token != completion[position - 1])
            [(predicted, _)] = decode(model, trees.build([]), [[*correct, int(wrong)]], 1)
            assert traces.jacobi[index, position, 0, 0] == predicted[0]
    assert (traces.jacobi[0, 1:8] >= 0).all()  # every row is predicted
    assert (traces.jacobi[:, 0] == NO_DRAFT).all()  # except in the first forward pass


def test_a_trajectory_does_not_depend_on_where_it_starts():
    model = tiny_model(30, 1)
    completions = reference_completions(model, tiny.prompts(np.random.default_rng(3), 3, 30), 20)
    traces = draft_traces.retrieval_traces(completions, 3)
    later = draft_traces.trace(model, completions, traces, trees.chain(JACOBI, 3), [(1, [3, 5, 9])])
    from_the_beginning = draft_traces.trace(model, completions, traces, trees.chain(JACOBI, 3), [(1, [0, 3, 5, 9])])
    np.testing.assert_array_equal(later.jacobi, from_the_beginning.jacobi)
    assert (later.jacobi[1, [3, 5, 9]] >= 0).all()


def test_the_replay_of_a_branching_tree_predicts_mean_accepted_tokens():
    """Statistical: mean accepted tokens of a branching tree over 24 completions, replayed and measured, to 15%."""
    model, rng = tiny_model(40, 3), np.random.default_rng(4)
    prompts = tiny.prompts(rng, 24, 40, longest=20)
    completions = reference_completions(model, prompts, 36)
    tree = trees.tr_jacobi_tree([(0, 0, 0), (1, 0)], [3], noise=1)
    traces = tree_search.refine_traces(
        model, completions, tree_search.collect_traces(model, completions, "tr_jacobi"), tree
    )
    passes = sum(len(accept_lengths) for _, accept_lengths in decode(model, tree, prompts, 36))
    measured = sum(len(completion) for _, completion, _ in completions) / passes
    assert measured > 1.15  # otherwise the comparison would prove nothing
    assert tree_search.replay(tree, traces).mean_accepted_tokens == pytest.approx(measured, rel=0.15)


def all_trees(width: int, kinds: list[tuple[int, int]], min_match: int):
    """Every tree without duplicate siblings."""
    if width == 1:
        yield trees.build([], min_match)
        return
    for smaller in all_trees(width - 1, kinds, min_match):
        nodes = list(zip(smaller.parents, smaller.sources, smaller.ranks, strict=True))[1:]
        for parent in range(smaller.width):
            for source, rank in kinds:
                if (parent, source, rank) not in nodes:
                    yield trees.build([*nodes, (parent, source, rank)], min_match)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("decoder", ["jacobi", "prompt_lookup"])
def test_greedy_growth_finds_the_optimum_of_small_trees(decoder, seed):
    traces = synthetic(seed)
    best = tree_search.search(traces, decoder, 4)
    kinds = {
        "jacobi": [(JACOBI, 0), (JACOBI, 1), (JACOBI, 2), (NOISE, 0)],
        "prompt_lookup": [(RETRIEVAL, 0), (RETRIEVAL, 1)],
    }
    for width in (2, 3, 4):
        optimum = max(
            tree_search.replay(tree, traces).mean_accepted_tokens
            for min_match in ((1, 2, 3, 5) if decoder == "prompt_lookup" else (1,))
            for tree in all_trees(width, kinds[decoder], min_match)
        )
        assert tree_search.replay(best[width], traces).mean_accepted_tokens == pytest.approx(optimum, rel=1e-9), width


def test_acceptance_of_nodes_adds_up_to_the_emitted_tokens():
    traces = synthetic(5)
    tree = tree_search.search(traces, "tr_jacobi", 12)[12]
    replayed = tree_search.replay(tree, traces)
    assert replayed.num_emitted.sum() == traces.lengths.sum()
    acceptance = replayed.acceptance(tree)
    assert acceptance[0] == 1
    assert (acceptance[1:] <= acceptance[list(tree.parents[1:])]).all()
    truncated = (tree.depth[replayed.last_accepted] + 1 - replayed.num_emitted).sum()  # at the ends of completions
    assert acceptance.sum() * len(replayed.num_emitted) == pytest.approx(replayed.num_emitted.sum() + truncated)


def test_the_search_adds_noise_tails_where_they_raise_acceptance(monkeypatch):
    """Drafts match at depth 1 only: every second forward pass has a draft; with a noise tail, every pass has."""
    monkeypatch.setattr(tree_search, "_NUM_REPLAYED", 1)  # tails are replayed in addition
    traces = synthetic(0)
    traces.jacobi[..., 0, 0] = np.maximum(traces.future_tokens[..., 0], 0)
    traces.jacobi[..., 1:, :] = 99
    best = tree_search.search(traces, "jacobi", 3)
    assert tree_search.replay(best[2], traces).mean_accepted_tokens == pytest.approx(3 / 2, rel=0.05)
    assert tree_search.replay(best[3], traces).mean_accepted_tokens == pytest.approx(2)
    assert best[3].max_depth == 2


def test_the_make_some_noise_tree_is_the_published_one():
    tree = tree_search.make_some_noise_tree()
    assert tree.width == 69
    predicted = np.array(tree.sources) == JACOBI
    assert np.bincount(tree.depth[predicted]).tolist() == [0, 10, 28, 23, 2]
    assert np.bincount(tree.depth[np.array(tree.sources) == RETRIEVAL]).tolist() == [0, 1, 1, 1, 1, 1]
    assert (tree.num_ranks(JACOBI), tree.num_ranks(RETRIEVAL)) == (10, 1)
    paths = {tuple(rank for _, rank in name) for name in tree_search._node_paths(tree) if name and name[0][0] == JACOBI}
    for path in [(0, 0, 0, 1), (0, 7, 0), (1, 0, 1), (9, 0), (1, 6), (0, 0, 9), (0, 2, 1)]:  # from the published list
        assert path in paths


def test_find_returns_the_tree_of_the_decoder(tmp_path):
    assert trees.find(tmp_path, "tr_jacobi") is None
    tree = trees.chain(RETRIEVAL_OR_JACOBI, 2, 3)
    trees.save(tree, tmp_path / "tree.json", about={"decoder": "tr_jacobi"})
    assert trees.find(tmp_path, "tr_jacobi") == tree
    assert trees.find(str(tmp_path), "jacobi") is None
    for content, message in [("{", "not a tree file"), ("[]", "not a tree file")]:
        (tmp_path / "tree.json").write_text(content)
        with pytest.raises(InputError, match=message) as error:
            trees.find(tmp_path, "tr_jacobi")
        assert "\n" not in str(error.value)


def test_a_file_with_notes_loads_again(tmp_path):
    tree, path = tree_search.make_some_noise_tree(), tmp_path / "tree.json"
    notes = [{"acceptance": node / 100} for node in range(1, 69)]
    trees.save(tree, path, notes, {"decoder": "tr_jacobi", "widths": {"1": 0.5}})
    assert trees.load(path) == tree
    content = json.loads(path.read_text())
    assert content["nodes"][67]["acceptance"] == 0.68
    assert content["widths"] == {"1": 0.5}
    assert sum('"parent"' in line for line in path.read_text().splitlines()) == 68  # one node per line
