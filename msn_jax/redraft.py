"""Noise blocks that hold the model's own drafts (`config.noise.kind` 'drafts').

In Jacobi decoding the wrong tokens before a prediction are not random: they are predictions of the pass before, after
other wrong tokens. A block of kind 'drafts' has such tokens. It first holds other noise, the model predicts once
without gradients, and its predictions replace the noise; then it is trained like any other block:

    offset             1   2   3
    clean tokens       w   *   h
    first noise        (   w   :
    predictions        *   b       after the first noise at offsets 1 and 2, for the places of offsets 2 and 3
    drafts             (   *   b   the block's tokens in the training
    labels             *   h   <eos>

The prediction at offset i is for the next token, so it becomes the draft at offset i + 1. The block stays where it is;
in decoding, the verified text grows by at least the bonus token from pass to pass, and the same prediction is the draft
at offset i behind the longer text. The token at offset 1 has no predecessor in the block and stays: the prediction
after the clean token before it would be the bonus token, which is verified and no draft.

Drafts can be right, as in decoding; then the next prediction is conditioned on correct context.
"""

import jax
import jax.numpy as jnp
from jax import Array

from msn_jax import llama, losses
from msn_jax.config import Config
from msn_jax.noise import TrainingInputs


def redraft(params: dict, cfg: Config, hidden: Array, tokens: Array, drafted: Array) -> Array:
    """The tokens of noise blocks after one Jacobi iteration, int32 [B, M, L].

    Args:
      params: holds the unembedding.
      cfg: static.
      hidden: [B, M * L, D], the hidden states after the first noise.
      tokens: int32 [B, M, L], the first noise.
      drafted: bool [B, M]; the other blocks keep their noise.
    """
    B, M, L = tokens.shape
    before = hidden.reshape(B, M, L, -1)[:, :, :-1].reshape(B, M * (L - 1), -1)  # nothing follows the last token

    def predict(states: Array) -> Array:
        return jnp.argmax(llama.unembed(params, cfg.model, states), axis=-1).astype(jnp.int32)

    drafts = losses.map_chunks(predict, before, cfg.train.loss_chunk, remat=False).reshape(B, M, L - 1)
    following = jnp.where(drafted[:, :, None], drafts, tokens[:, :, 1:])
    return jnp.concatenate([tokens[:, :, :1], following], axis=2)


def redraft_inputs(params: dict, cfg: Config, inputs: TrainingInputs, adapter: dict | None = None) -> TrainingInputs:
    """The inputs with drafts in the appended blocks that are to have them; the inputs themselves if none are.

    It costs a forward pass over row and blocks, without gradients. Arguments as in `losses.token_losses`.
    """
    if inputs.drafted is None:
        return inputs
    E = inputs.drafted.shape[1] * cfg.noise.length
    row, blocks = inputs.input_tokens[:, :-E], inputs.input_tokens[:, -E:]
    params, adapter = jax.lax.stop_gradient((params, adapter))
    hidden = losses.hidden_states(params, cfg, inputs, adapter)[:, -E:]
    tokens = redraft(params, cfg, hidden, blocks.reshape(*inputs.drafted.shape, -1), inputs.drafted)
    return inputs.replace(input_tokens=jnp.concatenate([row, tokens.reshape(blocks.shape)], axis=1))
