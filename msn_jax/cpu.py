"""What XLA:CPU needs to run at full speed, in one place; accelerators do without. Measurements: dev/LOG.md.

Nothing here changes a result by more than rounding. On accelerators `order_writes` does nothing, and the
other functions compile to what the plain JAX expression would.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from msn_jax import target

# Tokens of a prompt per forward pass: attention scores of more tokens leave the second-level cache.
_PREFILL_CHUNK = 64
_LARGEST_PREFILL_CHUNK = 256

# The XLA:CPU runtime runs at most this many ready kernels on their own thread and hands half of any more to another
# one, however small they are. For the cache writes of a small model that cost 10% to 33% of a forward pass.
_MAX_CONCURRENT_WRITES = 8

# Weights of more bytes do not stay in the caches between two forward passes.
_CACHE_BYTES = 64 * 2**20


# Slots that attention reads at a time: the scores of a chunk and one block stay in the second-level cache.
PREFIX_BLOCK = 256


def is_default_backend() -> bool:
    """Whether programs compile for the CPU."""
    return target.platform() == "cpu"


def argmax(x: Array) -> Array:
    """int32 [...]: the first argmax over the last axis of [..., V]; V, which is no index, if x has NaN or +inf.

    Two reductions instead of one, because XLA:CPU does not vectorize a reduction that carries value and index.
    """
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    maximum = jnp.max(x, axis=-1, keepdims=True)
    is_max = x == jnp.where(maximum < jnp.inf, maximum, jnp.nan)
    return jnp.min(jnp.where(is_max, index, x.shape[-1]), axis=-1)


def order_after(done: Array, start: Array) -> Array:
    """`start`, int32 [B], computed only after `done`, [B] and at least 0. It adds 0, which XLA cannot see."""
    return start + jnp.minimum(done.astype(jnp.int32), 0)


def order_writes(written: list[Array], start: Array) -> Array:
    """`start` for the next cache write: every eighth one waits for the write before it (`_MAX_CONCURRENT_WRITES`).

    Args:
      written: caches [B, K, S, H] written so far.
      start: int32 [B], slots where the next write begins.
    """
    if not written or len(written) % _MAX_CONCURRENT_WRITES or not is_default_backend():
        return start
    return order_after(written[-1][:, 0, 0, 0] == 0, start)  # the comparison is 0 or 1, also for NaN


def prefill_chunk(slots: int, batch_size: int, is_large: bool) -> int:
    """Tokens of a prompt per forward pass, for prompts padded to `slots` tokens, a power of two.

    A large model, whose weights leave the caches, reads them less often if the chunks of a long prompt are larger: its
    prefill of one prompt of more than 256 tokens takes 0.80 to 0.86 of the time. Several prompts share that reading
    anyway, and their attention scores need memory.
    """
    if not is_large:
        return _PREFILL_CHUNK
    largest = max(_LARGEST_PREFILL_CHUNK // batch_size, 1)
    return max(_PREFILL_CHUNK, min(slots // 4, 1 << (largest.bit_length() - 1)))


def reads_prefix_by_blocks(capacity: int, tokens: int) -> bool:
    """Whether attention of `tokens` tokens reads only the committed blocks of a cache of `capacity` slots, in a loop.

    That saves half of the attention in the prefill of a long prompt. For few tokens, as in decoding, the slots cost
    less than the loop.
    """
    return is_default_backend() and capacity > PREFIX_BLOCK and tokens >= _PREFILL_CHUNK


def decodes_from_rows(param_bytes: int) -> bool:
    """Whether decoding in float32 is faster with weights [out, in] (`projections.py`): on a CPU, beyond its caches.

    Then a product with 8 tokens takes 0.8 of the time of `x @ w`, with one token the same, but with two 1.2 times as
    long. Joining the weights of one input makes a forward pass over one token 8% faster. Weights in the caches are
    faster as they are.
    """
    return is_default_backend() and param_bytes > _CACHE_BYTES


def multiply_by_rows(x: Array, weight: Array) -> Array:
    """x [..., I] times the transpose of a weight [O, I] -> [..., O], float32."""
    flat = x.reshape(-1, x.shape[-1])
    # Not `x @ weight.T`, for which XLA:CPU transposes the weight in every forward pass over more than one token.
    product = jnp.matmul(weight, flat.T, preferred_element_type=jnp.float32)
    return product.T.reshape(*x.shape[:-1], len(weight))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: Array, weight: Array, precision: str | None) -> Array:
    """[B, T, I] times [I, O] -> [B, T, O]. Reverse mode only; both operands have one dtype.

    Its own derivative avoids that of `@`: the weight gradient as an [O, I] product that is transposed afterwards, for
    which XLA:CPU transposes the larger of the activations and multiplies at half speed, a quarter of a training step.
    """
    return jnp.matmul(x, weight, precision=precision)


def _matmul_forward(x: Array, weight: Array, precision: str | None) -> tuple[Array, tuple[Array, Array]]:
    return matmul(x, weight, precision), (x, weight)


def _matmul_backward(precision: str | None, saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, weight = saved
    x_gradient = jnp.matmul(gradient, weight.T, precision=precision)
    return x_gradient, jnp.einsum("BTI,BTO->IO", x, gradient, precision=precision)


matmul.defvjp(_matmul_forward, _matmul_backward)
