"""Drafts from a smaller model with the same vocabulary: classic speculative decoding (arXiv 2211.17192) in our loop.

The small model has its own cache. Before every forward pass of the large model it predicts the next P tokens one by one
and fills the draft table, so any tree of the other drafters works: its top-1 tokens make the chain, its next best ones
the branches. It uses the request's own random bits, as the large model will, so drafts match samples as well as greedy
tokens.

The small model reads one more token than the draft needs, because after P accepted drafts that token is part of the
sequence, too. Rejected tokens are dropped by resetting the length of its cache.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from msn_jax import cache as caches
from msn_jax import llama
from msn_jax.cache import KVCache
from msn_jax.config import LlamaConfig
from msn_jax.decode import prefill, verify
from msn_jax.decode.drafters import Drafter, Proposal, fill_tree, top_k_tokens
from msn_jax.decode.loop import DecodeState
from msn_jax.decode.prefill import PromptBatch
from msn_jax.decode.tree import TokenTree
from msn_jax.decode.verify import Verified


@struct.dataclass
class SmallModel:
    """The small model's state between forward passes."""

    cache: KVCache  # S slots per row; holds all tokens of the sequence but the newest


def drafter(tree: TokenTree, cfg: LlamaConfig) -> Drafter:
    """A drafter with a small model of config `cfg`; its parameters are the loop's `drafter_params`."""
    return Drafter("draft_model", tree, _init, _propose, _update, _grow, cfg)


def _init(drafter: Drafter, drafter_params: dict, prompt: PromptBatch) -> SmallModel:
    cache = caches.create(drafter.cfg, *prompt.tokens.shape)
    cache = prefill.fill_cache(drafter_params, drafter.cfg, prompt.tokens, prompt.lengths, cache, prompt.chunk)
    return SmallModel(cache)


def _propose(drafter: Drafter, drafter_params: dict, state: DecodeState) -> tuple[Proposal, SmallModel]:
    cfg, tree = drafter.cfg, drafter.tree
    batch_size = len(state.lengths)
    mask, path, count = jnp.ones((1, 1, 1), bool), jnp.zeros((batch_size, 1), jnp.int32), jnp.ones_like(state.lengths)

    def predict(number: Array, carry: tuple[KVCache, Array, Array]) -> tuple[KVCache, Array, Array]:
        cache, token, rows = carry
        position = (state.lengths - 1 + number)[:, None]
        output = llama.forward(drafter_params, cfg, token, position, mask, cache)
        logits = llama.unembed(drafter_params, cfg, output.hidden)
        top = top_k_tokens(verify.perturb_logits(logits, position, state.sampler), tree.num_predictions)
        rows = rows.at[:, number].set(top[:, 0], mode="drop")  # the last prediction is beyond the table
        return caches.commit(cache, output.kv, path, count), top[:, :, 0], rows

    newest = jnp.take_along_axis(state.tokens, state.lengths[:, None] - 1, axis=1)
    rows = jnp.zeros((batch_size, tree.max_depth, tree.num_predictions), jnp.int32)
    cache, _, rows = jax.lax.fori_loop(0, tree.max_depth + 1, predict, (state.draft.cache, newest, rows))
    return fill_tree(tree, rows, state.tokens, state.lengths, state.forward_passes + 1), SmallModel(cache)


def _update(drafter: Drafter, draft: SmallModel, verified: Verified, top: Array) -> SmallModel:
    del top
    before = draft.cache.lengths - (drafter.tree.max_depth + 1)
    return SmallModel(draft.cache.replace(lengths=before + verified.num_emitted))


def _grow(draft: SmallModel, capacity: int) -> SmallModel:
    return SmallModel(caches.resize(draft.cache, capacity))
