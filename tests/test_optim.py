import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import random_params
import tiny_config
from flax.linen import meta

from msn_jax import llama, optim, sharding, train
from msn_jax.config import MeshConfig, OptimConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_only_matrices_decay():
    params = meta.unbox(jax.eval_shape(lambda: llama.init(jax.random.key(0), tiny_config.get_config().model)))
    decayed = jax.tree_util.tree_flatten_with_path(optim.decayed(params))[0]
    names = {jax.tree_util.keystr(path, simple=True, separator="/"): value for path, value in decayed}
    assert {name for name, value in names.items() if not value} == {
        "norm/scale",
        "layers/attention_norm/scale",
        "layers/mlp_norm/scale",
    }


def test_learning_rate_warms_up_and_decays():
    cfg = OptimConfig(learning_rate=2.0, warmup_steps=4, final_fraction=0.25)
    rate = optim.learning_rate(cfg, 12)
    np.testing.assert_allclose([rate(s) for s in range(5)], [0.5, 1.0, 1.5, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose([rate(8), rate(12), rate(99)], [1.25, 0.5, 0.5], rtol=1e-6)
    short = optim.learning_rate(cfg, 2)
    np.testing.assert_allclose([short(0), short(1)], [0.5, 1.0], rtol=1e-6)


def test_gradients_are_clipped_by_their_global_norm():
    cfg = OptimConfig(learning_rate=1.0, warmup_steps=0, clip_norm=0.5, weight_decay=0.0)
    optimizer = optim.optimizer(cfg, 10)
    params = {"a": np.ones(3, np.float32)}
    state = optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        _, state = optimizer.update({"a": np.array([3.0, 4.0, 0.0], np.float32)}, state, params)
    mu = optax.tree_utils.tree_get(state, "mu")["a"]
    np.testing.assert_allclose(mu, 0.1 * 0.5 * np.array([0.6, 0.8, 0.0]), rtol=1e-5)


def test_muon_orthogonalizes_updates_of_matrices_and_uses_adam_elsewhere():
    cfg = tiny_config.get_config().model
    params = meta.unbox(llama.init(jax.random.key(0), cfg))
    gradients = random_params.stacked(cfg)
    settings = OptimConfig(learning_rate=1.0, warmup_steps=0, clip_norm=1e9, weight_decay=0.0, kind="muon")
    updates = {}
    for kind in ("muon", "adamw"):
        settings.kind = kind
        optimizer = optim.optimizer(settings, 10)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            update = jax.jit(lambda optimizer=optimizer: optimizer.update(gradients, optimizer.init(params), params))
            updates[kind], _ = update()

    layers, gradients = updates["muon"]["layers"], gradients["layers"]
    for name, shape in (("q", (16, 16)), ("k", (16, 8)), ("o", (16, 16))):
        assert_orthogonalized(*(tree["attention"][name].reshape(2, *shape) for tree in (gradients, layers)))
    for name in ("gate", "up", "down"):
        assert_orthogonalized(gradients["mlp"][name], layers["mlp"][name])
    for name in ("embed", "norm"):  # Adam's first update is the gradient's sign times one constant
        muon, adamw = (jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree[name])]) for tree in updates.values())
        np.testing.assert_array_equal(jnp.sign(muon), jnp.sign(adamw))
        np.testing.assert_allclose(jnp.abs(muon), jnp.abs(muon[0]), rtol=1e-3)


def assert_orthogonalized(gradients, updates):
    for gradient, update in zip(gradients, updates, strict=True):
        left, _, right = np.linalg.svd(gradient, full_matrices=False)
        assert cosine_distance(-update, left @ right) < 0.5 * cosine_distance(gradient, left @ right)


def cosine_distance(matrix, other):
    return 1 - np.sum(matrix * other) / np.linalg.norm(matrix) / np.linalg.norm(other)


def test_the_momentum_of_muon_is_sharded_like_its_weights():
    cfg = tiny_config.get_config()
    cfg.optim.kind = "muon"
    mesh = sharding.make_mesh(MeshConfig(data=4, fsdp=2))
    state = train.abstract_state(cfg, optim.optimizer(cfg.optim, 10), mesh)
    momenta = [leaf.sharding.spec for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (2, 16, 2, 8)]
    assert momenta == [state.params["layers"]["attention"]["q"].sharding.spec] * len(momenta) != []
    start = jax.jit(functools.partial(train.create_state, cfg, optim.optimizer(cfg.optim, 10)))
    assert jax.tree.structure(meta.unbox(jax.eval_shape(start))) == jax.tree.structure(state)
