"""Replayed trees against the decoder itself, the search against brute force."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from msn_jax.cli import InputError
from msn_jax.decode import drafters, records, tree_search
from msn_jax.decode import tree as trees
from msn_jax.decode.records import BRANCHES, DEPTH, NOTHING, Records
from msn_jax.decode.requests import Request
from msn_jax.decode.session import Decoding, Model
from msn_jax.decode.tree import EITHER, JACOBI, NOISE, RETRIEVAL, TokenTree

pytestmark = pytest.mark.usefixtures("quick_compilation")


class NoStop:
    """All that decoding needs of a tokenizer."""

    stop_ids = (-1,)


def tiny_model(vocab_size: int, seed: int) -> Model:
    cfg = tiny.config(vocab_size=vocab_size)
    return Model(tiny.params(cfg, seed), cfg, NoStop())


def decode(model: Model, tree: TokenTree, prompts, max_new: int) -> list[tuple[list[int], list[int]]]:
    """New tokens and accept lengths of every prompt."""
    drafter = drafters.self_drafter("any", tree)
    decoding = Decoding(model, drafter, prompts, [Request("", max_new_tokens=max_new)] * len(prompts), len(prompts))
    decoding.advance()
    return decoding.answers()


def known_texts(model: Model, prompts, max_new: int) -> list[records.Text]:
    answers = decode(model, trees.build([]), prompts, max_new)
    return [(prompt, answer) for prompt, (answer, _) in zip(prompts, answers, strict=True)]


def random_tree(rng: np.random.Generator, width: int, sources) -> TokenTree:
    nodes = []
    for node in range(1, width):
        source = int(rng.choice(sources))
        nodes.append((int(rng.integers(0, node)), source, 0 if source == NOISE else int(rng.integers(0, 3))))
    return trees.build(nodes, min_match=int(rng.integers(1, 4)))


def synthetic(seed: int, texts: int = 6, size: int = 40, vocabulary: int = 4) -> Records:
    """Guesses that are right now and then, the deeper the less often."""
    rng = np.random.default_rng(seed)
    answers = np.full((texts, size + DEPTH), -3, np.int32)
    answers[:, :size] = rng.integers(0, vocabulary, (texts, size))
    coming = np.lib.stride_tricks.sliding_window_view(answers, DEPTH, axis=1)[:, :size]
    rows = np.argsort(rng.random((texts, size, DEPTH, vocabulary)), axis=-1).astype(np.int32)
    best = (rng.random((texts, size, DEPTH)) < 0.8 ** np.arange(1, DEPTH + 1)) & (coming >= 0)
    where = np.argmax(rows == coming[..., None], axis=-1)
    text, place, row = np.nonzero(best)
    rows[text, place, row, where[best]] = rows[text, place, row, 0]
    rows[text, place, row, 0] = coming[best]
    found = rng.integers(0, vocabulary, (texts, size, BRANCHES, DEPTH)).astype(np.int32)
    copies = rng.random((texts, size, BRANCHES)) < 0.3
    found = np.where(copies[..., None], coming[:, :, None, :], found)
    agreement = np.where(copies, 4, rng.integers(0, 4, copies.shape)).astype(np.int32)
    found[agreement == 0] = NOTHING
    return Records(np.full(texts, size), answers, rows, found, agreement)


def test_replayed_guesses_are_the_drafters():
    """Random trees over random texts and rows: every node that is no noise holds the same token."""
    rng = np.random.default_rng(0)
    texts = [(rng.integers(0, 6, 20).tolist(), rng.integers(0, 6, 30).tolist()) for _ in range(3)]
    known = records.without_rows(texts, 14)
    known.rows[:] = np.argsort(rng.random((*known.rows.shape[:3], 14)), axis=-1)
    known.rows[rng.random(known.rows.shape[:3]) < 0.2] = NOTHING
    text, place = np.repeat(np.arange(3), 25), np.tile(np.arange(25), 3)
    tokens = jnp.asarray([prompt + answer for prompt, answer in texts], jnp.int32)[text]
    lengths = jnp.asarray(20 + place, jnp.int32)
    compared = deduplicated = 0
    shapes = [random_tree(rng, width, [JACOBI, JACOBI, RETRIEVAL, EITHER, NOISE]) for width in (3, 8, 14, 20)]
    shapes += [tree_search.authors_tree(), trees.branches([(0, 0), (1,), (2,), (3,)], [2, 2, 1])]
    for tree in shapes:
        ours = tree_search.node_tokens(tree, known, text, place, np.zeros((75, tree.max_depth), int))
        rows = jnp.asarray(known.rows[text, place, : tree.max_depth, : tree.predictions])
        with jax.numpy_rank_promotion("allow"):
            theirs = jax.jit(drafters.fill_tree, static_argnums=0)(tree, rows, tokens, lengths, lengths)
        filled = ours >= 0
        noise = np.asarray(drafters.ahead_noise(lengths, tokens, lengths, tree.width))
        np.testing.assert_array_equal(np.where(filled, ours, noise)[:, 1:], np.asarray(theirs)[:, 1:])
        compared += filled.sum()
        deduplicated += tree.leaves_beside_retrieval is not None
    assert compared > 2000
    assert deduplicated >= 2


def test_trees_that_retrieve_are_replayed_exactly():
    """Every pass of every tree. The prompts hold all pairs of tokens, so that nothing is left to noise."""
    model, rng = tiny_model(4, 0), np.random.default_rng(1)
    pairs = np.array(list(itertools.product(range(4), repeat=2)))
    prompts = [rng.permutation(pairs).ravel().tolist() for _ in range(6)]
    texts = known_texts(model, prompts, 24)
    known = records.without_rows(texts, 4)
    shapes = [trees.chain(RETRIEVAL, 7), trees.branches([], [4, 3, 2]), random_tree(rng, 9, [RETRIEVAL])]
    more = 0
    for tree in shapes:
        tree = trees.TokenTree(tree.parents, tree.sources, tree.ranks, min_match=1)
        seen = tree_search.replay(tree, known)
        for text, (_, accepted) in enumerate(decode(model, tree, prompts, 24)):
            assert seen.count[seen.text == text].tolist() == accepted
            more += sum(accepted) - len(accepted)
    assert more > 100


@pytest.mark.parametrize("tree", [trees.chain(JACOBI, 3), trees.chain(EITHER, 4, 2)])
def test_chains_are_replayed_exactly_with_their_own_rows(tree):
    """The rows that a chain's passes have, found by watching it, and replayed: the same passes.

    Noise may be right in the decoder and is never in the replay, so texts where it was are left out, and counted.
    """
    model, rng = tiny_model(40, 2), np.random.default_rng(2)
    prompts = tiny.prompts(rng, 12, 40)
    texts = known_texts(model, prompts, 30)
    known = records.without_rows(texts, 14)
    drafter = drafters.self_drafter("any", tree)
    decoding = Decoding(model, drafter, prompts, [Request("", max_new_tokens=30)] * 12, 12)
    propose = jax.jit(lambda state: drafter.propose(drafter, None, state)[0])
    lucky, begins = set(), np.array([len(prompt) for prompt in prompts])
    while True:
        starts, rows = np.asarray(decoding.state.lengths) - begins, np.asarray(decoding.state.draft.rows)
        left = np.flatnonzero(~np.asarray(decoding.state.done))
        known.rows[left, starts[left], : tree.max_depth, :1] = rows[left]
        tokens = propose(decoding.state)
        ours = tree_search.node_tokens(tree, known, left, starts[left], np.zeros((len(left), tree.max_depth), int))
        right = np.asarray(tokens)[left, 1:] == known.coming[left, starts[left], : tree.max_depth]
        lucky |= set(left[np.any((ours[:, 1:] == NOTHING) & right, axis=1)].tolist())
        if not decoding.advance(1):
            break
    seen = tree_search.replay(tree, known)
    exact = [text for text in range(12) if text not in lucky]
    assert len(exact) >= 4
    for text in exact:
        assert seen.count[seen.text == text].tolist() == decoding.answers()[text][1]


def test_shifts_of_a_branching_tree():
    tree = trees.branches([(0, 0, 0), (1,)], [2])  # 0 - 1 - 2 - 3, 4 and 5 - 6 below 0
    assert tree_search._shifts(tree).tolist() == [
        [0, 0, 0],
        [0, 0, -1],
        [0, -1, -1],
        [-1, -1, -1],
        [1, 1, -1],  # the spine was left at the root, one node above
        [0, 1, -1],
        [2, -1, -1],
        [0, 0, 0],
    ]


def test_followed_rows_are_the_model_s_own_choices_behind_wrong_tokens():
    """At each place, row 0 of a pace-1 walk is the model's choice behind the right text and one wrong token."""
    model = tiny_model(30, 1)
    prompts = tiny.prompts(np.random.default_rng(3), 3, 30)
    texts = known_texts(model, prompts, 20)
    known = tree_search.collect(model, texts, "jacobi")
    walks = records.steady(known, 1)
    known = records.follow(model, texts, known, trees.chain(JACOBI, DEPTH), walks)
    for text, (prompt, answer) in enumerate(texts):
        for place in (2, 7, 15):
            right = (prompt + answer)[: len(prompt) + place - 1]
            wrong = next(token for token in known.rows[text, place - 1, 0] if token != answer[place - 1])
            [(choice, _)] = decode(model, trees.build([]), [[*right, int(wrong)]], 1)
            assert known.rows[text, place, 0, 0] == choice[0]
    assert (known.rows[0, 1:8] >= 0).all()  # every row is predicted
    assert (known.rows[:, 0] == NOTHING).all()  # but those of the first pass


