"""The Llama family of models in Flax Linen, top to bottom: model, block, attention layer, MLP, norm.

Axes, one letter each over the whole repository:

    B batch      T tokens of this forward    S cache slots    D model    F mlp    V vocabulary    L layers
    N query heads    K key-value heads    G = N / K    H head dimension
    W nodes of a token tree, the root included    P depth of the tree

Contract: `forward` is a pure function. It attends to the committed prefix in the cache and to its own T tokens under
`mask`, and returns the new keys and values. `cache.commit` later writes those of the accepted tokens.

Parameters have two layouts. Training scans over the layers (one compiled block), so `layers` is a tree of stacked
[L, ...] arrays. Decoding unrolls them (`unstack_layers`), so that XLA never slices a stack inside the loop.
"""

import contextlib
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.sharding import Mesh
from jax.typing import DTypeLike

from msn_jax import cpu, masks, packed_attention, projections
from msn_jax.attention import Prefix, attend, num_committed_blocks
from msn_jax.block_attention import attend_blocks
from msn_jax.cache import KVCache, LayerKV
from msn_jax.config import LlamaConfig
from msn_jax.masks import Mask
from msn_jax.projections import LayerAdapter, Weight, multiply_all
from msn_jax.rope import Rope, rotary_angles, rotate

_HEAD = "head"
_LAYERS = "layers"


@struct.dataclass
class Output:
    """Result of one forward pass."""

    hidden: Array  # [B, T, D], after the final norm; `unembed` turns it into logits
    kv: tuple[LayerKV, ...]  # new keys and values [B, K, T, H] per layer; empty for stacked layers


def forward(
    params: dict,
    cfg: LlamaConfig,
    tokens: Array,
    positions: Array,
    mask: Mask,
    cache: KVCache | None = None,
    adapter: dict | None = None,
    gate: Array | None = None,
) -> Output:
    """Runs the model over T new tokens.

    Args:
      params: parameter tree, stacked layers (training, no cache) or unstacked ones (decoding).
      cfg: the model's shape and numerics.
      tokens: int32 [B, T].
      positions: int32 [B, T], within each sequence: below S + T, or below the model's context without a cache.
      mask: bool [B or 1, T, T], see `masks.py`; or `masks.Packed` for rows without cache.
      cache: the committed prefix; every query attends to all of it, or to its sliding window.
      adapter: LoRA factors `layer_i` of the adapted layers (`adapter.decode_layout`), with unstacked layers only.
      gate: bool [B or 1, T], the tokens at which the adapter is active; None: all. Elsewhere the result is that of the
        model alone, bit for bit.
    """
    if _LAYERS in params:
        hidden = Llama(cfg).apply({"params": params}, tokens, positions, mask)
        return Output(hidden, ())
    with _precision(cfg.dtype):
        longest = cfg.max_length if cache is None else cache.capacity + tokens.shape[1]
        x, rope, mask = _embed(params["embed"], cfg, tokens, positions, mask, longest)
        if cache is not None:
            visible = _visible(cfg, positions, cache)
            num_blocks = num_committed_blocks(cache.lengths, cache.capacity, tokens.shape[1])
        kv = []
        for i in range(cfg.n_layers):
            prefix = None if cache is None else Prefix(cache.layers[i], visible, num_blocks)
            name = f"layer_{i}"
            factors = None if adapter is None or name not in adapter else (adapter[name], gate)
            x, layer_kv = _block(cfg, params[name], x, rope, mask, prefix, factors)
            kv.append(layer_kv)
        return Output(RMSNorm(cfg).apply({"params": params["norm"]}, x), tuple(kv))


@functools.partial(jax.jit, static_argnames="cfg")
def _block(
    cfg: LlamaConfig,
    params: dict,
    x: Array,
    rope: Rope,
    mask: Mask,
    prefix: Prefix | None,
    adapter: LayerAdapter | None = None,
) -> tuple[Array, LayerKV]:
    """One layer. Its own jit, so that a program is traced for one layer and not for each of them; XLA inlines it."""
    return Block(cfg).apply({"params": params}, x, rope, mask, prefix, adapter)


