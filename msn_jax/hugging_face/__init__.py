"""Hugging Face directories in and out: Llama 2 and 3.x, DeepSeek-Coder, Mistral, Qwen2 and Qwen3.

    names.py         what their tensors are called and how they lie
    config_json.py   config.json <-> `LlamaConfig`
    load.py          safetensors -> parameters on a mesh
    save.py          parameters -> safetensors
    tokenizer_files.py  a tokenizer's files, as transformers reads them
    directory.py     a whole directory, written at once or not at all

Neither torch nor transformers is needed. Weights are safetensors; a pickle is never opened.
"""

from msn_jax.hugging_face.config_json import ARCHITECTURES, read_config
from msn_jax.hugging_face.directory import export
from msn_jax.hugging_face.load import is_checkpoint, load_params
from msn_jax.hugging_face.tokenizer_files import generation_config, tokenizer_files

__all__ = [
    "ARCHITECTURES",
    "export",
    "generation_config",
    "is_checkpoint",
    "load_params",
    "read_config",
    "tokenizer_files",
]
