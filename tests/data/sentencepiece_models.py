"""A small SentencePiece model in the style of Llama 2: byte fallback and a dummy prefix."""

import io

import sentencepiece


def train(user_defined_symbols: tuple[str, ...] = ()) -> bytes:
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world, what is it?", "I INST [x] user system"] * 40),
        model_writer=proto,
        model_type="bpe",
        vocab_size=320 + len(user_defined_symbols),
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=list(user_defined_symbols),
        minloglevel=2,
    )
    return proto.getvalue()
