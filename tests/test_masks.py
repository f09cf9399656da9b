"""Attention masks against matrices written out by hand."""

import jax.numpy as jnp
import numpy as np

from msn_jax import masks


def test_causal_mask_allows_self_and_past():
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    np.testing.assert_array_equal(masks.causal(4)[0], np.array(expected, bool))


def test_segment_mask_is_causal_within_a_segment_and_empty_across():
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(masks.packed(jnp.array([[1, 1, 2, 2]]))[0], np.array(expected, bool))


def test_padding_attends_only_to_padding_and_always_has_a_key():
    mask = np.asarray(masks.packed(jnp.array([[1, 1, 0, 0], [0, 0, 0, 0]])))
    assert mask.any(axis=-1).all()
    assert not mask[0, :2, 2:].any() and not mask[0, 2:, :2].any()


def test_tree_mask_allows_self_and_ancestors():
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    np.testing.assert_array_equal(masks.tree((-1, 0, 0, 1))[0], np.array(expected, bool))


def test_tree_mask_of_a_chain_is_causal():
    np.testing.assert_array_equal(masks.tree((-1, 0, 1, 2)), masks.causal(4))


def test_window_limits_causal_and_tree_masks():
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    positions = jnp.arange(4)[None]
    np.testing.assert_array_equal(masks.window(masks.causal(4), positions, positions, 2)[0], np.array(expected, bool))
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]
    positions = jnp.array([[5, 6, 6, 7]])
    np.testing.assert_array_equal(masks.window(masks.tree((-1, 0, 0, 1)), positions, positions, 2)[0], expected)


def test_window_limits_the_committed_prefix():
    visible = masks.committed(jnp.array([3, 1]), 4)
    np.testing.assert_array_equal(visible, [[[1, 1, 1, 0]], [[1, 0, 0, 0]]])
    windowed = masks.window(visible, jnp.array([[3, 4], [1, 2]]), jnp.arange(4)[None], 3)
    np.testing.assert_array_equal(windowed, [[[0, 1, 1, 0], [0, 0, 1, 0]], [[1, 0, 0, 0], [1, 0, 0, 0]]])
