"""Compares an adapter in PEFT's own implementation with ours: the same logits, at every token of a text.

    python -m benchmarks.peft_peer --model=HF_DIR --adapter=DIR --output=peft.json

PEFT knows no gate, so both models run the adapter at every token. Needs `pip install peft` and the `peers` extra.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks import report
from msn_jax import adapter as adapters
from msn_jax import cli, llama, masks, pretrained
from msn_jax.cli import InputError
from msn_jax.data import tokenizer as tokenizers

_TEXT = "Gravity pulls two objects towards each other. The heavier they are, the stronger it is.\n\ndef area(w, h):\n"


def our_logits(model: str, adapter: str, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """float32 [T, V] each: without the adapter, and with the adapter at every token."""
    cfg = pretrained.read_config(model, "float32")
    params = pretrained.load(model, stacked=False, dtype="float32").params
    read = adapters.load(adapter, cfg)
    positions, mask = jnp.arange(len(ids))[None], masks.causal(len(ids))

    @jax.jit
    def logits(params: dict, factors: dict | None) -> jax.Array:
        hidden = llama.forward(params, cfg, jnp.array([ids]), positions, mask, adapter=factors).hidden
        return llama.unembed(params, cfg, hidden)[0]

    factors = adapters.decode_layout(read.params, read.cfg)
    return np.asarray(logits(params, None)), np.asarray(logits(params, factors))


def peft_logits(model: str, adapter: str, ids: list[int]) -> np.ndarray:
    """float32 [T, V] of transformers with the adapter in PEFT. InputError if they are not installed."""
    try:
        import peft
        import torch
        import transformers
    except ImportError as error:
        raise InputError(f"peft is not installed ({error}): pip install peft -e .[peers]") from error
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, adapter, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        return adapted(torch.tensor([ids])).logits[0].float().numpy()


def main() -> None:
    """Compares and writes the report."""
    args = flags.FLAGS
    tokenizer = tokenizers.load(Path(args.model))
    ids = [*tokenizer.start_ids, *tokenizer.encode(_TEXT)]
    theirs = peft_logits(args.model, args.adapter, ids)
    plain, ours = our_logits(args.model, args.adapter, ids)
    result = {
        "tokens": len(ids),
        "largest_difference": float(np.abs(ours - theirs).max()),
        "largest_effect_of_the_adapter": float(np.abs(ours - plain).max()),
    }
    print(result)
    report.write({**report.environment(), **result}, args.output)


if __name__ == "__main__":
    flags.DEFINE_string("model", None, "The Hugging Face directory of the model.", required=True)
    flags.DEFINE_string("adapter", None, "The adapter's directory.", required=True)
    flags.DEFINE_string("output", None, "JSON file to write.", required=True)
    cli.run(main)
