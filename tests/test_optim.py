import jax
import numpy as np
import optax
import tiny_config
from flax.linen import meta

from msn_jax import llama, optim
from msn_jax.config import OptimConfig


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
    optimizer = optim.adamw(cfg, 10)
    params = {"a": np.ones(3, np.float32)}
    state = optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        _, state = optimizer.update({"a": np.array([3.0, 4.0, 0.0], np.float32)}, state, params)
    mu = optax.tree_utils.tree_get(state, "mu")["a"]
    np.testing.assert_allclose(mu, 0.1 * 0.5 * np.array([0.6, 0.8, 0.0]), rtol=1e-5)
