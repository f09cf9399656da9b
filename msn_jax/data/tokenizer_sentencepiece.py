"""Tokenizers of the library `sentencepiece`: our own, and the `tokenizer.model` of a Hugging Face directory."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

import sentencepiece

from msn_jax.cli import InputError
from msn_jax.data.chat_template import ChatTemplate, Span
from msn_jax.data.special_tokens import AddedToken, SpecialTokens
from msn_jax.data.tokenizer_json import without_surrogates

ROLES = ("system", "user", "assistant")
END = "<|end|>"

_SPACE = "\u2581"  # how SentencePiece writes a space
# `normalizer_spec { add_dummy_prefix: false }` in protobuf's wire format; appended to a model, it overrides the field.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


@dataclasses.dataclass(frozen=True)
class SentencePieceTokenizer:
    """A loaded SentencePiece model; its methods are those of `tokenizer.Tokenizer`."""

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
    added: tuple[AddedToken, ...] = ()  # matched in texts; every id is known
    control_tokens: frozenset[str] = frozenset()
    symbols: frozenset[str] = frozenset()  # user-defined pieces, which the model itself matches in texts, if described
    prefixed: bool = True  # False: text at the start gets no dummy prefix, even if the model's normalizer adds one
    prefixed_after_added: bool = False  # the same for text after one of `added`

    @property
    def special_tokens(self) -> frozenset[str]:
        """The texts of the special tokens."""
        return frozenset(token.content for token in self.added if token.special)

    @functools.cached_property
    def added_tokens(self) -> frozenset[str]:
        """The texts of all added tokens."""
        return frozenset(token.content for token in self.added) | self.symbols

    def encode(self, text: str, start: bool = True, literal: Sequence[Span] = ()) -> list[int]:
        """Token ids of `text`; see `tokenizer.Tokenizer`."""
        return [i for ids, _, _ in self._segments(without_surrogates(text), start, literal) for i in ids]

    def encode_with_spans(self, text: str, literal: Sequence[Span] = ()) -> tuple[list[int], list[Span]]:
        """Token ids of `text` and the characters each covers; see `tokenizer.Tokenizer`."""
        all_ids, spans = [], []
        for ids, segment, first in self._segments(without_surrogates(text), True, literal):
            all_ids += ids
            is_added = len(ids) == 1 and ids[0] in self._added_ids
            own_spans = [(0, len(segment))] if is_added else self._spans(ids, segment)
            spans += [(first + begin, first + end) for begin, end in own_spans]
        return all_ids, spans

    def find_added_tokens(self, text: str, among: frozenset[str]) -> list[tuple[str, Span]]:
        """The added tokens that `text` spells; see `tokenizer.Tokenizer`."""
        if not any(token in text for token in among):
            return []
        return [(match[0], match.span()) for match in self._any_token.finditer(text) if match[0] in among]

    def decode(self, ids: Iterable[int], start: bool = True) -> str:
        """Text of any list of ids; see `tokenizer.Tokenizer`."""
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

    @functools.cached_property
    def _any_token(self) -> re.Pattern:
        """Finds `added_tokens`, the longest first."""
        return re.compile("|".join(map(re.escape, sorted(self.added_tokens, key=len, reverse=True))))

    def _segments(self, text: str, start: bool, literal: Sequence[Span]) -> Iterator[tuple[list[int], str, int]]:
        """(ids, their text, where it begins) of the parts of `text`: added tokens and the text between them."""
        position, prefixed = 0, start and self.prefixed
        for match in self._pattern.finditer(text) if self.added else ():
            if any(first < match.end() and match.start() < last for first, last in literal):
                continue
            if match.start() > position:
                yield from self._plain_segments(text, position, match.start(), prefixed, literal)
            yield [self._contents[self._content(match)]], match[0], match.start()
            position, prefixed = match.end(), self.prefixed_after_added
        if position < len(text):
            yield from self._plain_segments(text, position, len(text), prefixed, literal)

    def _plain_segments(
        self, text: str, first: int, last: int, prefixed: bool, literal: Sequence[Span]
    ) -> Iterator[tuple[list[int], str, int]]:
        """Segments of text[first:last] without added tokens; several where a literal span has to be broken up."""
        inside = [(begin, end) for begin, end in literal if first <= begin < last]
        splits = [begin + 1 for begin, _ in inside if begin + 1 < last]
        has_symbols = any(text[begin:end] in self.symbols for begin, end in inside)
        for bounds in ([first, *splits, last],) if has_symbols else ([first, last], [first, *splits, last]):
            segments = []
            for begin, end in itertools.pairwise(bounds):
                segment = text[begin:end]
                segments.append((self._encode_plain(segment, prefixed and begin == first), segment, begin))
            # SentencePiece matches symbols and joins characters to pieces within a text, never across two of them.
            if not splits or not any(i in self._control_ids for ids, _, _ in segments for i in ids):
                yield from segments
                return
        raise InputError(
            f"the tokenizer cannot spell {text[first:last][:40]!r} without its control tokens; remove them from the "
            "messages, or set parse_special_tokens to read them as tokens"
        )

    def _content(self, match: re.Match) -> str:
        """The added token of a match, without the white space that it includes."""
        return match[0] if match[0] in self._contents else match[0].strip()

    @functools.cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(token.id for token in self.added if token.content in self.control_tokens)

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
        spelled, expected = b"".join(pieces), text.encode()
        prefix = int(spelled == b" " + expected)
        if not prefix and spelled != expected:
            raise InputError(
                "this SentencePiece model normalizes text, so its tokens cannot be aligned with the assistant's part "
                "of a chat; train on prompt and response records"
            )
        character = [i for i, one in enumerate(text) for _ in one.encode()]
        spans, position = [], -prefix
        for piece in pieces:
            first, position = max(position, 0), position + len(piece)
            spans.append((character[first], character[position - 1] + 1) if position > first else (0, 0))
        return spans

    def _surface(self, number: int) -> bytes:
        """The bytes that a piece spells."""
        piece = self.processor.id_to_piece(number)
        if self.processor.is_byte(number):
            return bytes([int(piece[1:-1], 16)])
        return piece.replace(_SPACE, " ").encode()


def from_proto(files: dict[str, bytes], special: SpecialTokens) -> SentencePieceTokenizer:
    """The tokenizer of `files`, with the metadata `special`. ValueError or RuntimeError if the model is unusable."""
    proto = files["tokenizer.model"]
    if not proto:
        raise ValueError("empty")
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    continuation = sentencepiece.SentencePieceProcessor(model_proto=proto + _NO_DUMMY_PREFIX)
    if min(processor.bos_id(), processor.eos_id()) < 0 or not processor.is_byte(processor.piece_to_id("<0x00>")):
        raise ValueError("no <s>, no </s> or no byte fallback")

    def control_id(symbol: str) -> int | None:
        number = processor.piece_to_id(symbol)
        return number if processor.is_control(number) else None

    role_ids = {role: control_id(f"<|{role}|>") for role in ROLES}
    has_roles = None not in role_ids.values() and control_id(END) is not None
    added = _added_tokens(processor, special) if special.described else ()
    ids = {token.content: token.id for token in added}
    bos_id = ids.get(special.names.get("bos_token"), processor.bos_id())
    eos_id = ids.get(special.names.get("eos_token"), processor.eos_id())
    ends = [eos_id, *special.stop_ids, *([control_id(END)] if has_roles else [])]
    return SentencePieceTokenizer(
        processor=processor,
        continuation=continuation,
        vocab_size=max([processor.get_piece_size(), *(token.id + 1 for token in added)]),
        bos_id=bos_id,
        eos_id=eos_id,
        start_ids=() if special.add_bos is False else (bos_id,),
        stop_ids=tuple(dict.fromkeys(ends)),
        role_ids=role_ids if has_roles else None,
        end_id=control_id(END) if has_roles else None,
        files=dict(files),
        template=special.template({f"{name}_token": piece for name, piece in _own_names(processor).items()}),
        added=added,
        control_tokens=frozenset(
            token.content for token in added if token.special or token.content in special.named or token.id in ends
        ),
        symbols=_user_defined(proto) - {token.content for token in added} if special.described else frozenset(),
        prefixed=special.add_prefix_space is not False,
        prefixed_after_added=special.legacy and special.add_prefix_space is not False,
    )


def _user_defined(proto: bytes) -> frozenset[str]:
    """The pieces of type USER_DEFINED in a serialized ModelProto: field 1 of the model; fields 1 and 3 of a piece."""
    symbols = set()
    for number, value in _fields(proto):
        if number == 1 and isinstance(value, bytes):
            piece = dict(_fields(value))
            if piece.get(3) == 4:
                symbols.add(piece[1].decode())
    return frozenset(symbols)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of the fields of a message in protobuf's wire format."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            value, shift, position = value | (byte & 127) << shift, shift + 7, position + 1
            if byte < 128:
                return value

    while position < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        else:
            size = {1: 8, 5: 4}.get(key & 7) or varint()
            yield key >> 3, message[position : position + size]
            position += size


def _own_names(processor: sentencepiece.SentencePieceProcessor) -> dict[str, str]:
    """The pieces that the model itself uses as special tokens."""
    ids = {name: getattr(processor, f"{name}_id")() for name in ("bos", "eos", "unk")}
    return {name: processor.id_to_piece(i) for name, i in ids.items() if i >= 0}


def _added_tokens(processor: sentencepiece.SentencePieceProcessor, special: SpecialTokens) -> tuple[AddedToken, ...]:
    """The tokens that other files add to the model or name as special, except names without an id."""
    known = {token.content: token for token in special.added}
    for piece in _own_names(processor).values():
        known.setdefault(piece, AddedToken(piece, None, special=True))
    added = []
    for token in known.values():
        number = processor.piece_to_id(token.content)
        in_model = processor.id_to_piece(number) == token.content
        if token.id is not None or in_model:
            added.append(dataclasses.replace(token, id=number if in_model else token.id))
    return tuple(added)
