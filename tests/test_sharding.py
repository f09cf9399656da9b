import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import random_params
import tiny_config
from jax.sharding import PartitionSpec

from msn_jax import optim, sharding, train
from msn_jax.cli import InputError
from msn_jax.config import MeshConfig
from msn_jax.noise import Batch

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True, scope="module")
def promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        yield


def tiny():
    cfg = tiny_config.get_config()
    cfg.model.n_heads = cfg.model.n_kv_heads = 8
    cfg.model.head_dim = 4
    cfg.train.remat = True
    cfg.optim.learning_rate = 1e-3  # for gradients near 0, Adam amplifies rounding errors to a fraction of the rate
    return cfg


def one_step(cfg, mesh):
    """Metrics, parameters and first moments after a step from random parameters; and the sharded parameters."""
    optimizer = optim.optimizer(cfg.optim, cfg.train.steps)
    target = train.abstract_state(cfg, optimizer, mesh)
    shardings, rows = jax.tree.map(lambda leaf: leaf.sharding, target), sharding.batch_sharding(mesh, 8)
    state = train.initial_state(cfg, optimizer, target, mesh)
    # A new model's output projections are zero, and so are most gradients of its first step.
    params = jax.tree.map(np.array, random_params.stacked(cfg.model))  # copies, because the step donates the state
    state = state.replace(params=jax.device_put(params, shardings.params))
    tokens = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (8, 32), np.int32)
    ones = np.ones_like(tokens)
    batch = Batch(tokens, np.broadcast_to(np.arange(32, dtype=np.int32), tokens.shape), ones, ones > 0)
    step, _ = train.jit_steps(cfg, optimizer, mesh, state)
    state, metrics = step(state, train.to_devices(batch, rows), None)
    moments = optax.tree_utils.tree_get(state.opt_state, "mu")  # the clipped gradient times 1 - b1 = 0.1
    return jax.device_get((metrics, state.params, moments)), state.params


@functools.cache
def on_one_device():
    return one_step(tiny(), sharding.make_mesh(MeshConfig(), jax.devices()[:1]))[0]


@pytest.mark.parametrize(
    ("mesh", "split_embed", "split_q"),
    [
        (MeshConfig(data=8), (320, 16), (2, 16, 8, 4)),
        (MeshConfig(fsdp=8), (320, 2), (2, 2, 8, 4)),
        (MeshConfig(tensor=8), (40, 16), (2, 16, 1, 4)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (160, 8), (2, 8, 4, 4)),
    ],
    ids=["data", "fsdp", "tensor", "mixed"],
)
def test_a_step_on_eight_devices_equals_one_device(mesh, split_embed, split_q):
    (metrics, params, moments), arrays = one_step(tiny(), sharding.make_mesh(mesh))
    assert arrays["embed"].addressable_shards[0].data.shape == split_embed
    assert arrays["layers"]["attention"]["q"].addressable_shards[0].data.shape == split_q
    expected_metrics, expected, expected_moments = on_one_device()
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5), metrics, expected_metrics)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=0), params, expected)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-5), moments, expected_moments)


def test_decoding_does_not_shard_weights_over_fsdp():
    assert sharding.partition_spec(("vocab", "embed"), sharding.DECODE_RULES) == PartitionSpec("tensor", None)
    assert sharding.partition_spec(("vocab", "embed"), sharding.TRAIN_RULES) == PartitionSpec("tensor", "fsdp")


def test_an_axis_without_a_rule_is_an_error():
    boxed = {"w": nn.LogicallyPartitioned(jnp.zeros((2, 2)), ("embed", "surprise"))}
    with pytest.raises(KeyError, match="'surprise' has no sharding rule"):
        sharding.shardings(boxed, sharding.make_mesh(MeshConfig()), sharding.TRAIN_RULES)


def test_an_indivisible_dimension_is_refused_by_parameter():
    cfg = tiny()
    cfg.model.n_kv_heads = 4
    mesh = sharding.make_mesh(MeshConfig(tensor=8))
    with pytest.raises(InputError, match=r"layers/attention/k.*'kv_heads' of size 4 cannot be split into 8"):
        train.abstract_state(cfg, optim.optimizer(cfg.optim, 1), mesh)


@pytest.mark.parametrize(
    "mesh", [MeshConfig(data=3), MeshConfig(tensor=16), MeshConfig(data=-1, fsdp=-1), MeshConfig(tensor=0)]
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(mesh):
    with pytest.raises(InputError, match=r"config\.mesh: data="):
        sharding.make_mesh(mesh)


def test_minus_one_takes_the_remaining_devices():
    assert dict(sharding.make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


def test_an_indivisible_batch_is_refused():
    with pytest.raises(InputError, match=r"batch_size=12 is not divisible by the 8 devices"):
        sharding.batch_sharding(sharding.make_mesh(MeshConfig()), 12)
