"""The model against a NumPy reference, and its layouts (stacked, cached, with a head) against each other."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_params

from msn_jax import cache as caches
from msn_jax import cpu, llama, masks, projections, sharding
from msn_jax.attention import Prefix, attend, attend_masked, num_committed_blocks
from msn_jax.config import LlamaConfig, MeshConfig
from msn_jax.rope import inverse_frequencies, rotary_angles

pytestmark = pytest.mark.usefixtures("quick_compilation")

# No value is a common default, so that a default that replaces a setting makes a test fail.
CFG = LlamaConfig(
    vocab_size=37,
    d_model=24,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=6,
    d_mlp=40,
    max_length=64,
    rope_theta=123.0,
    rope_scaling="none",
    sliding_window=0,
    norm_eps=2e-2,
    qkv_bias=False,
    qk_norm=False,
    tie_embeddings=True,
    dtype="float32",
    param_dtype="float32",
)
# Every feature that only some model families have; the window is shorter than the sequences.
ALL_FEATURES = dataclasses.replace(
    CFG,
    rope_scaling="llama3",
    rope_factor=4.0,
    rope_low_frequency_factor=1.2,
    rope_high_frequency_factor=3.0,
    rope_original_length=16,
    sliding_window=3,
    qkv_bias=True,
    qk_norm=True,
    tie_embeddings=False,
)
BOTH = pytest.mark.parametrize("cfg", [CFG, ALL_FEATURES], ids=["plain", "all features"])
T = 9


@functools.partial(jax.jit, static_argnums=1)
def logits_of(params, cfg, tokens, positions, mask, cache=None):
    output = llama.forward(params, cfg, tokens, positions, mask, cache)
    return llama.unembed(params, cfg, output.hidden), output.kv


def inputs(batch_size=2, length=T, seed=0):
    tokens = np.random.default_rng(seed).integers(0, CFG.vocab_size, (batch_size, length), np.int32)
    return tokens, np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)


# --- Against plain NumPy


def numpy_norm(x, scale, eps):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * scale


def numpy_wavelength(h, cfg):
    """Positions per turn of pair h: 2 pi theta ** (2h / H), scaled linearly or as for Llama 3."""
    wavelength = 2 * np.pi * cfg.rope_theta ** (2 * h / cfg.head_dim)
    if cfg.rope_scaling == "none":
        return wavelength
    turns = cfg.rope_original_length / wavelength
    low, high = cfg.rope_low_frequency_factor, cfg.rope_high_frequency_factor
    if cfg.rope_scaling == "linear" or turns <= low:
        return wavelength * cfg.rope_factor
    kept = min((turns - low) / (high - low), 1)
    return 1 / ((1 - kept) / (wavelength * cfg.rope_factor) + kept / wavelength)


def numpy_rotate(x, position, cfg):
    """x [heads, H] of the token at `position`: rotates the pairs (h, h + H/2) by their wavelengths."""
    half = x.shape[-1] // 2
    out = np.empty_like(x)
    for h in range(half):
        angle = 2 * np.pi * position / numpy_wavelength(h, cfg)
        out[:, h] = x[:, h] * np.cos(angle) - x[:, h + half] * np.sin(angle)
        out[:, h + half] = x[:, h + half] * np.cos(angle) + x[:, h] * np.sin(angle)
    return out


def numpy_attention(p, x, positions, mask, cfg):
    q, k, v = (np.einsum("td,dnh->tnh", x, p[name]) for name in "qkv")
    if cfg.qkv_bias:
        q, k, v = (value + p[f"{name}_bias"]["bias"] for name, value in (("q", q), ("k", k), ("v", v)))
    if cfg.qk_norm:
        q, k = (numpy_norm(value, p[f"{name}_norm"]["scale"], cfg.norm_eps) for name, value in (("q", q), ("k", k)))
    q, k = (np.stack([numpy_rotate(t, i, cfg) for t, i in zip(value, positions, strict=True)]) for value in (q, k))
    if cfg.sliding_window:
        mask = mask & (positions[:, None] - positions[None, :] < cfg.sliding_window)
    out = np.zeros_like(q)
    for n in range(cfg.n_heads):
        shared = n // (cfg.n_heads // cfg.n_kv_heads)
        for t in range(len(x)):
            scores = np.where(mask[t], k[:, shared] @ q[t, n] / np.sqrt(cfg.head_dim), -np.inf)
            weights = np.exp(scores - scores.max())
            out[t, n] = weights / weights.sum() @ v[:, shared]
    return np.einsum("tnh,nhd->td", out, p["o"])


def numpy_llama(params, cfg, tokens, positions, mask):
    """Logits [T, V] of one row in float64, from the equations of the papers."""
    params = jax.tree.map(lambda value: np.asarray(value, np.float64), params)
    x = params["embed"][tokens]
    for i in range(cfg.n_layers):
        layer = jax.tree.map(lambda stack, i=i: stack[i], params["layers"])
        normed = numpy_norm(x, layer["attention_norm"]["scale"], cfg.norm_eps)
        x = x + numpy_attention(layer["attention"], normed, positions, mask, cfg)
        normed = numpy_norm(x, layer["mlp_norm"]["scale"], cfg.norm_eps)
        gate, up = normed @ layer["mlp"]["gate"], normed @ layer["mlp"]["up"]
        x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp"]["down"]
    table = params["embed"] if cfg.tie_embeddings else params["unembed"]
    return numpy_norm(x, params["norm"]["scale"], cfg.norm_eps) @ table.T


@pytest.mark.parametrize(
    ("base", "kv_heads", "tied", "spread"), [(CFG, 1, True, 3), (CFG, 4, False, 3), (ALL_FEATURES, 2, True, 1)]
)
def test_logits_equal_a_numpy_reference(base, kv_heads, tied, spread):
    cfg = dataclasses.replace(base, n_kv_heads=kv_heads, tie_embeddings=tied)
    params, (tokens, positions) = random_params.stacked(cfg), inputs()
    positions = positions * spread + 1
    logits, _ = logits_of(params, cfg, tokens, positions, masks.causal(T))
    for b in range(2):
        expected = numpy_llama(params, cfg, tokens[b], positions[b], np.asarray(masks.causal(T)[0]))
        np.testing.assert_allclose(logits[b], expected, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("scaling", ["none", "linear", "llama3"])
def test_rope_frequencies_equal_a_numpy_reference(scaling):
    cfg = dataclasses.replace(
        ALL_FEATURES, rope_scaling=scaling, head_dim=32, rope_theta=77.0, rope_original_length=200
    )
    expected = [2 * np.pi / numpy_wavelength(h, cfg) for h in range(16)]
    np.testing.assert_allclose(inverse_frequencies(cfg), expected, rtol=1e-6)
    if scaling == "llama3":  # all three frequency ranges occur
        ratio = np.array(expected) * 77.0 ** (np.arange(16) / 16)
        assert (ratio == ratio.max()).sum() > 1 and (abs(ratio - ratio.min()) < 1e-9).sum() > 1
        assert ((ratio > ratio.min() + 1e-3) & (ratio < ratio.max() - 1e-3)).any()


@pytest.mark.parametrize(("dtype", "highest"), [("float32", True), ("bfloat16", False)])
def test_float32_models_use_the_highest_matmul_precision(dtype, highest):
    cfg = dataclasses.replace(CFG, dtype=dtype)
    params, (tokens, positions) = random_params.stacked(cfg), inputs()

    def logits(params):
        return logits_of(params, cfg, tokens, positions, masks.causal(T))[0]

    for program in (logits, jax.grad(lambda params: logits(params).sum())):
        text = str(jax.make_jaxpr(program)(params))
        products = text.count("dot_general[")
        assert products >= 10 and text.count("HIGHEST") == (2 * products if highest else 0)


# --- Attention


def test_attention_is_causal_by_gradient():
    params, (tokens, positions) = random_params.stacked(CFG), inputs(1)
    model = llama.Llama(CFG)

    def hidden_of_all(embed):
        """Every position has its own row of `embed`, so the gradient shows which keys a query attends to."""
        return model.apply({"params": params | {"embed": embed}}, jnp.arange(T)[None], positions, masks.causal(T))

    rows = params["embed"][tokens[0]]
    table = jnp.concatenate([rows, jnp.zeros((CFG.vocab_size - T, CFG.d_model))])
    jacobian = jax.jit(jax.jacrev(lambda embed: hidden_of_all(embed)[0].sum(-1)))(table)
    influence = np.abs(jacobian[:, :T]).sum(-1)  # [query, key]
    np.testing.assert_array_equal(influence > 0, np.tril(np.ones((T, T), bool)))


@BOTH
def test_packed_samples_equal_separate_ones(cfg):
    params, (tokens, _) = random_params.stacked(cfg), inputs(1)
    segment_ids = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]], np.int32)
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 0]], np.int32)
    packed, _ = logits_of(params, cfg, tokens, positions, masks.packed(segment_ids))
    alone, _ = logits_of(params, cfg, tokens[:, 4:7], positions[:, 4:7], masks.causal(3))
    np.testing.assert_allclose(packed[:, 4:7], alone, atol=1e-5)
    other = tokens.copy()
    other[0, :4] = 0
    changed, _ = logits_of(params, cfg, other, positions, masks.packed(segment_ids))
    np.testing.assert_array_equal(packed[:, 4:7], changed[:, 4:7])
    assert np.isfinite(packed).all()


@BOTH
def test_tree_node_logits_equal_those_of_the_path_alone(cfg):
    params = llama.unstack_layers(random_params.stacked(cfg), cfg)
    prefix, positions = inputs(1, 5, seed=1)
    cache = caches.create(cfg, 1, 32)
    _, kv = logits_of(params, cfg, prefix, positions, masks.causal(5), cache)
    cache = caches.commit(cache, kv, jnp.arange(5)[None], jnp.array([5]))
    parents, depth = (-1, 0, 0, 1, 1, 2, 3), np.array([0, 1, 1, 2, 2, 2, 3])  # deeper than the window, and wider
    nodes = np.random.default_rng(2).integers(0, cfg.vocab_size, (1, 7), np.int32)
    tree, _ = logits_of(params, cfg, nodes, (5 + depth)[None].astype(np.int32), masks.tree(parents), cache)
    for node in range(7):
        path = [node]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        sequence = np.concatenate([prefix, nodes[:, path]], axis=1)
        steps = np.arange(sequence.shape[1], dtype=np.int32)[None]
        alone, _ = logits_of(random_params.stacked(cfg), cfg, sequence, steps, masks.causal(sequence.shape[1]))
        np.testing.assert_allclose(tree[0, node], alone[0, -1], atol=2e-5)


# --- One model in several layouts


def test_the_sliding_window_by_gradient():
    cfg = dataclasses.replace(ALL_FEATURES, n_layers=1)  # a second layer would look back twice as far
    params, (tokens, positions) = random_params.stacked(cfg), inputs(1)
    x = params["embed"][tokens]
    layer = jax.tree.map(lambda stack: stack[0], params["layers"])
    mask = masks.window(masks.causal(T), positions, positions, cfg.sliding_window)
    rope = rotary_angles(jnp.asarray(positions), cfg, T)
    block = lambda x: llama.Block(cfg).apply({"params": layer}, x, rope, mask, None)[0][0].sum(-1)  # noqa: E731
    influence = np.abs(jax.jit(jax.jacrev(block))(x)[:, 0]).sum(-1)  # [query, key]
    distance = np.arange(T)[:, None] - np.arange(T)[None, :]
    np.testing.assert_array_equal(influence > 0, (distance >= 0) & (distance < 3))


@BOTH
def test_stacked_layers_equal_unstacked_ones(cfg):
    params, (tokens, positions) = random_params.stacked(cfg), inputs()
    stacked, kv = logits_of(params, cfg, tokens, positions, masks.causal(T))
    assert kv == ()
    unstacked, _ = logits_of(llama.unstack_layers(params, cfg), cfg, tokens, positions, masks.causal(T))
    np.testing.assert_allclose(stacked, unstacked, atol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2)])
def test_matmul_with_weights_has_the_gradient_of_matmul(dtype, tolerance):
    x, weight, cotangent = (
        jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate([(2, 5, 6), (6, 3), (2, 5, 3)])
    )
    ours, theirs = (jax.vjp(product, x, weight) for product in (projections._multiply, jnp.matmul))
    np.testing.assert_array_equal(ours[0], theirs[0])
    for gradient, expected in zip(ours[1](cotangent), theirs[1](cotangent), strict=True):
        assert gradient.dtype == expected.dtype == dtype
        np.testing.assert_allclose(gradient.astype(float), expected.astype(float), rtol=tolerance, atol=tolerance)


def test_remat_changes_no_gradient():
    params, (tokens, positions) = random_params.stacked(CFG), inputs()

    def gradient(remat):
        model = llama.Llama(CFG, remat=remat)
        loss = lambda params: (  # noqa: E731
            model.apply({"params": params}, tokens, positions, masks.causal(T)) ** 2
        ).sum()
        compiled = jax.jit(jax.grad(loss))
        return compiled(params), str(jax.make_jaxpr(jax.grad(loss))(params))

    (with_remat, with_text), (without, without_text) = gradient(True), gradient(False)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), with_remat, without)
    assert "remat" in with_text or "checkpoint" in with_text
    assert "remat" not in without_text and "checkpoint" not in without_text


@pytest.mark.parametrize("unroll", [3, 5])
def test_unrolled_layers_equal_the_scan(unroll):
    params, (tokens, positions) = random_params.stacked(CFG), inputs()

    def hidden(unroll):
        model = llama.Llama(CFG, unroll=unroll)
        lowered = jax.jit(model.apply).lower({"params": params}, tokens, positions, masks.causal(T))
        return lowered.compile()({"params": params}, tokens, positions, masks.causal(T)), lowered.as_text()

    (scanned, scanned_text), (unrolled, unrolled_text) = hidden(1), hidden(unroll)
    np.testing.assert_allclose(unrolled, scanned, atol=1e-5)
    assert "stablehlo.while" in scanned_text and "stablehlo.while" not in unrolled_text


@BOTH
def test_decode_layout_gives_the_same_logits(cfg):
    params, (tokens, positions) = llama.unstack_layers(random_params.stacked(cfg), cfg), inputs()
    params_for_decoding = llama.decode_layout(params, cfg)
    assert ("unembed" in params, "unembed" in params_for_decoding, "head" in params_for_decoding) == (
        not cfg.tie_embeddings,
        False,
        True,
    )
    expected, _ = logits_of(params, cfg, tokens, positions, masks.causal(T))
    logits, _ = logits_of(params_for_decoding, cfg, tokens, positions, masks.causal(T))
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@BOTH
@pytest.mark.parametrize("num_tokens", [1, T])
def test_large_weights_decode_from_rows_on_a_cpu(num_tokens, cfg, monkeypatch):
    params, (tokens, positions) = llama.unstack_layers(random_params.stacked(cfg), cfg), inputs()
    arguments = tokens[:, :num_tokens], positions[:, :num_tokens], masks.causal(num_tokens)
    expected, _ = logits_of(params, cfg, *arguments)
    monkeypatch.setattr(cpu, "_CACHE_BYTES", 0)
    rows = llama.decode_layout(params, cfg)
    assert rows["layer_0"]["attention"]["rows_q_k_v"].shape == (
        (cfg.n_heads + 2 * cfg.n_kv_heads) * cfg.head_dim,
        cfg.d_model,
    )
    assert rows["layer_1"]["mlp"]["rows_gate_up"].shape == (2 * cfg.d_mlp, cfg.d_model)
    assert "q" not in rows["layer_0"]["attention"] and params["layer_0"]["attention"]["q"].is_deleted()
    logits, _ = logits_of(rows, cfg, *arguments)
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize(
    "limit, dtype, param_dtype, on_mesh",
    [
        (1 << 40, "float32", "float32", False),
        (0, "bfloat16", "bfloat16", False),
        (0, "bfloat16", "float32", False),
        (0, "float32", "float32", True),
    ],
)
def test_rows_are_for_large_float32_weights_on_one_device(limit, dtype, param_dtype, on_mesh, monkeypatch):
    cfg = dataclasses.replace(CFG, dtype=dtype, param_dtype=param_dtype)
    params = llama.unstack_layers(random_params.stacked(cfg), cfg)
    monkeypatch.setattr(cpu, "_CACHE_BYTES", limit)
    mesh = sharding.make_mesh(MeshConfig()) if on_mesh else None
    assert "q" in llama.decode_layout(params, cfg, mesh)["layer_0"]["attention"]


def test_positions_beyond_the_rope_table_are_nan():
    cos, sin = rotary_angles(jnp.array([[0, 4, 5]]), CFG, 5)
    assert np.isfinite(cos[0, :2]).all() and np.isfinite(sin[0, :2]).all()
    assert np.isnan(cos[0, 2]).all() and np.isnan(sin[0, 2]).all()


@BOTH
@pytest.mark.parametrize("lengths", [(4, 5), (1, 1, 3, 4)])
def test_forward_with_a_cache_equals_without(lengths, cfg):
    params, (tokens, positions) = llama.unstack_layers(random_params.stacked(cfg), cfg), inputs()
    expected, _ = logits_of(params, cfg, tokens, positions, masks.causal(T))
    cache, at, parts = caches.create(cfg, 2, 16), 0, []
    for length in lengths:
        part = slice(at, at + length)
        logits, kv = logits_of(params, cfg, tokens[:, part], positions[:, part], masks.causal(length), cache)
        cache = caches.commit(
            cache, kv, jnp.broadcast_to(jnp.arange(length), (2, length)), jnp.full((2,), length, jnp.int32)
        )
        parts.append(logits)
        at += length
    np.testing.assert_allclose(np.concatenate(parts, axis=1), expected, atol=2e-5)


def test_attention_in_blocks_of_queries_equals_attention_over_all_queries():
    rng, length = np.random.default_rng(0), 259
    q, k, v = (rng.normal(size=shape).astype(np.float32) for shape in ((2, length, 2, 2, 6), *[(2, 2, length, 6)] * 2))
    mask = masks.packed(np.sort(rng.integers(0, 4, (2, length))))
    np.testing.assert_allclose(attend(q, (k, v), mask, None), attend_masked(q, (k, v), mask, None), atol=1e-6)


@pytest.mark.parametrize("lengths", [[0, 0], [1, 300], [256, 512], [700, 3]])
def test_attention_to_the_committed_blocks_equals_attention_to_all_slots(monkeypatch, lengths):
    monkeypatch.setattr(cpu, "reads_prefix_by_blocks", lambda *_: True)
    rng, slots, queries = np.random.default_rng(0), 768, 3
    shapes = ((2, queries, 2, 2, 6), *[(2, 2, queries, 6)] * 2, *[(2, 2, slots, 6)] * 2)
    q, k, v, prefix_k, prefix_v = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    mask, visible = masks.causal(queries), masks.committed(jnp.array(lengths), slots)
    num_blocks = num_committed_blocks(jnp.array(lengths), slots, queries)
    assert num_blocks == -(-max(lengths) // 256)
    expected = attend(q, (k, v), mask, Prefix((prefix_k, prefix_v), visible))
    # Beyond the committed blocks, nothing may be read.
    end = 256 * int(num_blocks)
    prefix_k[:, :, end:] = prefix_v[:, :, end:] = np.nan
    got = attend(q, (k, v), mask, Prefix((prefix_k, prefix_v), visible, num_blocks))
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_dtype_of_computation_and_dtype_of_parameters_are_separate():
    cfg = dataclasses.replace(CFG, dtype="bfloat16", param_dtype="float32")
    params, (tokens, positions) = random_params.stacked(cfg), inputs()
    assert {value.dtype for value in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    unstacked = llama.unstack_layers(params, cfg)
    output = llama.forward(unstacked, cfg, tokens, positions, masks.causal(T), caches.create(cfg, 2, 16))
    assert output.hidden.dtype == jnp.bfloat16
    assert {value.dtype for value in jax.tree.leaves(output.kv)} == {jnp.dtype("bfloat16")}
    logits = llama.unembed(params, cfg, output.hidden)
    assert logits.dtype == jnp.float32
    expected, _ = logits_of(random_params.stacked(CFG), CFG, tokens, positions, masks.causal(T))
    np.testing.assert_allclose(logits, expected, atol=0.1)
    half = dataclasses.replace(CFG, dtype="bfloat16", param_dtype="bfloat16")
    assert {value.dtype for value in jax.tree.leaves(random_params.stacked(half))} == {jnp.dtype("bfloat16")}