def _embed(
    table: Array, cfg: LlamaConfig, tokens: Array, positions: Array, mask: Mask, longest: int
) -> tuple[Array, Rope, Mask]:
    """What all layers have in common: the embedded tokens, the rotary angles, and the mask with the sliding window."""
    if isinstance(mask, masks.Packed) and not packed_attention.attends_packed(tokens.shape[1], cfg.dtype):
        mask = masks.packed(mask.segment_ids)
    if cfg.sliding_window and not isinstance(mask, masks.Packed):
        own = positions[:, : mask.shape[-1]]  # of noise blocks, the first: all have the same distances
        mask = masks.window(mask, own, own, cfg.sliding_window)
    return table.astype(cfg.dtype)[tokens], rotary_angles(positions, cfg, longest), mask


def _visible(cfg: LlamaConfig, positions: Array, cache: KVCache) -> Array:
    """bool [B, 1 or T, S]: the slots that each query attends to."""
    visible = masks.committed(cache.lengths, cache.capacity)
    if not cfg.sliding_window:
        return visible
    slots = jnp.arange(cache.capacity, dtype=positions.dtype)[None, :]
    return masks.window(visible, positions, slots, cfg.sliding_window)


def unembed(params: dict, cfg: LlamaConfig, hidden: Array) -> Array:
    """float32 logits [..., V] of hidden states [..., D]."""
    with _precision(cfg.dtype):
        if _HEAD in params:
            return jnp.matmul(hidden, params[_HEAD].astype(cfg.dtype), preferred_element_type=jnp.float32)
        table = (params["embed"] if cfg.tie_embeddings else params["unembed"]).astype(cfg.dtype)
        if cpu.is_default_backend() and "layer_0" in params:
            return cpu.multiply_by_rows(hidden, table)
        return jnp.einsum("...D,VD->...V", hidden, table, preferred_element_type=jnp.float32)


def init(key: Array, cfg: LlamaConfig, stacked: bool = True) -> dict:
    """Random parameters in the training layout (`stacked`) or the decoding layout.

    Each is boxed with the names of its logical axes (`sharding.py`).
    """
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = Llama(cfg).init(key, tokens, tokens, jnp.ones((1, 1, 1), bool))["params"]
    return params if stacked else unstack_layers(params, cfg)


@functools.cache
def abstract(cfg: LlamaConfig, stacked: bool) -> dict:
    """The shapes, dtypes and logical axes of `init`'s parameters."""
    return jax.eval_shape(lambda: init(jax.random.key(0), cfg, stacked))


def unstack_layers(params: dict, cfg: LlamaConfig) -> dict:
    """Training layout -> decoding layout: `layers` becomes `layer_0` ... `layer_{L-1}`, and boxes lose that axis."""
    rest = {name: value for name, value in params.items() if name != _LAYERS}
    layers = nn.meta.remove_axis(params[_LAYERS], 0, {nn.PARTITION_NAME: _LAYERS})
    return rest | {f"layer_{i}": jax.tree.map(lambda stack, i=i: stack[i], layers) for i in range(cfg.n_layers)}


def decode_layout(params: dict, cfg: LlamaConfig, mesh: Mesh | None = None) -> dict:
    """Unstacked parameters as the default backend decodes fastest. On accelerators, these are the same.

    On a CPU, the weights of a large float32 model become rows (`projections.py`) unless they were read as rows. For
    other models, and on a mesh, `head` [D, V] replaces the unembedding [V, D]; a tied table is kept for the embedding.
    """
    if not cpu.is_default_backend():
        return params
    if decodes_from_rows(cfg, mesh):
        names = [f"layer_{i}" for i in range(cfg.n_layers)]
        return params | {name: projections.to_rows(params[name]) for name in names}
    table = params["embed"] if cfg.tie_embeddings else params["unembed"]
    return {name: value for name, value in params.items() if name != "unembed"} | {_HEAD: table.T}


def decodes_from_rows(cfg: LlamaConfig, mesh: Mesh | None = None) -> bool:
    """Whether `decode_layout` gives a model's weights as rows."""
    is_float32 = cfg.dtype == cfg.param_dtype == "float32"
    return mesh is None and is_float32 and cpu.decodes_from_rows(_param_bytes(cfg))


@functools.cache
def _param_bytes(cfg: LlamaConfig) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract(cfg, False)))


