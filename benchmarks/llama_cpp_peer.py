"""llama.cpp's decoders through llama-cpp-python, with the interface that `peers.py` measures.

Imports llama_cpp. `pip install llama-cpp-python` compiles llama.cpp; its source package contains the converter from
Hugging Face directories to GGUF files, `vendor/llama.cpp/convert_hf_to_gguf.py` (use `--outtype f32`).
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from benchmarks.questions import Completion, Decoder, PassCounter, Question


def _count_passes(model: llama_cpp.Llama) -> PassCounter:
    counter, evaluate = PassCounter(), model.eval

    def counting(tokens: Sequence[int]) -> None:
        counter.add()
        evaluate(tokens)

    model.eval = counting
    return counter


def llama_cpp_decoders(
    path: Path, context: int, threads: int, stop_ids: Sequence[int], lookup: int
) -> dict[str, Decoder]:
    """Greedy decoding and prompt lookup; `lookup` is the `num_pred_tokens` of its prompt lookup."""

    def decoder(**options: object) -> Decoder:
        model = llama_cpp.Llama(
            str(path),
            n_ctx=context,
            n_threads=threads,
            n_threads_batch=threads,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            verbose=False,
            **options,
        )
        passes = _count_passes(model)

        def decode(question: Question) -> Completion:
            model.reset()  # or it would keep the cache of the prompt's longest known prefix
            tokens = []
            for token in itertools.islice(model.generate(question.ids, temp=0.0), question.max_new_tokens):
                tokens.append(token)
                if token in stop_ids:
                    break
            return Completion(tokens, passes.take())

        return decode

    draft = LlamaPromptLookupDecoding(num_pred_tokens=lookup)
    return {
        "llama_cpp": decoder(),
        "llama_cpp_prompt_lookup": decoder(draft_model=draft, logits_all=True),
    }
