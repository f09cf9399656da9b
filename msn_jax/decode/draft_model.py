"""Drafts by a smaller model with the same vocabulary: classic speculative decoding (arXiv 2211.17192), in our loop.

The small model keeps a cache of its own. Before every pass it says the next P tokens one after another, which fill the
draft table, so that any tree of the others works: its first choices make the chain, its next best ones the branches.
It chooses with the request's own random bits, as the large model will, so that samples agree as well as greedy texts.

One more token than needed is read, because after P right guesses that one, too, is part of the text. What the large
model does not accept is forgotten by setting the length back: slots beyond it are leftovers that nobody sees.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from msn_jax import cache as caches
from msn_jax import llama
from msn_jax.cache import KVCache
from msn_jax.config import LlamaConfig
from msn_jax.decode import prompts, verify
from msn_jax.decode.drafters import Drafter, fill_tree, top_tokens
from msn_jax.decode.loop import DecodeState
from msn_jax.decode.prompts import Prompt
from msn_jax.decode.tree import TokenTree
from msn_jax.decode.verify import Verified


@struct.dataclass
class SmallModel:
    """What the small model remembers between passes."""

    cache: KVCache  # of S slots, everything of the texts but their newest token


def drafter(tree: TokenTree, cfg: LlamaConfig) -> Drafter:
    """Drafts of a model of this shape; its parameters (decoding layout) are the `weights` of the loop."""
    return Drafter("draft_model", tree, _init, _propose, _update, _grow, cfg)


def _init(drafter: Drafter, weights: dict, prompt: Prompt) -> SmallModel:
    cache = caches.create(drafter.cfg, *prompt.tokens.shape)
    return SmallModel(prompts.read(weights, drafter.cfg, prompt.tokens, prompt.lengths, cache, prompt.chunk))


def _propose(drafter: Drafter, weights: dict, state: DecodeState) -> tuple[Array, SmallModel]:
    cfg, tree = drafter.cfg, drafter.tree
    batch_size = len(state.lengths)
    alone, only, one = jnp.ones((1, 1, 1), bool), jnp.zeros((batch_size, 1), jnp.int32), jnp.ones_like(state.lengths)

    def say(number: Array, carry: tuple[KVCache, Array, Array]) -> tuple[KVCache, Array, Array]:
        cache, token, rows = carry
        position = (state.lengths - 1 + number)[:, None]
        output = llama.forward(weights, cfg, token, position, alone, cache)
        scores = verify.scores(llama.unembed(weights, cfg, output.hidden), position, state.sampler)
        best = top_tokens(scores, tree.predictions)
        rows = rows.at[:, number].set(best[:, 0], mode="drop")  # behind the last place there is none to keep
        return caches.commit(cache, output.kv, only, one), best[:, :, 0], rows

    newest = jnp.take_along_axis(state.tokens, state.lengths[:, None] - 1, axis=1)
    rows = jnp.zeros((batch_size, tree.max_depth, tree.predictions), jnp.int32)
    cache, _, rows = jax.lax.fori_loop(0, tree.max_depth + 1, say, (state.draft.cache, newest, rows))
    return fill_tree(tree, rows, state.tokens, state.lengths, state.forward_passes + 1), SmallModel(cache)


def _update(drafter: Drafter, draft: SmallModel, verified: Verified, scores: Array) -> SmallModel:
    del scores
    before = draft.cache.lengths - (drafter.tree.max_depth + 1)
    return SmallModel(draft.cache.replace(lengths=before + verified.count))


def _grow(draft: SmallModel, capacity: int) -> SmallModel:
    return SmallModel(caches.resize(draft.cache, capacity))