def test_walks_begin_where_answers_do():
    model = tiny_model(30, 1)
    texts = known_texts(model, tiny.prompts(np.random.default_rng(3), 3, 30), 20)
    known = records.without_rows(texts, 3)
    later = records.follow(model, texts, known, trees.chain(JACOBI, 3), [(1, [3, 5, 9])])
    from_the_beginning = records.follow(model, texts, known, trees.chain(JACOBI, 3), [(1, [0, 3, 5, 9])])
    np.testing.assert_array_equal(later.rows, from_the_beginning.rows)
    assert (later.rows[1, [3, 5, 9]] >= 0).all()


def test_predictions_are_near_what_the_decoder_does():
    """Statistical: tokens a pass of a branching tree over 24 texts, replayed and measured, within 15%."""
    model, rng = tiny_model(40, 3), np.random.default_rng(4)
    prompts = tiny.prompts(rng, 24, 40, longest=20)
    texts = known_texts(model, prompts, 36)
    tree = trees.branches([(0, 0, 0), (1, 0)], [3], noise=1)
    known = tree_search.collect_again(model, texts, tree_search.collect(model, texts, "tr_jacobi"), tree)
    passes = sum(len(accepted) for _, accepted in decode(model, tree, prompts, 36))
    measured = sum(len(answer) for _, answer in texts) / passes
    assert measured > 1.15  # or nothing would have been predicted
    assert tree_search.replay(tree, known).tokens_per_pass == pytest.approx(measured, rel=0.15)


