"""Attention of packed rows, without an array of all pairs of tokens in memory, neither forward nor backward.

On a TPU it is splash attention, a Pallas kernel that comes with JAX: it skips blocks of keys that no query of a block
attends to, and needs the memory of one block. Elsewhere XLA attends one chunk of queries at a time, and the backward
pass computes each chunk again. Both build their masks from the segment ids. Short rows on other platforms keep the
mask as an array, which is faster there (`attention.attend`).
"""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from msn_jax import attention, sharding, target
from msn_jax.cache import LayerKV

_LONG = 1024  # tokens of a row, from which on XLA attends in chunks
_CHUNK = 256  # queries
_BLOCK_SIZES = (512, 256, 128)  # of the kernel: the largest one that divides the row


def attends_packed(length: int, dtype: DTypeLike) -> bool:
    """Whether `attend` is the way to attend in rows of `length` tokens."""
    return _uses_kernel(length, dtype) or length >= _LONG


def attend(q: Array, own: LayerKV, segment_ids: Array, window: int, interpret: bool = False) -> Array:
    """Attention with the mask `masks.packed`, in a sliding window.

    Args:
      q: [B, T, K, G, H], rotated and scaled.
      own: keys and values, [B, K, T, H] each.
      segment_ids: int32 [B, T].
      window: in tokens; 0: none. Within a sample, positions differ by as much as places in the row.
      interpret: runs the kernel on any platform, slowly, for tests.

    Returns:
      [B, T, K, G, H].
    """
    if interpret or _uses_kernel(q.shape[1], q.dtype):
        return _on_mesh(functools.partial(_splash, window=window, interpret=interpret))(q, *own, segment_ids)
    return _in_chunks(q, own, segment_ids, window)


def _uses_kernel(length: int, dtype: DTypeLike) -> bool:
    is_supported = length % _BLOCK_SIZES[-1] == 0 and jnp.dtype(dtype) != jnp.float16  # Mosaic cannot load float16
    return target.platform() == "tpu" and is_supported


def _on_mesh(attend_local: Callable[..., Array]) -> Callable[..., Array]:
    """The function on every device's rows and heads: the compiler cannot divide a kernel by itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend_local
    rows, heads = ("batch",), ("batch", "kv_heads")
    specs = [("batch", "head_dim", "kv_heads"), heads, heads, rows]
    q, keys, values, segments = (sharding.partition_spec(axes, sharding.TRAIN_RULES) for axes in specs)
    # Pallas calls do not say over which axes their results vary.
    return jax.shard_map(attend_local, in_specs=(q, keys, values, segments), out_specs=q, check_vma=False)


def _splash(q: Array, keys: Array, values: Array, segment_ids: Array, window: int, interpret: bool) -> Array:
    # Here, because nothing but a TPU needs Pallas, and importing it takes 0.06 s.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_masks

    B, T, K, G, H = q.shape
    mask = splash_masks.LocalMask((T, T), (window - 1, 0), offset=0) if window else splash_masks.CausalMask((T, T))
    block = next(size for size in _BLOCK_SIZES if T % size == 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    kernel = splash.make_splash_mha(
        splash_masks.MultiHeadMask([mask] * (K * G)),
        block_sizes=splash.BlockSizes(**dict.fromkeys(names, block), use_fused_bwd_kernel=True),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    heads = q.transpose(0, 2, 3, 1, 4).reshape(B, K * G, T, H)
    out = jax.vmap(kernel)(heads, keys, values, splash.SegmentIds(segment_ids, segment_ids))
    return out.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4)


def _in_chunks(q: Array, own: LayerKV, segment_ids: Array, window: int) -> Array:
    """In XLA's own operations. A chunk reads the keys up to the end of its part of the row, about a quarter."""
    B, T = segment_ids.shape
    keys, values = own
    whole = T // _CHUNK * _CHUNK
    step = -(-whole // _CHUNK // attention.NUM_QUERY_BLOCKS) * _CHUNK
    ends = sorted({0, *range(step, whole, step or 1), whole, T})
    parts = []
    for start, end in itertools.pairwise(ends):
        visible = (keys[:, :, :end], values[:, :, :end])

        def one(first: Array, size: int, end: int = end, visible: LayerKV = visible) -> Array:
            queries, segments = (jax.lax.dynamic_slice_in_dim(x, first, size, axis=1) for x in (q, segment_ids))
            index = jnp.arange(end)[None, None, :]
            distance = first + jnp.arange(size)[None, :, None] - index
            mask = (segments[:, :, None] == segment_ids[:, None, :end]) & (distance >= 0)
            return attention.attend_masked(queries, visible, mask & (distance < window) if window else mask, None)

        size = min(_CHUNK, end - start)  # the rest of a row is smaller
        chunk = jax.checkpoint(functools.partial(one, size=size), prevent_cse=False)
        out = jax.lax.map(chunk, jnp.arange(start, end, size))  # [count, B, size, K, G, H]
        parts.append(out.swapaxes(0, 1).reshape(B, end - start, *q.shape[2:]))
    return jnp.concatenate(parts, axis=1)
