import jax.numpy as jnp
import numpy as np

from msn_jax import masks


def test_causal_sees_itself_and_the_past():
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    np.testing.assert_array_equal(masks.causal(4)[0], np.array(expected, bool))


def test_segments_are_causal_within_and_blind_across():
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    np.testing.assert_array_equal(masks.segments(jnp.array([[1, 1, 2, 2]]))[0], np.array(expected, bool))


def test_padding_never_lacks_a_key_and_no_sample_sees_it():
    mask = np.asarray(masks.segments(jnp.array([[1, 1, 0, 0], [0, 0, 0, 0]])))
    assert mask.any(axis=-1).all()
    assert not mask[0, :2, 2:].any() and not mask[0, 2:, :2].any()


def test_tree_sees_ancestors_only():
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]
    np.testing.assert_array_equal(masks.tree((-1, 0, 0, 1))[0], np.array(expected, bool))


def test_a_chain_is_a_causal_mask():
    np.testing.assert_array_equal(masks.tree((-1, 0, 1, 2)), masks.causal(4))


def test_window():
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    positions = jnp.arange(4)[None]
    np.testing.assert_array_equal(masks.window(masks.causal(4), positions, positions, 2)[0], np.array(expected, bool))
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]
    positions = jnp.array([[5, 6, 6, 7]])
    np.testing.assert_array_equal(masks.window(masks.tree((-1, 0, 0, 1)), positions, positions, 2)[0], expected)


def test_window_of_a_committed_prefix():
    visible = masks.committed(jnp.array([3, 1]), 4)
    np.testing.assert_array_equal(visible, [[[1, 1, 1, 0]], [[1, 0, 0, 0]]])
    windowed = masks.window(visible, jnp.array([[3, 4], [1, 2]]), jnp.arange(4)[None], 3)
    np.testing.assert_array_equal(windowed, [[[0, 1, 1, 0], [0, 0, 1, 0]], [[1, 0, 0, 0], [1, 0, 0, 0]]])