def all_trees(width: int, kinds: list[tuple[int, int]], min_match: int):
    """Every tree whose siblings differ."""
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
def test_greedy_growth_finds_the_optimum_of_small_cases(decoder, seed):
    known = synthetic(seed)
    found = tree_search.search(known, decoder, 4)
    kinds = {
        "jacobi": [(JACOBI, 0), (JACOBI, 1), (JACOBI, 2), (NOISE, 0)],
        "prompt_lookup": [(RETRIEVAL, 0), (RETRIEVAL, 1)],
    }
    for width in (2, 3, 4):
        best = max(
            tree_search.replay(tree, known).tokens_per_pass
            for min_match in ((1, 2, 3, 5) if decoder == "prompt_lookup" else (1,))
            for tree in all_trees(width, kinds[decoder], min_match)
        )
        assert tree_search.replay(found[width], known).tokens_per_pass == pytest.approx(best, rel=1e-9), width


def test_acceptance_of_nodes_adds_up():
    known = synthetic(5)
    tree = tree_search.search(known, "tr_jacobi", 12)[12]
    seen = tree_search.replay(tree, known)
    assert seen.count.sum() == known.sizes.sum()
    acceptance = seen.acceptance(tree)
    assert acceptance[0] == 1
    assert (acceptance[1:] <= acceptance[list(tree.parents[1:])]).all()
    cut = (tree.depth[seen.last] + 1 - seen.count).sum()  # at the ends of the answers
    assert acceptance.sum() * len(seen.count) == pytest.approx(seen.count.sum() + cut)


