"""Byte-level vocabularies as the tokenizer.json of each family defines them, and texts that tell them apart."""

import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "def area(w, h):\n    return w * h  # 12345 units\r\n\r\n\tpass\n",
    "It's I'VE we'll 'S DON'T naïve cafe\u0301 \u017f Ünïcode 1234567 3.14159 $100 2024-11-25 ½ ² Ⅷ ١٢٣",
    "世界 一二三 こんにちは カタカナ 한국어 123一456 😀 👩‍👩‍👧 🇩🇪 ∀x∈ℝ  \u3000\u00a0\u200b x\v\f y",
    "<s>[INST] hi </s> <|think|>no</s>   <s>  a <unk> __init__ ==> !=  «x» “y” `z` ~ ^ | @ #$%&'()*+,-./:;<=>?",
    "   leading", "trailing   ", " ", "\n", "  \n  \n x", "", "a", "7", "\x00\x7f\x85",
]  # fmt: skip
SPECIAL, USER_DEFINED = ("<unk>", "<s>", "</s>"), "<|think|>"
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _regex(pattern):
    return pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")


_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
_DIGITS = pre_tokenizers.Digits(individual_digits=True)
ORIGINAL = {  # as in the tokenizer.json of each family
    "gpt-2": [_GPT2],
    "smollm": [_DIGITS, _GPT2],
    "llama-bpe": [_regex(_LETTERS + r"\p{N}{1,3}" + _REST), _BYTES],
    "qwen2": [_regex(_LETTERS + r"\p{N}" + _REST), _BYTES],
    "deepseek-coder": [*map(_regex, ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")), _DIGITS, _BYTES],
}


def trained(pre):
    """A small byte-level BPE as its family's tokenizer.json defines it.

    Its merges ignore the family's rule, and some of its tokens cannot be reached by merges, so that ids depend on both.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = _BYTES
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([text + " 1234567 12 " for text in TEXTS] * 3, trainer)
    described = json.loads(backend.to_str())
    del described["model"]["merges"][::5]
    described["model"]["ignore_merges"] = pre == "llama-bpe"
    backend = tokenizers.Tokenizer.from_str(json.dumps(described))
    backend.normalizer = normalizers.NFC() if pre == "qwen2" else None
    backend.pre_tokenizer = pre_tokenizers.Sequence(ORIGINAL[pre])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in SPECIAL])
    backend.add_tokens([tokenizers.AddedToken(USER_DEFINED, normalized=False)])
    return backend
