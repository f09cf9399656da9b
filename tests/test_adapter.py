"""LoRA adapters: gradients, training for the gate, files, and decoding with them."""

import dataclasses
import json
import shutil

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_config
from refusals import refusal

import msn_jax
from msn_jax import adapter, cpu, gated, llama, masks, noise, optim, pretrained, train, train_steps, workdirs
from msn_jax.cli import InputError
from msn_jax.config import AdapterConfig, NoiseConfig
from msn_jax.data import batches
from msn_jax.data import tokenizer as tokenizers
from msn_jax.decode import drafters, engine, models, tree_benchmark, tree_search
from msn_jax.decode import tree as trees
from msn_jax.decode.request import Request
from msn_jax.decode.tree import JACOBI, NOISE

TOKEN = 7
pytestmark = pytest.mark.usefixtures("quick_compilation")
PROMPTS = ["two and five", "nine and one", "four and four", "zero and eleven"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapter")
    tiny_config.write_data(directory / "train.jsonl")
    return directory


def run(cfg, workdir):
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        assert train.train(cfg, workdir)
    return workdir


@pytest.fixture(scope="module")
def base(directory):
    cfg = tiny_config.config_in(directory)
    cfg.noise = NoiseConfig(kind="none", length=2)
    return run(cfg, directory / "base")


def gated_config(directory, base, **train_fields):
    cfg = tiny_config.config_in(directory, init_from=str(base), **{"steps": 200, **train_fields})
    cfg.noise = NoiseConfig(kind="token", token=TOKEN, blocks=8, length=2)
    cfg.adapter = AdapterConfig(rank=8, alpha=16.0)
    return cfg


@pytest.fixture(scope="module")
def trained(directory, base):
    return run(gated_config(directory, base), directory / "gated")


def perturbed(cfg, scale=0.3, seed=1):
    """An adapter that changes everything."""
    new = adapter.init(jax.random.key(0), cfg.model, cfg.adapter)
    params = jax.tree.map(lambda leaf: leaf.value, new, is_leaf=boxed)
    return {
        name: (a, scale * jax.random.normal(jax.random.fold_in(jax.random.key(seed), index), b.shape))
        for index, (name, (a, b)) in enumerate(params.items())
    }


def boxed(leaf):
    return hasattr(leaf, "names")


def batch_of(cfg, workdir):
    rows, _ = train.load_rows(cfg, tokenizers.load(workdir / "tokenizer.model"))
    return jax.tree.map(jnp.asarray, batches.TrainBatches(rows, 0, cfg.data.batch_size)[0])


# --- the model


def test_outside_the_gate_the_result_is_that_of_the_model_alone(directory, base):
    cfg = gated_config(directory, base)
    params = pretrained.load(base, stacked=False).params
    factors = adapter.decode_layout(perturbed(cfg), cfg.adapter)
    tokens, positions = jnp.arange(12)[None], jnp.arange(12)[None]
    arguments = (params, cfg.model, tokens, positions, masks.causal(12))
    alone = llama.forward(*arguments).hidden
    closed = llama.forward(*arguments, adapter=factors, gate=jnp.zeros((1, 12), bool)).hidden
    np.testing.assert_array_equal(closed, alone)
    tail = llama.forward(*arguments, adapter=factors, gate=jnp.arange(12)[None] >= 9).hidden
    np.testing.assert_array_equal(tail[:, :9], alone[:, :9])
    assert jnp.abs(tail[:, 9:] - alone[:, 9:]).min() > 0


@pytest.mark.parametrize("first_layer", [0, 1])
def test_merging_equals_an_adapter_at_every_token(directory, base, first_layer):
    cfg = gated_config(directory, base)
    cfg.adapter.first_layer = first_layer
    stacked, unstacked = (pretrained.load(base, stacked=stacked).params for stacked in (True, False))
    factors = perturbed(cfg)
    decoding = adapter.decode_layout(factors, cfg.adapter)
    tokens, positions = jnp.arange(12)[None], jnp.arange(12)[None]
    inputs = (cfg.model, tokens, positions, masks.causal(12))
    adapted = llama.forward(unstacked, *inputs, adapter=decoding).hidden
    frozen, _ = llama.forward_frozen(stacked, *inputs, adapter=adapter.scale(factors, cfg.adapter))
    merged = llama.forward(adapter.merge(stacked, factors, cfg.adapter), *inputs).hidden
    for other in (frozen, merged, llama.forward(adapter.merge_layers(unstacked, decoding), *inputs).hidden):
        np.testing.assert_allclose(other, adapted, atol=1e-5)
    assert jnp.abs(adapted - llama.forward(unstacked, *inputs).hidden).max() > 0.1


# --- training


@pytest.mark.parametrize("sliding_window", [0, 3])
def test_blocks_run_as_in_one_forward_pass_over_row_and_blocks(directory, base, sliding_window):
    cfg = gated_config(directory, base)
    cfg.model.sliding_window = sliding_window
    cfg.noise.blocks, cfg.noise.length = 24, 4
    batch = batch_of(cfg, base)
    params = pretrained.load(base, stacked=True).params
    blocks = noise.draw_blocks(jax.random.key(3), batch, cfg.noise, cfg.model.vocab_size)
    assert set(np.unique(blocks.tokens)) == {TOKEN}
    zero = jax.tree.map(jnp.zeros_like, perturbed(cfg))
    results = gated.block_losses(zero, params, cfg, batch, blocks)
    cfg.noise.self_distillation = True
    inputs = noise.build_inputs(jax.random.key(3), batch, cfg.noise, cfg.model.vocab_size)
    losses, _ = train_steps.token_losses(params, cfg, inputs)
    expected = losses[:, batch.tokens.shape[1] :].reshape(results.losses.shape)
    valid = np.asarray(blocks.valid)
    assert 0 < valid.mean() < 1
    np.testing.assert_allclose(results.losses[valid], expected[valid], rtol=1e-5)
    cfg.noise.self_distillation, cfg.noise.label_targets = False, True
    from_labels = gated.block_losses(zero, params, cfg, batch, blocks)
    losses, _ = train_steps.token_losses(params, cfg, inputs)
    expected = losses[:, batch.tokens.shape[1] :].reshape(results.losses.shape)
    np.testing.assert_allclose(from_labels.losses[valid], expected[valid], rtol=1e-5)
    np.testing.assert_array_equal(from_labels.probability, results.probability)  # that of a draft to be accepted


def test_a_draft_counts_as_often_as_the_drafts_before_it_are_accepted(directory, base):
    cfg = gated_config(directory, base)
    probability = jnp.array([[[0.5, 0.25], [0.1, 0.9]]])
    losses, valid = jnp.array([[[1.0, 2.0], [3.0, 4.0]]]), jnp.ones((1, 2, 2), bool)
    results = gated.BlockLosses(losses, probability, probability > 0.4, valid)
    assert gated.loss(results, cfg) == pytest.approx((1 + 0.5 * 2 + 3 + 0.1 * 4) / (1 + 0.5 + 1 + 0.1))
    correct, count = gated.accuracy(results.replace(valid=valid.at[:, 1].set(False)))
    assert (correct.tolist(), count.tolist()) == ([1, 0], [1, 1])


@pytest.mark.parametrize("gate", ["noise", "all"])
def test_only_the_adapter_has_gradients_and_optimizer_state(directory, base, gate):
    cfg = gated_config(directory, base)
    cfg.adapter.gate = gate
    optimizer = optim.optimizer(cfg.optim, cfg.train.steps)
    params = pretrained.load(base, stacked=True).params
    state = jax.jit(lambda: train.create_state(cfg, optimizer))()
    state = jax.tree.map(lambda leaf: leaf.value if boxed(leaf) else leaf, state, is_leaf=boxed)
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert count == 2 * 8 * sum(map(sum, adapter.shapes(cfg.model, cfg.adapter).values()))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state)) <= 2 * count + 8
    with jax.numpy_dtype_promotion("standard"):
        after, metrics = train_steps.train_step(state, batch_of(cfg, base), params, cfg=cfg, optimizer=optimizer)
    assert metrics["grad_norm"] > 0
    assert all(jnp.abs(b).max() > 0 for _, b in after.params.values())  # every matrix learns


