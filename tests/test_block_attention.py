"""Attention of noise blocks equals attention over all block tokens under the mask of the blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msn_jax import masks
from msn_jax.attention import Prefix, attend
from msn_jax.block_attention import attend_blocks

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize(("count", "length"), [(6, 1), (5, 3)])
def test_values_and_gradients_equal_those_of_one_large_mask(count, length):
    rng, tokens = np.random.default_rng(0), count * length
    shapes = [(2, tokens, 2, 3, 8), *[(2, 2, tokens, 8)] * 2, *[(2, 2, 9, 8)] * 2]
    q, k, v, *row = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    visible = jnp.asarray(rng.random((2, tokens, 9)) < 0.5).at[:, :length].set(False)  # the first block sees no row
    weights = jnp.asarray(rng.normal(size=q.shape), jnp.float32)

    def with_gradients(attention, mask):
        def total(q, k, v):
            out = attention(q, (k, v), mask, Prefix(tuple(row), visible))
            return jnp.sum(out * weights), out

        (_, out), gradients = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, gradients

    ours = with_gradients(attend_blocks, masks.causal(length))
    expected = with_gradients(attend, masks.within_blocks(tokens, length))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-5), ours, expected)