def forward_frozen(
    params: dict,
    cfg: LlamaConfig,
    tokens: Array,
    positions: Array,
    mask: Mask,
    prefix: Prefix | None = None,
    adapter: dict | None = None,
    *,
    remat: bool = True,
    unroll: int = 1,
) -> tuple[Array, LayerKV]:
    """A forward pass in the training layout, whose parameters get no gradient; only an adapter does.

    Args:
      params: stacked layers.
      cfg: the model.
      tokens: int32 [B, T].
      positions: int32 [B, T].
      mask: bool [B or 1, T, T], without prefix also `masks.Packed`; or [B or 1, L, L] for blocks of L tokens that
        attend to the prefix and to themselves.
      prefix: earlier keys and values, stacked [L, B, K, S, H] each, and their mask [B, T, S]; or None.
      adapter: stacked LoRA factors of the last layers (`adapter.py`), active at every token; or None.
      remat: recompute each layer's activations in the backward pass.
      unroll: layers per iteration of the layer scan.

    Returns:
      Hidden states [B, T, D] after the final norm, and all keys and values, [L, B, K, T, H] each.
    """

    def body(x: Array, layer: tuple) -> tuple[Array, LayerKV]:
        weights, kv, factors = layer
        layer_prefix = None if prefix is None else Prefix(kv, prefix.visible)
        return _block(cfg, weights, x, rope, mask, layer_prefix, None if factors is None else (factors, None))

    body = jax.checkpoint(body, prevent_cse=False) if remat else body
    count = 0 if adapter is None else len(jax.tree.leaves(adapter)[0])
    parts = [(0, cfg.n_layers - count, None), (cfg.n_layers - count, cfg.n_layers, adapter)]
    with _precision(cfg.dtype):
        params = jax.lax.stop_gradient(params)
        x, rope, mask = _embed(params["embed"], cfg, tokens, positions, mask, cfg.max_length)
        kv = []
        for start, end, factors in parts:
            if start < end:
                layers = jax.tree.map(lambda stack, s=start, e=end: stack[s:e], (params[_LAYERS], prefix and prefix.kv))
                x, new = jax.lax.scan(body, x, (*layers, factors), unroll=min(unroll, end - start))
                kv.append(new)
        hidden = RMSNorm(cfg).apply({"params": params["norm"]}, x)
    return hidden, jax.tree.map(lambda *stacks: jnp.concatenate(stacks), *kv)


class Llama(nn.Module):
    """Embedding, L blocks, final norm: the training layout, with all layers in one scan and no cache."""

    cfg: LlamaConfig
    remat: bool = True
    unroll: int = 1  # layers per iteration of the scan

    @nn.compact
    def __call__(self, tokens: Array, positions: Array, mask: Mask) -> Array:
        """Hidden states [B, T, D], after the final norm; arguments as in `forward`."""
        cfg = self.cfg
        with _precision(cfg.dtype):
            table = ((cfg.vocab_size, cfg.d_model), ("vocab", "embed"), nn.initializers.normal(cfg.d_model**-0.5))
            embed = projections.param(self, "embed", *table)
            if not cfg.tie_embeddings and self.is_initializing():
                projections.param(self, "unembed", *table)  # created here, used by `unembed`
            x, rope, mask = _embed(embed, cfg, tokens, positions, mask, cfg.max_length)
            return RMSNorm(cfg, name="norm")(self._scan_layers(x, rope, mask))

    def _scan_layers(self, x: Array, rope: Rope, mask: Mask) -> Array:
        def body(block: Block, x: Array, _: None) -> tuple[Array, None]:
            return block(x, rope, mask, None)[0], None  # training does not need the keys and values

        scan = nn.scan(
            nn.remat(body, prevent_cse=False) if self.remat else body,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.cfg.n_layers,
            unroll=self.unroll,
            metadata_params={nn.PARTITION_NAME: _LAYERS},
        )
        return scan(Block(self.cfg, name=_LAYERS), x, None)[0]


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    cfg: LlamaConfig

    @nn.compact
    def __call__(
        self, x: Array, rope: Rope, mask: Mask, prefix: Prefix | None, adapter: LayerAdapter | None = None
    ) -> tuple[Array, LayerKV]:
        """x [B, T, D] -> (x [B, T, D], new keys and values [B, K, T, H])."""
        attended, kv = Attention(self.cfg, name="attention")(
            RMSNorm(self.cfg, name="attention_norm")(x), rope, mask, prefix, adapter
        )
        x = x + attended
        return x + MLP(self.cfg, name="mlp")(RMSNorm(self.cfg, name="mlp_norm")(x), adapter), kv