def test_training_teaches_drafts(trained):
    log = [json.loads(line) for line in (trained / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert log[-1]["eval_noise_accuracy"][0] > log[0]["noise_accuracy"][0] + 0.2


def test_a_run_killed_after_a_checkpoint_ends_bit_for_bit_like_an_undisturbed_one(
    directory, base, trained, monkeypatch
):
    cfg, save = gated_config(directory, base), train.checkpoint.save

    def killed(manager, step, *args):
        save(manager, step, *args)
        if step == 30:
            raise KeyboardInterrupt

    monkeypatch.setattr(train.checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(cfg, directory / "killed")
    run(cfg, directory / "killed")
    first, second = (adapter.load(workdir / workdirs.ADAPTER, cfg.model) for workdir in (trained, directory / "killed"))
    assert first.cfg == second.cfg == cfg.adapter
    assert first.noise_token == second.noise_token == TOKEN
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)


def test_a_run_starts_from_an_adapter(directory, base, trained, tmp_path):
    given = shutil.copytree(trained / workdirs.ADAPTER, tmp_path / "given")
    cfg = gated_config(directory, base, steps=1)
    cfg.optim.learning_rate = 1e-30
    cfg.adapter.init_from, cfg.adapter.targets = str(given), "down, up,gate,o,v,k,q"
    run(cfg, tmp_path / "next")
    before, after = (adapter.load(path, cfg.model) for path in (given, tmp_path / "next" / workdirs.ADAPTER))
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    shutil.rmtree(given)  # a run that resumes no longer needs it
    cfg.train.steps = 2
    run(cfg, tmp_path / "next")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 4}, "its adapter has rank=8, config.adapter.rank is 4"),
        ({"alpha": 8.0}, "its adapter has alpha=16.0, config.adapter.alpha is 8.0"),
        ({"targets": "q, k"}, "its adapter has targets='down,gate,k,o,q,up,v', config.adapter.targets is 'k,q'"),
        ({"first_layer": 1}, "its adapter has first_layer=0, config.adapter.first_layer is 1"),
        ({"gate": "all"}, "its adapter has gate='noise', config.adapter.gate is 'all'"),
        (
            {"init_from": "nowhere"},
            "config.adapter.init_from=nowhere: has no adapter_config.json; name a PEFT directory",
        ),
        ({"rank": 0}, "must be '' while config.adapter.rank is 0"),
    ],
)
def test_an_adapter_of_another_kind_is_no_start(directory, base, trained, tmp_path, change, message):
    cfg = gated_config(directory, base)
    cfg.adapter = dataclasses.replace(cfg.adapter, init_from=str(trained / workdirs.ADAPTER))
    cfg.adapter = dataclasses.replace(cfg.adapter, **change)
    if change == {"gate": "all"}:
        cfg.noise = NoiseConfig(kind="ahead", length=2)
    words = refusal(train.train, cfg, tmp_path / "next")
    assert message in words and words.startswith("config.adapter.init_from=")