def test_noise_tails_are_found_where_they_pay(monkeypatch):
    """Always right up to depth 1: a root with one node has drafts in every second pass, with a tail in every one."""
    monkeypatch.setattr(tree_search, "_TRIED", 1)  # tails are tried beside what looks best
    known = synthetic(0)
    known.rows[..., 0, 0] = np.maximum(known.coming[..., 0], 0)
    known.rows[..., 1:, :] = 99
    found = tree_search.search(known, "jacobi", 3)
    assert tree_search.replay(found[2], known).tokens_per_pass == pytest.approx(3 / 2, rel=0.05)
    assert tree_search.replay(found[3], known).tokens_per_pass == pytest.approx(2)
    assert found[3].max_depth == 2


def test_authors_tree():
    tree = tree_search.authors_tree()
    assert tree.width == 69
    predicted = np.array(tree.sources) == JACOBI
    assert np.bincount(tree.depth[predicted]).tolist() == [0, 10, 28, 23, 2]
    assert np.bincount(tree.depth[np.array(tree.sources) == RETRIEVAL]).tolist() == [0, 1, 1, 1, 1, 1]
    assert (tree.count(JACOBI), tree.count(RETRIEVAL)) == (10, 1)
    paths = {tuple(rank for _, rank in name) for name in tree_search._names(tree) if name and name[0][0] == JACOBI}
    for path in [(0, 0, 0, 1), (0, 7, 0), (1, 0, 1), (9, 0), (1, 6), (0, 0, 9), (0, 2, 1)]:  # of the published list
        assert path in paths


def test_find(tmp_path):
    assert trees.find(tmp_path, "tr_jacobi") is None
    tree = trees.chain(EITHER, 2, 3)
    trees.save(tree, tmp_path / "tree.json", about={"decoder": "tr_jacobi"})
    assert trees.find(tmp_path, "tr_jacobi") == tree
    assert trees.find(str(tmp_path), "jacobi") is None
    for text, said in [("{", "not a tree file"), ("[]", "not a tree file")]:
        (tmp_path / "tree.json").write_text(text)
        with pytest.raises(InputError, match=said) as error:
            trees.find(tmp_path, "tr_jacobi")
        assert "\n" not in str(error.value)


def test_file_with_notes_round_trips(tmp_path):
    tree, path = tree_search.authors_tree(), tmp_path / "tree.json"
    notes = [{"acceptance": node / 100} for node in range(1, 69)]
    trees.save(tree, path, notes, {"decoder": "tr_jacobi", "widths": {"1": 0.5}})
    assert trees.load(path) == tree
    content = json.loads(path.read_text())
    assert content["nodes"][67]["acceptance"] == 0.68
    assert content["widths"] == {"1": 0.5}
    assert sum('"parent"' in line for line in path.read_text().splitlines()) == 68  # one node a line
