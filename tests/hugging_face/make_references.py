"""Makes the directories next to this file: one tiny random model per family, and activations from transformers.

    pip install torch==2.13.0 'transformers>=5.17,<6' safetensors
    python tests/hugging_face/make_references.py

Each directory has the files of `save_pretrained` and reference.safetensors: tokens, logits, and from the first layer
the outputs of the norm, the attention and the block, the queries before and after the rotary embedding, and the rotated
keys. No constant has its usual value. Some directories imitate variants in circulation: keys of transformers 4, shards,
16-bit weights.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

HERE = Path(__file__).parent
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "attn_implementation": "eager",
}
LINEAR = {"rope_type": "linear", "rope_theta": 345.0, "factor": 3.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 567.0,
    "factor": 5.0,
    "low_freq_factor": 1.5,
    "high_freq_factor": 6.0,
    "original_max_position_embeddings": 24,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}


def families() -> dict[str, transformers.PreTrainedConfig]:
    """The config of each directory."""

    def plain(theta: float) -> dict:
        return {"rope_type": "default", "rope_theta": theta}

    return {
        "llama2": transformers.LlamaConfig(
            **SHAPE | {"num_key_value_heads": 4}, rms_norm_eps=3e-2, rope_parameters=plain(123.0)
        ),
        "llama3": transformers.LlamaConfig(
            **SHAPE, rms_norm_eps=2e-2, rope_parameters=LLAMA3, head_dim=12, tie_word_embeddings=True
        ),
        "deepseek_coder": transformers.LlamaConfig(**SHAPE, rms_norm_eps=1e-2, rope_parameters=LINEAR),
        "mistral": transformers.MistralConfig(
            **SHAPE, rms_norm_eps=5e-3, rope_parameters=plain(77.0), head_dim=10, sliding_window=6
        ),
        "qwen2": transformers.Qwen2Config(
            **SHAPE, rms_norm_eps=4e-2, rope_parameters=plain(999.0), tie_word_embeddings=True, **WINDOW
        ),
        "qwen3": transformers.Qwen3Config(**SHAPE, rms_norm_eps=6e-3, rope_parameters=plain(4321.0), head_dim=14),
    }


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Sets weights that give logits of order 1, and biases and norms that affect them."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("norm.weight"):
            value.data = 1 + 0.3 * noise
        elif name.endswith("bias"):
            value.data = 0.5 * noise
        elif "embed" in name or "lm_head" in name:
            value.data = 0.4 * noise
        else:
            value.data = 1.2 * noise * value.shape[1] ** -0.5


def record(model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits of a model, and activations of its first layer."""
    recorded = {}

    def keep(name: str):
        def hook(_module: torch.nn.Module, _inputs: tuple, output: object) -> None:
            recorded.setdefault(name, (output[0] if isinstance(output, tuple) else output).detach().clone())

        return hook

    layer, modeling = model.model.layers[0], sys.modules[type(model).__module__]
    handles = [
        layer.input_layernorm.register_forward_hook(keep("norm")),
        layer.self_attn.register_forward_hook(keep("attention")),
        layer.register_forward_hook(keep("block")),
    ]
    rotate = modeling.apply_rotary_pos_emb

    def recording(q: torch.Tensor, k: torch.Tensor, *args: object, **kwargs: object) -> tuple:
        rotated = rotate(q, k, *args, **kwargs)
        for name, value in zip(("q", "q_rotated", "k_rotated"), (q, *rotated), strict=True):
            recorded.setdefault(name, value.detach().clone().contiguous())
        return rotated

    modeling.apply_rotary_pos_emb = recording
    try:
        with torch.no_grad():
            recorded["logits"] = model(tokens).logits
    finally:
        modeling.apply_rotary_pos_emb = rotate
        for handle in handles:
            handle.remove()
    inverse = model.model.rotary_emb.inv_freq.clone()
    return {"tokens": tokens.to(torch.int32), "inverse_frequencies": inverse, **recorded}


def make(name: str, config: transformers.PreTrainedConfig, seed: int, directory: Path) -> None:
    """Writes one directory."""
    stored = {"llama3": torch.float16, "qwen2": torch.bfloat16}.get(name, torch.float32)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomize(model, seed)
    model.tie_weights()
    model.to(stored).save_pretrained(directory, max_shard_size="40KB" if name == "mistral" else "1GB")
    (directory / "generation_config.json").unlink()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = torch.randint(0, config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(100 + seed))
    save_file(record(model, tokens), directory / "reference.safetensors")
    if name in ("deepseek_coder", "qwen2"):
        respell(directory / "config.json")
    for path in directory.iterdir():
        path.chmod(0o644)


def respell(path: Path) -> None:
    """Rewrites config.json with the keys of transformers 4."""
    values = json.loads(path.read_text())
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    values["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    values["torch_dtype"] = values.pop("dtype")
    values.pop("layer_types", None)
    values.pop("head_dim", None)
    path.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    for seed, (name, config) in enumerate(families().items()):
        make(name, config, seed, HERE / name)