# --- files


def test_a_saved_adapter_is_read_back(directory, base, tmp_path):
    cfg = gated_config(directory, base)
    cfg.adapter = dataclasses.replace(cfg.adapter, targets="q,o,down", first_layer=1, gate="all")
    saved = adapter.Adapter(perturbed(cfg), cfg.adapter, None)
    adapter.save(saved, tmp_path / "a", "base")
    read = adapter.load(tmp_path / "a", cfg.model)
    assert read.cfg == saved.cfg
    assert read.noise_token is None
    jax.tree.map(np.testing.assert_array_equal, read.params, saved.params)


def test_compression_keeps_the_largest_singular_values(directory, base):
    cfg = gated_config(directory, base)
    a, b = perturbed(cfg)["q"]
    full = adapter.Adapter({"q": (a, b)}, dataclasses.replace(cfg.adapter, targets="q"), None)
    small = adapter.compress(full, 3)
    assert (small.cfg.rank, small.params["q"][0].shape[2]) == (3, 3)
    updates = [
        np.asarray(x @ y) * one.cfg.alpha / one.cfg.rank for one in (full, small) for x, y in one.params.values()
    ]
    left, values, right = np.linalg.svd(updates[0])
    expected = left[:, :, :3] * values[:, None, :3] @ right[:, :3]
    np.testing.assert_allclose(updates[1], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "must be 'LORA'"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"target_modules": ["lm_head"]}, "must be a list of q"),
        ({"layers_to_transform": [0]}, "must be the last layers"),
        ({"r": 4}, "expected shape \\(4, 16\\) for this model"),
        ({"msn_gate": "never"}, "must be one of all, noise"),
        ({"msn_noise_token": 10**6}, "must be a token of the vocabulary"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_in_one_line(trained, tmp_path, change, message):
    cfg = tiny_config.get_config()
    path = tmp_path / "a"
    path.mkdir()
    (path / adapter.WEIGHTS).write_bytes((trained / workdirs.ADAPTER / adapter.WEIGHTS).read_bytes())
    described = json.loads((trained / workdirs.ADAPTER / adapter.CONFIG).read_text(encoding="utf-8"))
    (path / adapter.CONFIG).write_text(json.dumps(described | change), encoding="utf-8")
    with pytest.raises(InputError, match=message) as error:
        adapter.load(path, cfg.model)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"has no adapter_config\.json"):
        adapter.load(tmp_path / "none", cfg.model)


