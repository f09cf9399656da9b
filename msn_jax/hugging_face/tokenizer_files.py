"""Writes tokenizers in the files that `transformers` reads.

Files that came from a Hugging Face directory are copied unchanged. A SentencePiece model trained by this project
becomes a `tokenizer.json`: its pieces as BPE merges, its roles as a chat template. There are two differences.
transformers encodes the characters of a control symbol, such as `<s>` in a source file, as that symbol, where
`SentencePieceTokenizer` encodes the characters. And U+2581, which stands for a space in both vocabularies, decodes as
a space where the input contains it literally.
"""

import json

import sentencepiece

from msn_jax import json_files
from msn_jax.data.tokenizer import Tokenizer
from msn_jax.data.tokenizer_sentencepiece import SentencePieceTokenizer

_SPACE = "\u2581"  # stands for a space in SentencePiece vocabularies
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The tokenizer's files for a Hugging Face directory, by name."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer.files
    processor = tokenizer.processor
    names = {f"{name}_token": processor.id_to_piece(getattr(processor, f"{name}_id")()) for name in ("bos", "eos")}
    if processor.unk_id() >= 0:
        names["unk_token"] = processor.id_to_piece(processor.unk_id())
    if tokenizer.role_ids is None:
        described = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, **names}
        return {"tokenizer_config.json": json_files.dump(described), **tokenizer.files}
    described = {"tokenizer_class": "PreTrainedTokenizerFast", **names, "clean_up_tokenization_spaces": False}
    described |= {"pad_token": processor.id_to_piece(processor.pad_id()), "chat_template": _CHAT_TEMPLATE}
    return {"tokenizer.json": json_files.dump(_as_bpe(tokenizer)), "tokenizer_config.json": json_files.dump(described)}


def generation_config(tokenizer: Tokenizer) -> dict[str, object]:
    """The content of generation_config.json: the tokenizer's own file, if any, with all its stop tokens.

    It lists every stop token, whichever file named it: where this file exists, transformers stops at its ids alone.
    """
    values = json.loads(tokenizer.files.get("generation_config.json", b"{}"))
    stops = list(tokenizer.stop_ids)
    values["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    if tokenizer.start_ids:
        values["bos_token_id"] = tokenizer.start_ids[0]
    return values


def _as_bpe(tokenizer: SentencePieceTokenizer) -> dict[str, object]:
    """The content of tokenizer.json."""
    processor = tokenizer.processor
    pieces = [processor.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    control = [i for i in range(len(pieces)) if processor.is_control(i) or processor.is_unknown(i)]
    bos = pieces[tokenizer.bos_id]
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": pieces[i], "special": True, **flags} for i in control],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": pieces[processor.unk_id()],
            "fuse_unk": False,
            "byte_fallback": True,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": _merges(processor, pieces),
        },
    }


def _merges(processor: sentencepiece.SentencePieceProcessor, pieces: list[str]) -> list[list[str]]:
    """All pairs of pieces whose concatenation is a piece, in the order of SentencePiece's scores of the result."""
    words = {piece: i for i, piece in enumerate(pieces) if not processor.is_control(i) and not processor.is_byte(i)}
    ranked = sorted(words, key=lambda piece: -processor.get_score(words[piece]))
    splits = ((piece[:i], piece[i:]) for piece in ranked for i in range(1, len(piece)))
    return [[left, right] for left, right in splits if left in words and right in words]
