"""Names and layouts of the tensors of a Hugging Face checkpoint.

A tensor on the left is [out, in], with the heads flattened; our parameter is [in..., out...], with an axis of heads:

    q_proj.weight [N*H, D]   <->   q [D, N, H]        o_proj.weight [D, N*H]   <->   o [N, H, D]
    up_proj.weight [F, D]    <->   up [D, F]          q_proj.bias [N*H]        <->   q_bias [N, H]

Embeddings and norms have the same layout. Apart from an optional cast values are only moved, so a round trip is exact.
"""

import math
import re
from collections.abc import Sequence

import ml_dtypes
import numpy as np

from msn_jax.projections import INPUT_AXES

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}  # name in a safetensors header

# Tensor name -> parameter name in the decoding layout.
FROM_HUGGING_FACE = (
    (r"model\.embed_tokens\.weight", r"embed"),
    (r"lm_head\.weight", r"unembed"),
    (r"model\.norm\.weight", r"norm/scale"),
    (r"model\.layers\.(\d+)\.input_layernorm\.weight", r"layer_\1/attention_norm/scale"),
    (r"model\.layers\.(\d+)\.post_attention_layernorm\.weight", r"layer_\1/mlp_norm/scale"),
    (r"model\.layers\.(\d+)\.self_attn\.([qkvo])_proj\.weight", r"layer_\1/attention/\2"),
    (r"model\.layers\.(\d+)\.self_attn\.([qkv])_proj\.bias", r"layer_\1/attention/\2_bias/bias"),
    (r"model\.layers\.(\d+)\.self_attn\.([qk])_norm\.weight", r"layer_\1/attention/\2_norm/scale"),
    (r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight", r"layer_\1/mlp/\2"),
)
TO_HUGGING_FACE = (
    (r"embed", r"model.embed_tokens.weight"),
    (r"unembed", r"lm_head.weight"),
    (r"norm/scale", r"model.norm.weight"),
    (r"layer_(\d+)/attention_norm/scale", r"model.layers.\1.input_layernorm.weight"),
    (r"layer_(\d+)/mlp_norm/scale", r"model.layers.\1.post_attention_layernorm.weight"),
    (r"layer_(\d+)/attention/([qkvo])", r"model.layers.\1.self_attn.\2_proj.weight"),
    (r"layer_(\d+)/attention/([qkv])_bias/bias", r"model.layers.\1.self_attn.\2_proj.bias"),
    (r"layer_(\d+)/attention/([qk])_norm/scale", r"model.layers.\1.self_attn.\2_norm.weight"),
    (r"layer_(\d+)/mlp/(gate|up|down)", r"model.layers.\1.mlp.\2_proj.weight"),
)
# Buffers in older files, which the config determines.
DERIVED = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"


def rename(name: str, table: Sequence[tuple[str, str]]) -> str | None:
    """Translates a name by `FROM_HUGGING_FACE` or `TO_HUGGING_FACE`. None if no row matches."""
    for pattern, replacement in table:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return None


def input_axes(name: str) -> int:
    """Number of leading axes of a parameter that are the columns of its tensor; 0 if it is not transposed."""
    return INPUT_AXES.get(name.rsplit("/", 1)[-1], 0)


def tensor_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the tensor in the file for the parameter `name` (its path), whose shape in one layer is `shape`."""
    inputs = input_axes(name)
    if inputs:
        return math.prod(shape[inputs:]), math.prod(shape[:inputs])
    return (math.prod(shape),) if name.endswith("bias") else tuple(shape)