def test_the_workdir_of_an_adapter_is_not_a_model(trained, base):
    with pytest.raises(InputError, match=rf"holds an adapter, not a model: use --model={base} --adapter={trained}"):
        models.load(trained)


# --- decoding


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", ["jacobi", "tr_jacobi", "auto"])
@pytest.mark.parametrize("cache_bytes", [0, 1 << 40])
def test_a_gated_adapter_does_not_change_the_output(
    base, trained, name, batch_size, temperature, cache_bytes, monkeypatch
):
    monkeypatch.setattr(cpu, "_CACHE_BYTES", cache_bytes)
    settings = {"max_new_tokens": 24, "temperature": temperature, "batch_size": batch_size}
    expected = msn_jax.generate(models.load(base), PROMPTS, "autoregressive", **settings)
    model = models.load(base, adapter=trained / workdirs.ADAPTER)
    ours = msn_jax.generate(model, PROMPTS, name, **settings)
    assert [one.tokens for one in ours] == [one.tokens for one in expected]


def test_a_noise_node_is_never_accepted(base, trained, monkeypatch):
    model = models.load(base, adapter=trained / workdirs.ADAPTER)
    [plain] = msn_jax.generate(models.load(base), PROMPTS[:1], "autoregressive", 24)
    for token in set(plain.tokens):  # the noise is what the model emits
        adapted = dataclasses.replace(model.adapter, noise_token=token)
        [ours] = msn_jax.generate(dataclasses.replace(model, adapter=adapted, experience={}), PROMPTS[:1], "jacobi", 24)
        assert ours.tokens == plain.tokens


def test_drafts_are_the_predictions_of_the_adapted_model_after_noise_tokens(base, trained):
    model = models.load(base, adapter=trained / workdirs.ADAPTER)
    decoder = engine.Decoder(model, "jacobi", trees.add_tails(trees.chain(JACOBI, 2), 2))
    request = Request(PROMPTS[0], 24)
    ids = engine.encode(decoder, request, "prompt")
    session = decoder.start([ids], [request], 1)
    for _ in range(6):
        session.run(1)
        length = int(session.state.lengths[0])
        sequence = [*session.state.tokens[0, : length - 1].tolist(), TOKEN, TOKEN]  # noise from the bonus token on
        positions = jnp.arange(length + 1)[None]
        inputs = (model.cfg, jnp.array([sequence]), positions, masks.causal(length + 1))
        hidden = llama.forward(model.params, *inputs, adapter=model.adapter.params, gate=positions >= length - 1).hidden
        predicted = jnp.argmax(llama.unembed(model.params, model.cfg, hidden), axis=-1)[0, -2:]
        assert session.state.draft.predictions[0, :2, 0].tolist() == predicted.tolist()


