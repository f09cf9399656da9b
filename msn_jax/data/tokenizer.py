"""The tokenizer: a SentencePiece BPE with byte fallback, trained on the corpus itself.

Text is never normalised, so that for any Unicode text `decode(encode(text)) == text`. Whatever the vocabulary lacks is
spelled in bytes, and so is U+2581, which SentencePiece uses for the space and would hand back as one. Runs of spaces
are pieces of their own: indentation is cheap.

Control symbols (`<s>`, `</s>`, the roles, `<|end|>`) have ids but no text: `encode` never makes one, whatever the text
says, and `decode` skips them.

Llama-style models of others load too. Their dummy prefix (a space in front of every text) is honoured, but they have
no role symbols.
"""

import dataclasses
import io
import os
import re
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from msn_jax.cli import InputError

ROLES = ("system", "user", "assistant")

_END = "<|end|>"
_SPACE = "\u2581"  # how SentencePiece writes a space
# `normalizer_spec { add_dummy_prefix: false }` in protobuf's wire format: appended to a model, it overrides that field.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
_UNTRAINABLE = re.compile("[\0\u2581\u2585]+")  # the trainer skips or misreads text with these
_CHUNK = 4096  # characters: the trainer sees texts in chunks of this length
_MAX_CHUNKS = 4096  # the trainer sees at most this many (2 s of work), spread evenly over the texts


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A loaded SentencePiece model; made by `load` or `train`."""

    processor: sentencepiece.SentencePieceProcessor
    continuation: sentencepiece.SentencePieceProcessor  # the same model without dummy prefix
    vocab_size: int
    bos_id: int
    eos_id: int
    role_ids: dict[str, int] | None  # of ROLES; None in models of others
    end_id: int | None  # closes a turn; None in models of others

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: end of sequence and, with roles, end of turn."""
        return (self.eos_id,) if self.end_id is None else (self.eos_id, self.end_id)

    def encode(self, text: str, start: bool = True) -> list[int]:
        """Token ids of `text`, without control ids.

        Args:
          text: any text. A lone surrogate, which no UTF-8 can hold, becomes U+FFFD.
          start: False where `text` continues other text, so that a model with a dummy prefix does not add a space.
        """
        first, *rest = _without_surrogates(text).split(_SPACE)
        ids = (self.processor if start else self.continuation).encode(first)
        spelled = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        for part in rest:
            ids += spelled + self.continuation.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of any list of ids: control ids say nothing, unknown ids and incomplete UTF-8 become U+FFFD."""
        unknown = self.processor.unk_id()
        return self.processor.decode([i if 0 <= i < self.vocab_size else unknown for i in map(int, ids)])


def load(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer stored at `path`. A file that is missing or is no such model raises InputError."""
    try:
        proto = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read the tokenizer: {error.strerror}") from error
    try:
        return _from_proto(proto)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{path}: not a SentencePiece model with byte fallback, <s> and </s>, or damaged") from error


def save(tokenizer: Tokenizer, path: str | os.PathLike) -> None:
    """Writes the model to `path`, whole or not at all."""
    _write(tokenizer.processor.serialized_model_proto(), Path(path))


def train(texts: Sequence[str], vocab_size: int, path: str | os.PathLike) -> Tokenizer:
    """Trains a tokenizer on `texts`, stores it at `path` and returns it.

    The same texts give the same file. Of texts above 16 million characters an even sample is read.

    Raises:
      InputError: `vocab_size` is too small for the bytes, control symbols and characters of the text, or larger than
        the text has pieces for.
    """
    pieces = [part for text in texts for part in _UNTRAINABLE.split(text)]
    chunks = [piece[i : i + _CHUNK] for piece in pieces for i in range(0, len(piece), _CHUNK)]
    if not any(chunk.strip() for chunk in chunks):
        raise InputError("no text to train a tokenizer on")
    stride = -(-len(chunks) // _MAX_CHUNKS)
    proto = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(_without_surrogates(chunk) for chunk in chunks[::stride]),
            model_writer=proto,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * _CHUNK + 1,  # bytes; longer chunks would be dropped
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            unk_surface="\ufffd",
            control_symbols=[f"<|{role}|>" for role in ROLES] + [_END],
            num_threads=2,  # the result does not depend on it
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(_vocabulary_problem(str(error), vocab_size)) from error
    _write(proto.getvalue(), Path(path))
    return _from_proto(proto.getvalue())


def _from_proto(proto: bytes) -> Tokenizer:
    if not proto:
        raise ValueError("empty")
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    continuation = sentencepiece.SentencePieceProcessor(model_proto=proto + _NO_DUMMY_PREFIX)
    if min(processor.bos_id(), processor.eos_id()) < 0 or not processor.is_byte(processor.piece_to_id("<0x00>")):
        raise ValueError("no <s>, no </s> or no byte fallback")

    def control_id(symbol: str) -> int | None:
        found = processor.piece_to_id(symbol)
        return found if processor.is_control(found) else None

    role_ids = {role: control_id(f"<|{role}|>") for role in ROLES}
    has_roles = None not in role_ids.values() and control_id(_END) is not None
    return Tokenizer(
        processor=processor,
        continuation=continuation,
        vocab_size=processor.get_piece_size(),
        bos_id=processor.bos_id(),
        eos_id=processor.eos_id(),
        role_ids=role_ids if has_roles else None,
        end_id=control_id(_END) if has_roles else None,
    )


def _without_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _vocabulary_problem(message: str, vocab_size: int) -> str:
    """The trainer's complaint in our words."""
    if limit := re.search(r"value <= (\d+)", message):
        return f"config.model.vocab_size={vocab_size}: too large for this text: at most {limit[1]}"
    if limit := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return f"config.model.vocab_size={vocab_size}: too small: this text needs at least {limit[1]}"
    return f"config.model.vocab_size={vocab_size}: cannot train such a tokenizer: {message}"


def _write(content: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