class Attention(nn.Module):
    """Grouped-query attention over the committed prefix and the tokens of this forward."""

    cfg: LlamaConfig

    @nn.compact
    def __call__(
        self, x: Array, rope: Rope, mask: Mask, prefix: Prefix | None, adapter: LayerAdapter | None = None
    ) -> tuple[Array, LayerKV]:
        """x [B, T, D] -> (output [B, T, D], (keys, values) [B, K, T, H])."""
        cfg = self.cfg
        B, T, D = x.shape
        N, K, H = cfg.n_heads, cfg.n_kv_heads, cfg.head_dim
        kv_head = Weight((D, K, H), ("embed", "kv_heads", "head_dim"))
        weights = {"q": Weight((D, N, H), ("embed", "heads", "head_dim")), "k": kv_head, "v": kv_head}
        q, k, v = multiply_all(self, x, weights, adapter)
        if cfg.qkv_bias:
            q = q + Bias(cfg, (N, H), "heads", name="q_bias")()[None, None]
            k = k + Bias(cfg, (K, H), "kv_heads", name="k_bias")()[None, None]
            v = v + Bias(cfg, (K, H), "kv_heads", name="v_bias")()[None, None]
        if cfg.qk_norm:
            q, k = RMSNorm(cfg, name="q_norm")(q), RMSNorm(cfg, name="k_norm")(k)
        q = rotate(q, rope).reshape(B, T, K, N // K, H) * jnp.asarray(H**-0.5, q.dtype)
        k, v = rotate(k, rope).swapaxes(1, 2), v.swapaxes(1, 2)
        if isinstance(mask, masks.Packed):
            if prefix is not None:
                raise ValueError("masks.Packed: is for rows without a prefix")
            out = packed_attention.attend(q, (k, v), mask.segment_ids, cfg.sliding_window)
        else:
            out = (attend if mask.shape[-1] == T else attend_blocks)(q, (k, v), mask, prefix)
        out = out.reshape(B, T, N * H)
        weights = {"o": Weight((N, H, D), ("heads", "head_dim", "embed"), num_inputs=2, writes_residual=True)}
        return multiply_all(self, out, weights, adapter)[0], (k, v)


class Bias(nn.Module):
    """The bias of a projection, in the compute dtype: [heads, H]."""

    cfg: LlamaConfig
    shape: tuple[int, int]
    heads: str  # logical axis

    @nn.compact
    def __call__(self) -> Array:
        """[heads, H]."""
        bias = projections.param(self, "bias", self.shape, (self.heads, "head_dim"), nn.initializers.zeros)
        return bias.astype(self.cfg.dtype)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    cfg: LlamaConfig

    @nn.compact
    def __call__(self, x: Array, adapter: LayerAdapter | None = None) -> Array:
        """[B, T, D] -> [B, T, D]."""
        D, F = self.cfg.d_model, self.cfg.d_mlp
        inputs = Weight((D, F), ("embed", "mlp"))
        gate, up = multiply_all(self, x, {"gate": inputs, "up": inputs}, adapter)
        down = Weight((F, D), ("mlp", "embed"), writes_residual=True)
        return multiply_all(self, nn.silu(gate) * up, {"down": down}, adapter)[0]


class RMSNorm(nn.Module):
    """x / rms(x) * scale, in float32."""

    cfg: LlamaConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D or H] -> the same shape."""
        scale = projections.param(self, "scale", (x.shape[-1],), ("norm",), nn.initializers.ones)
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.cfg.norm_eps)
        scale = jnp.expand_dims(scale.astype(jnp.float32), tuple(range(x.ndim - 1)))
        return (x32 * scale).astype(x.dtype)


def _precision(dtype: DTypeLike) -> contextlib.AbstractContextManager:
    """Full float32 products for float32 models; the default on accelerators is lower."""
    if jnp.dtype(dtype) == jnp.float32:
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()
