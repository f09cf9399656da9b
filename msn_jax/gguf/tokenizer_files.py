"""Metadata of a GGUF file -> the tokenizer files of a Hugging Face directory.

    tokenizer.ggml.model = 'gpt2'    byte-level BPE
    tokenizer.ggml.model = 'llama'   SentencePiece BPE with byte fallback

Both become a tokenizer.json. (transformers 5 reads the alternative for the second, a tokenizer.model, with merges in
another order than SentencePiece itself.)

Of the pre-tokenizer of a byte-level BPE, a GGUF file has the name only (`tokenizer.ggml.pre`). `PRE_TOKENIZERS` has the
rules of the original tokenizers under these names, and what llama.cpp leaves out: Qwen2's normalisation.

Types of tokens: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte. Control tokens become special tokens;
user-defined ones are recognised in texts too, but are part of decoded text.
"""

import collections
import json
from pathlib import Path

from msn_jax import json_files
from msn_jax.cli import InputError, warn_once
from msn_jax.gguf import container
from msn_jax.gguf.container import Gguf

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_SPACE = "\u2581"  # stands for a space in SentencePiece vocabularies
_NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_LLAMA_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # what llama.cpp takes where a SentencePiece model names none
_ADDED_FLAGS = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


def _split(pattern: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _byte_level(use_regex: bool) -> dict[str, object]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


_DIGITS = {"type": "Digits", "individual_digits": True}
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_PUNCTUATION = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"""

# Rules of pre-tokenization, applied in sequence. `ByteLevel` with `use_regex` is GPT-2's rule.
_RULES = {
    "gpt-2": [_byte_level(True)],
    "smollm": [_DIGITS, _byte_level(True)],
    "llama-bpe": [_split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"), _byte_level(False)],
    "qwen2": [_split(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"), _byte_level(False)],
    "deepseek-coder": [
        _split("[\r\n]"),
        _split(r"\s?\p{L}+"),
        _split(r"\s?\p{P}+"),
        _split("[一-龥\u0800-一가-\ud7ff]+"),
        _DIGITS,
        _byte_level(False),
    ],
    "deepseek-v3": [
        _split(r"\p{N}{1,3}"),
        _split("[一-龥\u3040-ゟ゠-ヿ]+"),
        _split(
            _PUNCTUATION
            + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        _byte_level(False),
    ],
    # Of files that name none: llama.cpp's own rule, which is no model's.
    "default": [
        _split(r"[\p{P}\$\+<=>\^~\|]+"),
        _split(_GPT2),
        _split(r"\p{N}+"),
        _split("[0-9][0-9][0-9]"),
        _byte_level(False),
    ],
}
# Name in a file -> rules. The names of one row differ in llama.cpp for reasons other than these rules.
PRE_TOKENIZERS = {
    **{name: name for name in _RULES},
    **dict.fromkeys(("llama3", "llama-v3"), "llama-bpe"),
    **dict.fromkeys(("starcoder", "refact"), "smollm"),
    "deepseek-r1-qwen": "qwen2",
}
_IGNORE_MERGES = ("llama-bpe",)  # a word that is in the vocabulary is that token, whether or not merges lead there
_ADD_BOS = ("llama-bpe",)  # unless the file says otherwise
_NFC = ("qwen2",)


def tokenizer_files(path: str | Path) -> dict[str, bytes]:
    """The tokenizer's files for a Hugging Face directory, by name.

    Raises:
      InputError: the vocabulary is missing or malformed, of another kind than 'gpt2' and 'llama', or has an unknown
        pre-tokenizer or no end of sequence.
    """
    gguf = container.read(path)
    kind = gguf.metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        found = "is missing" if kind is None else f"is {kind!r}"
        raise InputError(f"{gguf.path}: key 'tokenizer.ggml.model' {found}: supported are gpt2 and llama")
    vocabulary = _Vocabulary(gguf, kind)
    content = _byte_level_bpe(vocabulary) if kind == "gpt2" else _sentencepiece_bpe(vocabulary)
    added = [
        {"id": i, "content": vocabulary.tokens[i], "special": special, **_ADDED_FLAGS}
        for i, special in vocabulary.added().items()
    ]
    described = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **content}
    return {
        "tokenizer.json": json.dumps(described).encode("ascii"),
        "tokenizer_config.json": json_files.dump(vocabulary.config()),
        "generation_config.json": json_files.dump(vocabulary.generation_config()),
    }


class _Vocabulary:
    """The tokens of a file and their roles, checked."""

    def __init__(self, gguf: Gguf, kind: str):
        self.gguf, self.path = gguf, gguf.path
        self.tokens = self.values("tokens", str)
        self.types = self.values("token_type", int) or [_NORMAL] * len(self.tokens)
        self.scores = self.values("scores", int | float) or [0.0] * len(self.tokens)
        if not self.tokens:
            raise self.error("tokens", "is missing: export the model with its tokenizer")
        for name, values in (("token_type", self.types), ("scores", self.scores)):
            if len(values) != len(self.tokens):
                raise self.error(name, f"has {len(values)} values for {len(self.tokens)} tokens")
        self.tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(self.tokens)]  # as in llama.cpp
        if len(set(self.tokens)) < len(self.tokens):
            [(twice, _)] = collections.Counter(self.tokens).most_common(1)
            raise self.error("tokens", f"has the token {twice!r} twice")
        defaults = _LLAMA_IDS if kind == "llama" else {}
        roles = (*_NAMES.values(), "eot", "eom")
        self.ids = {role: self._id(role, defaults.get(role)) for role in roles}
        if self.ids["eos"] is None:
            raise self.error("eos_token_id", "is missing: it must name the end of a sequence")

    def error(self, key: str, problem: str) -> InputError:
        """An error about a key."""
        return InputError(f"{self.path}: key 'tokenizer.ggml.{key}' {problem}")

    def get(self, key: str, default: object = None) -> object:
        """A value as it is in the file."""
        return self.gguf.metadata.get(f"tokenizer.ggml.{key}", default)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"is {value!r}: must be true or false")
        return value

    def values(self, key: str, kind: type) -> list:
        """A list; empty if it is missing."""
        values = self.get(key, [])
        if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
            raise self.error(key, "is malformed: must be a list of " + ("strings" if kind is str else "numbers"))
        return values

    def _id(self, role: str, default: int | None) -> int | None:
        value = self.get(f"{role}_token_id", default)
        if value is not None and not (isinstance(value, int) and 0 <= value < len(self.tokens)):
            raise self.error(
                f"{role}_token_id", f"is {value!r}: must be below {len(self.tokens)}, the number of tokens"
            )
        return value

    def added(self) -> dict[int, bool]:
        """The tokens that are recognised in texts -> whether they are special."""
        special = {self.ids[role] for role in ("bos", "eos", "eot", "eom")}
        kinds = (_UNKNOWN, _CONTROL, _USER_DEFINED)
        return {
            i: kind != _USER_DEFINED or i in special
            for i, kind in enumerate(self.types)
            if kind in kinds or i in special
        }

    def ids_by_token(self) -> dict[str, int]:
        """All tokens but the unused ones, which models are padded with."""
        added = self.added()
        return {token: i for i, token in enumerate(self.tokens) if self.types[i] != _UNUSED or i in added}

    def config(self) -> dict[str, object]:
        """The content of tokenizer_config.json. What is put around a text is in tokenizer.json."""
        names = {name: self.tokens[self.ids[role]] for name, role in _NAMES.items() if self.ids[role] is not None}
        template = self.gguf.metadata.get("tokenizer.chat_template")
        if not isinstance(template, str | None):
            raise InputError(
                f"{self.path}: key 'tokenizer.chat_template' is {type(template).__name__}: must be a string"
            )
        template = {} if template is None else {"chat_template": template}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **names,
            **template,
        }

    def generation_config(self) -> dict[str, object]:
        """Every token that ends a generation, in a list if several."""
        stops = [self.ids[role] for role in ("eos", "eot", "eom") if self.ids[role] is not None]
        stops = list(dict.fromkeys(stops))
        ids = {"eos_token_id": stops[0] if len(stops) == 1 else stops}
        return ids if self.ids["bos"] is None else {"bos_token_id": self.ids["bos"], **ids}


def _byte_level_bpe(vocabulary: _Vocabulary) -> dict[str, object]:
    """The content of tokenizer.json for a vocabulary of kind 'gpt2'."""
    name = vocabulary.get("pre")
    if name is None:
        warn_once(
            f"{vocabulary.path}: names no pre-tokenizer: texts are split by llama.cpp's default rule, which may differ "
            "from the model's own"
        )
        name = "default"
    if name not in PRE_TOKENIZERS:
        raise vocabulary.error("pre", f"is {name!r}: known pre-tokenizers are {', '.join(sorted(PRE_TOKENIZERS))}")
    rules = PRE_TOKENIZERS[name]
    merges = [merge.partition(" ") for merge in vocabulary.values("merges", str)]
    if not merges:
        raise vocabulary.error("merges", "is missing: export the model again")
    return {
        "normalizer": {"type": "NFC"} if rules in _NFC else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _RULES[rules]},
        "post_processor": _post_processor(vocabulary, vocabulary.flag("add_bos_token", rules in _ADD_BOS)),
        "decoder": _byte_level(True),
        "model": {
            "type": "BPE",
            "ignore_merges": rules in _IGNORE_MERGES,
            "vocab": vocabulary.ids_by_token(),
            "merges": [[left, right] for left, _, right in merges],
        },
    }


def _sentencepiece_bpe(vocabulary: _Vocabulary) -> dict[str, object]:
    """The content of tokenizer.json for a vocabulary of kind 'llama'.

    SentencePiece merges the pair whose concatenation has the highest score. So all pairs of pieces whose concatenation
    is a piece are merges, in the order of the scores of the results.
    """
    if vocabulary.flag("remove_extra_whitespaces", False):
        raise vocabulary.error("remove_extra_whitespaces", "is true: this kind of SentencePiece model is not supported")
    if vocabulary.ids["unknown"] is None:
        raise vocabulary.error("unknown_token_id", "is missing: export the model again")
    prefix = vocabulary.flag("add_space_prefix", True)
    pieces = [
        (score, token)
        for token, kind, score in zip(vocabulary.tokens, vocabulary.types, vocabulary.scores, strict=True)
        if kind == _NORMAL
    ]
    words = {token for _, token in pieces}
    ranked = [token for _, token in sorted(pieces, key=lambda piece: -piece[0])]
    splits = ((token[:i], token[i:]) for token in ranked for i in range(1, len(token)))
    normalizers = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    normalizers += [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
    decoders = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    decoders += [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": _post_processor(vocabulary, vocabulary.flag("add_bos_token", True)),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": vocabulary.tokens[vocabulary.ids["unknown"]],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocabulary.ids_by_token(),
            "merges": [[left, right] for left, right in splits if left in words and right in words],
        },
    }


def _post_processor(vocabulary: _Vocabulary, add_bos: bool) -> dict[str, object] | None:
    """BOS in front of a text and EOS after it, where the file says so."""
    wanted = {"bos": add_bos, "eos": vocabulary.flag("add_eos_token", False)}
    ids = {role: vocabulary.ids[role] for role, is_wanted in wanted.items() if is_wanted}
    special = {role: vocabulary.tokens[i] for role, i in ids.items() if i is not None}
    if not special:
        return None

    def around(name: str, type_id: int) -> list[dict]:
        parts = [{"Sequence": {"id": name, "type_id": type_id}}]
        if "bos" in special:
            parts.insert(0, {"SpecialToken": {"id": special["bos"], "type_id": type_id}})
        if "eos" in special:
            parts.append({"SpecialToken": {"id": special["eos"], "type_id": type_id}})
        return parts

    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {
            token: {"id": token, "ids": [ids[role]], "tokens": [token]} for role, token in special.items()
        },
    }
