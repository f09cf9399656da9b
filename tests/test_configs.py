"""Every experiment of configs/ at full size, with `jax.eval_shape`: nothing is allocated."""

import functools
import importlib
import math
import types

import jax
import jax.numpy as jnp
import pytest

from benchmarks import adapter_train
from msn_jax import config, optim, sharding, train

EXPERIMENTS = {  # published parameter counts, in billions
    "llama3_8b:msn": 8.03,
    "llama3_8b:sft": 8.03,
    "deepseek_coder_6_7b:msn": 6.74,
    "deepseek_coder_6_7b:sft": 6.74,
    "qwen3:msn-0.6b": 0.596,
    "qwen3:sft-1.7b": 1.72,
    "qwen3:msn-4b": 4.02,
    "qwen3:sft-8b": 8.19,
    "stories260k:msn": 0.00026,
    "demo:base": 0.0008,
    "demo:sft": 0.0008,
    "demo:msn": 0.0008,
}


def get(experiment):
    file, _, arg = experiment.partition(":")
    return importlib.import_module(f"configs.{file}").get_config(arg)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_has_consistent_shapes_and_the_published_size(experiment):
    cfg = get(experiment)
    config.check(cfg)
    optimizer = optim.optimizer(cfg.optim, cfg.train.steps)
    state = train.abstract_state(cfg, optimizer, sharding.make_mesh(cfg.mesh))
    billions = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state.params)) / 1e9
    assert billions == pytest.approx(EXPERIMENTS[experiment], rel=0.1 if billions < 0.1 else 0.005)

    shape = (cfg.data.batch_size, cfg.data.row_length)
    integers, booleans = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.int32, jnp.bool_))
    batch = train.Batch(integers, integers, integers, booleans)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        step = functools.partial(train.train_step, cfg=cfg, optimizer=optimizer)
        next_state, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), next_state) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert metrics["noise_loss"].shape == (cfg.noise.length,)


@pytest.mark.parametrize(("file", "arg"), [("llama3_8b", "msn8"), ("deepseek_coder_6_7b", ""), ("qwen3", "msn-9b")])
def test_an_unknown_experiment_is_an_error_that_lists_the_known_ones(file, arg):
    with pytest.raises(ValueError, match=rf"configs/{file}.py has no experiment '{arg}': choose one of .*msn"):
        get(f"{file}:{arg}")


@pytest.mark.parametrize("arg", ["", "gated", "gated:", "other:models"])
def test_a_config_of_an_adapter_needs_an_experiment_and_a_model(arg):
    with pytest.raises(ValueError, match=r"must be configs/adapter.py:gated:MODEL or :msn:MODEL"):
        get(f"adapter:{arg}")


SMOLLM2_135M = config.LlamaConfig(
    vocab_size=49152,
    d_model=576,
    n_layers=30,
    n_heads=9,
    n_kv_heads=3,
    head_dim=64,
    d_mlp=1536,
    max_length=8192,
    rope_theta=1e5,
    rope_scaling="none",
    sliding_window=0,
    norm_eps=1e-5,
    qkv_bias=False,
    qk_norm=False,
    tie_embeddings=True,
    dtype="float32",
    param_dtype="float32",
)


@pytest.mark.parametrize("experiment", ["gated", "msn"])
def test_training_an_adapter_needs_below_5_percent_of_the_memory_for_gradients_and_moments(experiment, monkeypatch):
    file = importlib.import_module("configs.adapter")
    monkeypatch.setattr(file.pretrained, "read_config", lambda model: SMOLLM2_135M)
    monkeypatch.setattr(file, "_unused_special_token", lambda model: 5)
    cfg = get(f"adapter:{experiment}:model")
    config.check(cfg)
    assert cfg.adapter.alpha == cfg.adapter.rank
    assert config.adapter_targets(cfg.adapter) == config.ADAPTER_TARGETS
    memory = adapter_train.memory(cfg)
    assert memory["model_bytes"] == pytest.approx(3 * 4 * 134.515e6, rel=1e-4)
    assert 0.04 < memory["adapter_bytes"] / memory["model_bytes"] < 0.05


@pytest.mark.parametrize(("text", "expected"), [("<unused>", 4), ("<|im_start|>", None)])
def test_the_noise_token_has_no_role(text, expected, monkeypatch):
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2, "<stop>": 3, text: 4}
    template = types.SimpleNamespace(source="<|im_start|>{{ role }}", special_tokens=(("unk_token", "<unk>"),))
    tokenizer = types.SimpleNamespace(
        template=template,
        special_tokens=frozenset(ids),
        encode=lambda text, start: [ids[text]],
        start_ids=(1,),
        stop_ids=(2, 3),
        eos_id=2,
    )
    file = importlib.import_module("configs.adapter")
    monkeypatch.setattr(file.pretrained, "directory", lambda model: model)
    monkeypatch.setattr(file.tokenizers, "load", lambda directory: tokenizer)
    assert file._unused_special_token("model") == expected
