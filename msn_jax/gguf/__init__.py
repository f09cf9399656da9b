"""Reads GGUF models, the format of llama.cpp: architectures llama (Llama, Mistral, SmolLM), qwen2 and qwen3.

    container.py        file, or all files of a split model -> metadata and quantized tensors
    model.py            metadata -> `LlamaConfig`
    load.py             quantized tensors -> parameters on a mesh
    tokenizer_files.py  metadata -> the tokenizer files of a Hugging Face directory

`gguf` (the package, by the authors of llama.cpp) dequantizes the tensors; neither torch nor transformers is needed.
"""
