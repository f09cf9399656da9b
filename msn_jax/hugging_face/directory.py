"""Writes a Hugging Face directory: config.json, generation_config.json, safetensors, a model card, tokenizer files."""

import json
from collections.abc import Mapping
from pathlib import Path

import jax

from msn_jax import checkpoint, config, json_files
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
    """Writes what `transformers` and the engines that read its format load. All of the directory, or none of it.

    Args:
      params: stacked or decoding layout, on any mesh. Every process of a pod calls this; the first one writes.
      cfg: the model.
      directory: to be made; it may exist if it is empty.
      run: how the parameters were trained, for the model card; None: not known.
      generation: content of generation_config.json; its `bos_token_id`, `eos_token_id` (int or list) and
        `pad_token_id` go to config.json too.
      files: name -> bytes of more files, such as those of the tokenizer. Those named above are written over them.
      dtype: 'float32', 'bfloat16' or 'float16' of the tensors; None: that of the parameters.
      max_shard_bytes: of one safetensors file; a larger tensor gets a file of its own.

    Raises:
      InputError: the directory has something in it, or no architecture of transformers has these features together.
    """
    dtype = params["embed"].dtype.name if dtype is None else dtype
    if dtype not in config.DTYPES:
        raise InputError(f"{directory}: cannot be written in {dtype!r}: take one of {', '.join(config.DTYPES)}")
    generation = dict(generation or {})
    written = {
        "config.json": json_files.dump(config_json.to_json(cfg, dtype, generation)),
        "generation_config.json": json_files.dump(generation),
        "README.md": model_card(cfg, run).encode(),
    }
    with checkpoint.whole_directory(directory) as partial:
        if jax.process_index() == 0:
            for name, content in {**(files or {}), **written}.items():
                (partial / name).write_bytes(content)
        save.save(params, cfg, partial, dtype, max_shard_bytes)


def model_card(cfg: LlamaConfig, run: Config | None) -> str:
    """README.md of a model: how it was trained, and that it is read like any other of its architecture."""
    family = config_json.architecture(cfg)
    lines = ["---", "library_name: transformers", "tags: [make-some-noise, self-speculative-decoding]", "---", ""]
    lines += ["# A model fine-tuned with msn_jax", ""]
    lines += [f"A `{family}`: `transformers` and every engine that reads its format load it without further code.", ""]
    if run is None:
        return (
            "\n".join([*lines, "How its parameters were trained is not known to the program that wrote this."]) + "\n"
        )
    noise = run.noise
    if noise.kind == "none":
        how = "Supervised fine-tuning: clean inputs, loss on the response tokens."
    else:
        where = f"{noise.segments} segment(s) of {noise.length} `{noise.kind}` noise tokens in every response"
        if noise.blocks:
            where = f"{noise.blocks} blocks of {noise.length} `{noise.kind}` noise tokens beside every row of text"
        how = (
            f"Make Some Noise ([arXiv 2406.17404](https://arxiv.org/abs/2406.17404)): {where}, loss against the clean "
            "tokens. Nothing was added to the model; it can emit several tokens per forward pass, exactly those of "
            "greedy decoding."
        )
    steps, rows, length = run.train.steps, run.data.batch_size, run.data.row_length
    lines += ["## Training", "", how, ""]
    lines += [f"{steps} steps of {rows} rows of {length} tokens, peak learning rate {run.optim.learning_rate:g}.", ""]
    lines += ["The whole config:", "", "```json", json.dumps(config.to_dict(run), indent=2), "```"]
    return "\n".join(lines) + "\n"