def test_the_benchmark_compares_with_and_without_the_adapter(base, trained, tmp_path):
    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS)
    (tmp_path / "sums.jsonl").write_text(lines, encoding="utf-8")
    flags = [f"--model={base}", f"--adapter={trained / workdirs.ADAPTER}", "--max_new_tokens=12", "--output=x.json"]
    results = commands.run("benchmarks.adapter", [[*flags, "--prompts=sums.jsonl"], flags], tmp_path)
    assert [code for code, _, _ in results] == [0, 2]
    report = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert report["prompts"] == len(PROMPTS)
    assert {row["exact"] for row in report["settings"].values()} == {len(PROMPTS)}
    assert all(row["sums"] == row["all"] >= 1 for row in report["settings"].values())
    assert 0 <= report["repeated_4_grams"] <= 1


def test_predictions_come_from_the_tail_of_the_last_accepted_node():
    tree = trees.add_tails(trees.chain(JACOBI, 1), 2)
    assert tree.parents == (-1, 0, 0, 2, 1, 4)
    assert tree.continuations[0].tolist() == [2, 3, -1]
    assert tree.continuations[1].tolist() == [4, 5, -1]
    assert drafters.ADAPTED_TREES["tr_jacobi"].first(4) == drafters.DEFAULT_TREES["tr_jacobi"]


def test_trees_for_an_adapter_are_searched_and_replayed(base, trained):
    """Pass by pass, if there is a tail behind every node. A node without one may predict better than the replay knows.

    The traces come from one run of the tail, without drafts.
    """
    model = models.load(base, adapter=trained / workdirs.ADAPTER)
    root = engine.Decoder(model, "autoregressive")
    requests = [Request(prompt, 30) for prompt in PROMPTS]
    completions = [tree_benchmark.complete(model, engine.encode(root, one, "prompt"), one) for one in requests]
    traces = tree_search.collect_traces(model, completions, "tr_jacobi")
    assert (traces.jacobi[:, 1:5, : drafters.TAIL_LENGTH] >= 0).all()  # every position is traced,
    assert (traces.jacobi[:, :, drafters.TAIL_LENGTH :] == drafters.NO_DRAFT).all()  # as far as the tail reaches
    best = tree_search.search(traces, "tr_jacobi", 7)
    assert max(best) == 7 and len(best) > 3
    assert all(tree.width == width and (NOISE in tree.sources) == (width > 1) for width, tree in best.items())
    for width in sorted(best)[1::3]:  # every tree compiles programs of its own
        tree = best[width]
        bare = tree.first(tree.width - tree.sources.count(NOISE))
        for number_of_tails, one in (("some", tree), ("all", trees.add_tails(bare, drafters.TAIL_LENGTH))):
            replayed = tree_search.replay(one, traces)
            lengths = [replayed.num_emitted[replayed.completion == index].tolist() for index in range(len(PROMPTS))]
            generations = msn_jax.generate(model, PROMPTS, "tr_jacobi", 30, tree=one)
            passes = sum(generation.forward_passes for generation in generations)
            assert passes <= len(replayed.num_emitted) <= 1.25 * passes
            if number_of_tails == "all":
                assert lengths == [generation.accept_lengths for generation in generations]


def test_calibrate_writes_the_tree_of_an_adapter_into_its_directory(base, trained, tmp_path):
    shutil.copytree(trained / workdirs.ADAPTER, tmp_path / "adapter")
    lines = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in 2 * PROMPTS)
    (tmp_path / "sums.jsonl").write_text(lines, encoding="utf-8")
    flags = [f"--model={base}", "--adapter=adapter", "--prompts=sums.jsonl", "--max_new_tokens=30", "--max_width=6"]
    refused = [*flags, "--decoder=prompt_lookup"]
    (code, _, error), (refusal, _, message) = commands.run("msn_jax.calibrate", [flags, refused], tmp_path)
    assert code == 0, error
    assert refusal == 2 and "--decoder=prompt_lookup: does not use the adapter" in message
    tree = trees.find(tmp_path / "adapter", "tr_jacobi")
    decoder = engine.Decoder(models.load(base, adapter=tmp_path / "adapter"), "tr_jacobi")
    assert decoder.drafter.tree == tree and decoder.drafter.is_adapted
    assert not (base / trees.FILE_NAME).exists()


def test_the_shipped_adapter_has_a_tree_with_noise_tails():
    tree = trees.load(commands.ROOT / "adapters/smollm2_135m_instruct/tree_64.json")
    assert tree.width == 64 and tree.tail_length == drafters.TAIL_LENGTH
