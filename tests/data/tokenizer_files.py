"""Tokenizers in the style of well-known models, and directories with their files."""

import json

import chat_examples
import refusals
import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from msn_jax.data import tokenizer as tokenizer_lib

CHATML = chat_examples.unmarked(chat_examples.CHATML)
AWKWARD = st.sampled_from([*" \u2581\0\n\t\r<>|ax4é\ufffd\ufeff\U0001f600", "<s>", "</s", "<|im_end|>", "hello", "  "])
TEXT = st.text() | st.lists(AWKWARD).map("".join)


def llama_style() -> tokenizers.Tokenizer:
    """Byte fallback and a dummy prefix, as Llama 2 and Mistral have it."""
    words = [*"\u2581abcdefghijklmnopqrstuvwxyz", "he", "ll", "hell", "hello", "\u2581hello", "\u2581\u2581"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("\u2581", "hello"), ("\u2581", "\u2581")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def metaspace_style() -> tokenizers.Tokenizer:
    tokenizer = llama_style()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    return tokenizer


def write(directory, tokenizer=None, tokenizer_config=None, **files):
    directory.mkdir(exist_ok=True)
    if tokenizer is not None:
        (directory / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    for name, content in {"tokenizer_config": tokenizer_config, **files}.items():
        if content is not None:
            (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def refusal(directory):
    message = refusals.refusal(tokenizer_lib.load, directory)
    assert message.startswith(str(directory))
    return message.removeprefix(str(directory))
