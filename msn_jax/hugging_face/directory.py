"""Writes a Hugging Face directory: config.json, generation_config.json, safetensors, model card, tokenizer files."""

import json
from collections.abc import Mapping
from pathlib import Path

import jax

from msn_jax import config, directories, json_files
from msn_jax.cli import InputError
from msn_jax.config import Config, LlamaConfig
from msn_jax.hugging_face import config_json, save

MAX_SHARD_BYTES = 5 * 10**9


def export(
    params: dict,
    cfg: LlamaConfig,
    directory: str | Path,
    *,
    run: Config | None = None,
    generation: Mapping[str, object] | None = None,
    files: Mapping[str, bytes] | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a model for `transformers` and the engines that read its format. Atomic: all of the directory, or nothing.

    Args:
      params: stacked or decoding layout, on any mesh. Every process of a pod calls this; process 0 writes.
      cfg: the model.
      directory: must be absent or empty.
      run: the training config, for the model card; None if unknown.
      generation: content of generation_config.json. Its `bos_token_id`, `eos_token_id` (int or list) and
        `pad_token_id` are written to config.json too.
      files: further files by name, such as the tokenizer's. The files named above take precedence.
      dtype: dtype of the tensors: 'float32', 'bfloat16' or 'float16'; None keeps the parameters' own.
      max_shard_bytes: limit of one safetensors file; a larger tensor gets its own file.

    Raises:
      InputError: the directory is not empty or cannot be made, or no architecture combines the model's features.
    """
    dtype = params["embed"].dtype.name if dtype is None else dtype
    if dtype not in config.DTYPES:
        raise InputError(f"{directory}: cannot be written in {dtype!r}: choose one of {', '.join(config.DTYPES)}")
    generation = dict(generation or {})
    written = {
        "config.json": json_files.dump(config_json.to_json(cfg, dtype, generation)),
        "generation_config.json": json_files.dump(generation),
        "README.md": model_card(cfg, run).encode(),
    }
    with directories.whole(directory) as partial:
        if jax.process_index() == 0:
            for name, content in {**(files or {}), **written}.items():
                (partial / name).write_bytes(content)
        save.save(params, cfg, partial, dtype, max_shard_bytes)


def model_card(cfg: LlamaConfig, run: Config | None) -> str:
    """README.md of a model: its architecture and how it was trained."""
    family = config_json.architecture(cfg)
    is_trained_with_noise = run is not None and run.noise.kind != "none"
    tags = ["tags: [make-some-noise, self-speculative-decoding]"] if is_trained_with_noise else []
    lines = ["---", "library_name: transformers", *tags, "---", ""]
    lines += [f"# A model {'converted by' if run is None else 'fine-tuned with'} msn_jax", ""]
    lines += [f"A `{family}`: `transformers` and engines that read its format load it without custom code.", ""]
    if run is None:
        return "\n".join([*lines, "The training config of these parameters is not known."]) + "\n"
    noise = run.noise
    if noise.kind == "none":
        how = "Supervised fine-tuning: clean inputs, loss on the response tokens."
    else:
        where = f"{noise.segments} segment(s) of {noise.length} `{noise.kind}` noise tokens in every response"
        if noise.blocks:
            where = f"{noise.blocks} blocks of {noise.length} `{noise.kind}` noise tokens appended to every row"
        how = (
            f"Make Some Noise ([arXiv 2406.17404](https://arxiv.org/abs/2406.17404)): {where}, loss against the clean "
            "tokens. The architecture is unchanged. With speculative decoding the model drafts for itself and emits "
            "several tokens per forward pass, the same tokens as greedy decoding."
        )
    steps, rows, length = run.train.steps, run.data.batch_size, run.data.row_length
    lines += ["## Training", "", how, ""]
    lines += [f"{steps} steps of {rows} rows of {length} tokens, peak learning rate {run.optim.learning_rate:g}.", ""]
    lines += ["The whole config:", "", "```json", json.dumps(config.to_dict(run), indent=2), "```"]
    return "\n".join(lines) + "\n"
