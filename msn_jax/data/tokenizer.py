"""Tokenizers: our own SentencePiece models, and those of Hugging Face directories, behind one interface.

Our own is a SentencePiece BPE with byte fallback, trained on the corpus itself. Text is never normalised, so that for
any Unicode text `decode(encode(text)) == text`. Whatever the vocabulary lacks is spelled in bytes, and so is U+2581,
which SentencePiece uses for the space and would hand back as one. Runs of spaces are pieces of their own: indentation
is cheap. Control symbols (`<s>`, `</s>`, the roles, `<|end|>`) have ids but no text: `encode` never makes one, whatever
the text says, and `decode` skips them.

Models of others have no role symbols, but may have a chat template (`chat_template.py`):

    tokenizer.json    by the library `tokenizers` (`tokenizer_json.py`); comes first where a directory has both
    tokenizer.model   SentencePiece. Alone it is read as ours are. Where other files describe it, the special tokens
                      that they name are those tokens wherever they stand in a text, as in transformers.

A dummy prefix (a space in front of every text) is honoured.
"""

import dataclasses
import functools
import io
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece

from msn_jax.cli import InputError
from msn_jax.data import special_tokens, tokenizer_json
from msn_jax.data.chat_template import ChatTemplate, Span
from msn_jax.data.special_tokens import AddedToken, SpecialTokens
from msn_jax.data.tokenizer_json import without_surrogates

ROLES = ("system", "user", "assistant")

_END = "<|end|>"
_SPACE = "\u2581"  # how SentencePiece writes a space
# `normalizer_spec { add_dummy_prefix: false }` in protobuf's wire format: appended to a model, it overrides that field.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
_UNTRAINABLE = re.compile("[\0\u2581\u2585]+")  # the trainer skips or misreads text with these
_CHUNK = 4096  # characters: the trainer sees texts in chunks of this length
_MAX_CHUNKS = 4096  # the trainer sees at most this many (2 s of work), spread evenly over the texts


