"""PyTorch decoders of transformers and of the paper's authors, with the interface that `peers.py` measures.

Imports torch and transformers.
"""

import sys
import types
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers.utils import import_utils

from benchmarks.questions import Completion, Decoder, PassCounter, Question
from msn_jax.cli import InputError

_TREE_SLOTS = 128  # extra cache slots for the authors' tree of 69 nodes
_NO_STOP_TOKEN = -1


def _count_passes(module: torch.nn.Module) -> PassCounter:
    counter = PassCounter()
    module.register_forward_pre_hook(counter.add)
    return counter


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def transformers_decoders(directory: Path, dtype: str, stop_ids: Sequence[int], lookup: int) -> dict[str, Decoder]:
    """Greedy decoding and prompt lookup from transformers; `lookup` is its `prompt_lookup_num_tokens`."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).to(_device())
    model.eval()
    passes = _count_passes(model)

    def decoder(**options: object) -> Decoder:
        def decode(question: Question) -> Completion:
            tokens = torch.tensor([question.ids], device=model.device)
            output = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=question.max_new_tokens,
                eos_token_id=list(stop_ids) or None,
                pad_token_id=0,
                **options,
            )
            return Completion(output[0, len(question.ids) :].tolist(), passes.take())

        return decode

    return {"transformers": decoder(), "transformers_prompt_lookup": decoder(prompt_lookup_num_tokens=lookup)}


def authors_decoder(checkout: Path, directory: Path, dtype: str, stop_ids: Sequence[int]) -> Decoder:
    """TR-Jacobi as released by the paper's authors, for Llama models without rope scaling.

    Their code is written for transformers 4.37 and a CUDA device. These adaptations make it run here; none of them adds
    work to the timed part:

    - define `is_torch_fx_available`, which transformers has removed, and `_tied_weights_keys` in its new form;
    - add the rope fields of the config under their old names;
    - enlarge the cache by the tree's size, because their code fails when the tree extends beyond the context;
    - convert their 0/1 attention masks to booleans; transformers 4.37 replaced the zeros by -inf;
    - without CUDA, replace `torch.device('cuda:0')` and `Tensor.cuda()` in their module by the CPU.

    Raises:
      InputError: `checkout` is not a checkout of their repository, or their code cannot run the model.
    """
    modeling, decoding = _import_authors(checkout)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    cfg = transformers.AutoConfig.from_pretrained(directory)
    rope = cfg.rope_parameters
    if (
        cfg.model_type != "llama"
        or rope["rope_type"] != "default"
        or cfg.head_dim * cfg.num_attention_heads != cfg.hidden_size
    ):
        raise InputError(f"--authors: the authors' code only supports Llama models without rope scaling: {directory}")
    cfg.max_position_embeddings += _TREE_SLOTS
    cfg.rope_theta, cfg.rope_scaling, cfg.pretraining_tp, cfg._attn_implementation = rope["rope_theta"], None, 1, "sdpa"
    modeling.LlamaForCausalLM._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    model = modeling.LlamaForCausalLM(cfg)
    weights = {}
    for path in sorted(directory.glob("*.safetensors")):
        weights |= load_file(path)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = ["lm_head.weight"] if cfg.tie_word_embeddings else []
    if unexpected or [name for name in missing if name not in tied]:
        raise InputError(f"--authors: parameters do not match the authors' model: {missing=}, {unexpected=}")
    model = model.to(_device(), getattr(torch, dtype)).eval()
    passes = _count_passes(model)
    tokenizer = types.SimpleNamespace(eos_token_id=stop_ids[0] if stop_ids else _NO_STOP_TOKEN)

    def decode(question: Question) -> Completion:
        tokens = torch.tensor([question.ids], device=model.device)
        output = decoding.noise_forward(tokens, model, tokenizer, question.max_new_tokens)[0]
        return Completion(output[0, len(question.ids) :].tolist(), passes.take() - 1)  # their prefill emits no token

    return decode


def _import_authors(checkout: Path) -> tuple[types.ModuleType, types.ModuleType]:
    if not (checkout / "model" / "noise_forward.py").is_file():
        raise InputError(f"--authors={checkout}: no model/noise_forward.py; name a checkout of MakeSomeNoiseInference")
    if not hasattr(import_utils, "is_torch_fx_available"):
        import_utils.is_torch_fx_available = lambda: False
    sys.path.insert(0, str(checkout))
    try:
        from model import modeling_llama_kv, noise_forward
    finally:
        sys.path.remove(str(checkout))
    make_mask = modeling_llama_kv._prepare_4d_causal_attention_mask_for_sdpa
    modeling_llama_kv._prepare_4d_causal_attention_mask_for_sdpa = lambda mask, *rest: (
        mask.bool() if mask.ndim == 4 else make_mask(mask, *rest)
    )
    if not torch.cuda.is_available():
        noise_forward.torch = _TorchOnCpu()
        torch.Tensor.cuda = lambda tensor, *_, **__: tensor
    return modeling_llama_kv, noise_forward


class _TorchOnCpu:
    """The torch module, but every device is the CPU."""

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)

    def device(self, *_: object) -> torch.device:
        """The CPU."""
        return torch.device("cpu")
