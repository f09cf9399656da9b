"""Reads and writes Hugging Face directories: Llama 2 and 3.x, DeepSeek-Coder, Mistral, Qwen2 and Qwen3.

    names.py            names and layouts of the tensors
    config_json.py      config.json <-> `LlamaConfig`
    load.py             safetensors -> tensors
    stream.py           tensors -> parameters on a mesh, also those of GGUF files
    save.py             parameters -> safetensors
    tokenizer_files.py  tokenizer -> files that transformers reads
    directory.py        writes a whole directory, atomically

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