class Tokenizer(Protocol):
    """What the rest of the project needs of a tokenizer; made by `load` or `train`."""

    vocab_size: int  # ids are below it; a model may have more, unused
    start_ids: tuple[int, ...]  # in front of raw text: BOS, or nothing
    eos_id: int
    stop_ids: tuple[int, ...]  # end an answer; `eos_id` comes first
    role_ids: dict[str, int] | None  # of ROLES; None in models of others
    end_id: int | None  # closes a turn where there are roles
    template: ChatTemplate | None
    special_tokens: frozenset[str]  # texts that `encode` takes for tokens without text
    files: dict[str, bytes]  # by name

    def encode(self, text: str, start: bool = True) -> list[int]:
        """Token ids of `text`, without `start_ids`.

        Args:
          text: any text. A lone surrogate, which no UTF-8 can hold, becomes U+FFFD.
          start: False where `text` continues other text, so that a model with a dummy prefix does not add a space.
        """

    def encode_with_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Token ids of `text`, and for each the characters [from, to) that it stands for.

        Tokens that together spell a character all stand for it, and a dummy prefix stands for none.

        Raises:
          InputError: the model changes the text before it cuts it, and does not tell how.
        """

    def decode(self, ids: Iterable[int], start: bool = True) -> str:
        """Text of any list of ids: special ids say nothing, unknown ids and incomplete UTF-8 become U+FFFD.

        Args:
          ids: any integers.
          start: False where the text continues other text: a model with a dummy prefix then keeps its first space.
        """


@dataclasses.dataclass(frozen=True)
class SentencePieceTokenizer:
    """A loaded SentencePiece model; its methods are those of `Tokenizer`."""

    processor: sentencepiece.SentencePieceProcessor
    continuation: sentencepiece.SentencePieceProcessor  # the same model without dummy prefix
    vocab_size: int
    bos_id: int
    eos_id: int
    start_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    role_ids: dict[str, int] | None
    end_id: int | None
    files: dict[str, bytes] = dataclasses.field(repr=False)
    template: ChatTemplate | None = None
    added: tuple[AddedToken, ...] = ()  # found in texts; every id is known
    prefixed: bool = True  # the model's own answer whether a text at the start gets a dummy prefix
    prefixed_behind_special: bool = False  # and text behind one of `added`

    @property
    def special_tokens(self) -> frozenset[str]:
        """The texts of the special tokens."""
        return frozenset(token.content for token in self.added if token.special)

    def encode(self, text: str, start: bool = True) -> list[int]:
        """Token ids of `text`; see `Tokenizer`."""
        return [i for ids, _, _ in self._segments(without_surrogates(text), start) for i in ids]

    def encode_with_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Token ids of `text` and the characters each stands for; see `Tokenizer`."""
        all_ids, spans = [], []
        for ids, segment, first in self._segments(without_surrogates(text), True):
            all_ids += ids
            is_added = len(ids) == 1 and ids[0] in self._added_ids
            found = [(0, len(segment))] if is_added else self._spans(ids, segment)
            spans += [(first + begin, first + end) for begin, end in found]
        return all_ids, spans

    def decode(self, ids: Iterable[int], start: bool = True) -> str:
        """Text of any list of ids; see `Tokenizer`."""
        unknown, size = self.processor.unk_id(), self.processor.get_piece_size()
        texts, run = [], []
        processor = self.processor if start and self.prefixed else self.continuation
        for i in map(int, ids):
            token = self._added_ids.get(i)
            if token is None:
                run.append(i if 0 <= i < size else unknown)
            elif not token.special:
                texts += [processor.decode(run), token.content]
                run, processor = [], self.continuation
        return "".join([*texts, processor.decode(run)])

    @functools.cached_property
    def _added_ids(self) -> dict[int, AddedToken]:
        return {token.id: token for token in self.added}

    @functools.cached_property
    def _pattern(self) -> re.Pattern:
        """Finds the texts of `added`, the longest first."""
        texts = sorted(self.added, key=lambda token: -len(token.content))
        spaces = {True: r"\s*", False: ""}
        return re.compile("|".join(spaces[t.lstrip] + re.escape(t.content) + spaces[t.rstrip] for t in texts))

    def _segments(self, text: str, start: bool) -> Iterator[tuple[list[int], str, int]]:
        """(ids, their text, where it begins) of the parts of `text`: added tokens and what is between."""
        position, prefixed = 0, start and self.prefixed
        for match in self._pattern.finditer(text) if self.added else ():
            if match.start() > position:
                segment = text[position : match.start()]
                yield self._encode_plain(segment, prefixed), segment, position
            content = match[0] if match[0] in self._contents else match[0].strip()
            yield [self._contents[content]], match[0], match.start()
            position, prefixed = match.end(), self.prefixed_behind_special
        if position < len(text):
            yield self._encode_plain(text[position:], prefixed), text[position:], position

    @functools.cached_property
    def _contents(self) -> dict[str, int]:
        return {token.content: token.id for token in self.added}

    def _encode_plain(self, text: str, prefixed: bool) -> list[int]:
        first, *rest = text.split(_SPACE)
        ids = (self.processor if prefixed else self.continuation).encode(first)
        spelled = [self.processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        for part in rest:
            ids += spelled + self.continuation.encode(part)
        return ids

    def _spans(self, ids: list[int], text: str) -> list[Span]:
        pieces = [self._surface(i) for i in ids]
        spoken, expected = b"".join(pieces), text.encode()
        prefix = int(spoken == b" " + expected)
        if not prefix and spoken != expected:
            raise InputError(
                "this SentencePiece model changes texts before it cuts them: it cannot be trained on chats"
            )
        character = [i for i, one in enumerate(text) for _ in one.encode()]
        spans, position = [], -prefix
        for piece in pieces:
            first, position = max(position, 0), position + len(piece)
            spans.append((character[first], character[position - 1] + 1) if position > first else (0, 0))
        return spans

    def _surface(self, number: int) -> bytes:
        """The bytes that a piece stands for."""
        piece = self.processor.id_to_piece(number)
        if self.processor.is_byte(number):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace(_SPACE, " ").encode()


def load(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer at `path`: a training workdir, a Hugging Face directory, or one `tokenizer.model` or `.json` alone.

    Raises:
      InputError: a file that is missing, damaged or malformed, or no end of sequence anywhere.
    """
    path = Path(path)
    if not path.is_dir():
        name = "tokenizer.json" if path.suffix == ".json" else "tokenizer.model"
        files, place = {name: _read(path)}, path
        if name == "tokenizer.json":
            raise InputError(f"{path}: name its directory: the files beside it say which token ends a text")
    else:
        files, place = special_tokens.read_files(path), path / "tokenizer.model"
    described = special_tokens.parse(files, path)
    if "tokenizer.json" in files:
        return tokenizer_json.load(files, described, path)
    if "tokenizer.model" not in files:
        raise InputError(f"{path}: no tokenizer here, neither tokenizer.json nor tokenizer.model")
    try:
        return _from_proto(files, described)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{place}: not a SentencePiece model with byte fallback, <s> and </s>, or damaged") from error


def save(tokenizer: Tokenizer, directory: str | os.PathLike) -> None:
    """Writes the tokenizer's files into `directory`, as they were, each whole or not at all; others it had there go."""
    directory = Path(directory)
    for name in special_tokens.FILES:
        if name not in tokenizer.files:
            (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / "additional_chat_templates", ignore_errors=True)
    for name, content in tokenizer.files.items():
        _write(content, directory / name)


def check_fits(tokenizer: Tokenizer, vocab_size: int, source: str) -> None:
    """Refuses a tokenizer from `source` that a model of `vocab_size` ids cannot use.

    Our own have as many as their model. Those of others have no more: models are often padded with unused ids.

    Raises:
      InputError: names both sizes.
    """
    own = tokenizer.role_ids is not None
    if tokenizer.vocab_size > vocab_size or (own and tokenizer.vocab_size < vocab_size):
        raise InputError(
            f"{source}: the tokenizer has a vocabulary of {tokenizer.vocab_size}, the model one of {vocab_size} "
            "(config.model.vocab_size)"
        )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read the tokenizer: {error.strerror}") from error


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
            sentence_iterator=(without_surrogates(chunk) for chunk in chunks[::stride]),
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
    return _from_proto({"tokenizer.model": proto.getvalue()}, special_tokens.parse({}, Path(path).parent))


def _from_proto(files: dict[str, bytes], special: SpecialTokens) -> SentencePieceTokenizer:
    proto = files["tokenizer.model"]
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
    added = _added_tokens(processor, special) if special.described else ()
    ids = {token.content: token.id for token in added}
    bos_id = ids.get(special.names.get("bos_token"), processor.bos_id())
    eos_id = ids.get(special.names.get("eos_token"), processor.eos_id())
    ends = [eos_id, *special.stop_ids, *([control_id(_END)] if has_roles else [])]
    return SentencePieceTokenizer(
        processor=processor,
        continuation=continuation,
        vocab_size=max([processor.get_piece_size(), *(token.id + 1 for token in added)]),
        bos_id=bos_id,
        eos_id=eos_id,
        start_ids=() if special.add_bos is False else (bos_id,),
        stop_ids=tuple(dict.fromkeys(ends)),
        role_ids=role_ids if has_roles else None,
        end_id=control_id(_END) if has_roles else None,
        files=dict(files),
        template=special.template({f"{name}_token": piece for name, piece in _own_names(processor).items()}),
        added=added,
        prefixed=special.add_prefix_space is not False,
        prefixed_behind_special=special.legacy and special.add_prefix_space is not False,
    )


def _own_names(processor: sentencepiece.SentencePieceProcessor) -> dict[str, str]:
    """The pieces that the model itself uses as special tokens."""
    ids = {name: getattr(processor, f"{name}_id")() for name in ("bos", "eos", "unk")}
    return {name: processor.id_to_piece(i) for name, i in ids.items() if i >= 0}


def _added_tokens(processor: sentencepiece.SentencePieceProcessor, special: SpecialTokens) -> tuple[AddedToken, ...]:
    """The tokens that other files add to the model, or name as special. Names without an id are no tokens."""
    known = {token.content: token for token in special.added}
    for piece in _own_names(processor).values():
        known.setdefault(piece, AddedToken(piece, None, special=True))
    added = []
    for token in known.values():
        found = processor.piece_to_id(token.content)
        in_model = processor.id_to_piece(found) == token.content
        if token.id is not None or in_model:
            added.append(dataclasses.replace(token, id=found if in_model else token.id))
    return tuple(added)


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
