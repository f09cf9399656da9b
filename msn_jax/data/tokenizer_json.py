"""Tokenizers of the library `tokenizers`: a Hugging Face directory with a `tokenizer.json`.

A text is encoded as transformers encodes it: an added token that the text spells becomes that token, except in spans
that the caller declares literal.
"""

import copy
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers

from msn_jax.cli import InputError
from msn_jax.data.chat_template import ChatTemplate, Span
from msn_jax.data.special_tokens import AddedToken, SpecialTokens

_UNKNOWN = "\ufffd"
_SPACE_KEEPERS = (("normalizer", "Prepend"), ("decoder", "Strip"))  # they handle the space in front of a text
# The only added token of `JsonTokenizer._literal`: text after it is encoded as text after any other added token.
_BOUNDARY = "\U0010fffeboundary\U0010fffe"


@dataclasses.dataclass(frozen=True)
class JsonTokenizer:
    """A loaded `tokenizer.json`; its methods are those of `tokenizer.Tokenizer`."""

    # Without post-processor: adds nothing, and offsets are not trimmed.
    backend: tokenizers.Tokenizer = dataclasses.field(repr=False)
    continuation: tokenizers.Tokenizer = dataclasses.field(repr=False)  # the same without a space in front of a text
    vocab_size: int
    bos_id: int | None
    eos_id: int
    start_ids: tuple[int, ...]
    stop_ids: tuple[int, ...]
    special_ids: frozenset[int]
    control_tokens: frozenset[str]
    template: ChatTemplate | None
    files: dict[str, bytes] = dataclasses.field(repr=False)
    role_ids: None = None
    end_id: None = None

    @functools.cached_property
    def special_tokens(self) -> frozenset[str]:
        """The texts of the special tokens."""
        return frozenset(map(self._token, self.special_ids.union(self.stop_ids)))

    @functools.cached_property
    def added_tokens(self) -> frozenset[str]:
        """The texts of all added tokens."""
        return frozenset(token.content for token in self._added.values())

    def encode(self, text: str, start: bool = True, literal: Sequence[Span] = ()) -> list[int]:
        """Token ids of `text`; see `tokenizer.Tokenizer`."""
        return self._encode(without_surrogates(text), start, literal)[0]

    def encode_with_spans(self, text: str, literal: Sequence[Span] = ()) -> tuple[list[int], list[Span]]:
        """Token ids of `text` and the characters each covers; see `tokenizer.Tokenizer`."""
        return self._encode(without_surrogates(text), True, literal)

    def find_added_tokens(self, text: str, among: frozenset[str]) -> list[tuple[str, Span]]:
        """The added tokens that `text` spells; see `tokenizer.Tokenizer`."""
        if not self._normalizes and not any(token in text for token in among):
            return []
        text = without_surrogates(text)
        encoding = self.backend.encode(text, add_special_tokens=False)
        matches = []
        for i, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if i in self._added and self._added[i].content in among:
                spelled = text[start:stop]
                start += len(spelled) - len(spelled.lstrip())  # white space that the token takes along
                matches.append((self._added[i].content, (start, start + len(spelled.strip()))))
        return matches

    def decode(self, ids: Iterable[int], start: bool = True) -> str:
        """Text of any list of ids; see `tokenizer.Tokenizer`."""
        decoder = (self.backend if start else self.continuation).decoder
        tokens = [self._token(i) for i in map(int, ids) if i not in self.special_ids]
        return decoder.decode(tokens) if decoder is not None else "".join(tokens)

    @functools.cached_property
    def _added(self) -> dict[int, tokenizers.AddedToken]:
        return self.backend.get_added_tokens_decoder()

    @functools.cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        """`backend` with `_BOUNDARY` as its only added token; few texts need it, and it takes 0.15 s to build."""
        described = json.loads(self.files["tokenizer.json"])
        literal = tokenizers.Tokenizer.from_str(json.dumps({**described, "added_tokens": []}))
        _prepare(literal, ())
        literal.add_special_tokens([tokenizers.AddedToken(_BOUNDARY, normalized=False)])
        return literal

    @functools.cached_property
    def _normalizes(self) -> bool:
        """Whether an added token may match characters other than its own."""
        normalizer = json.loads(self.files["tokenizer.json"]).get("normalizer")
        is_empty = normalizer is None or normalizer.get("normalizers") == []
        return not is_empty and any(token.normalized for token in self._added.values())

    def _encode(self, text: str, start: bool, literal: Sequence[Span]) -> tuple[list[int], list[Span]]:
        encoding = (self.backend if start else self.continuation).encode(text, add_special_tokens=False)
        ids, spans = encoding.ids, encoding.offsets
        if not literal:
            return ids, spans
        # Between two added tokens outside of `literal`, the library encodes a stretch of text by itself.
        bounds = [i for i, one in enumerate(ids) if one in self._added and not _overlaps(spans[i], literal)]
        all_ids, all_spans, first, position = [], [], 0, 0
        for bound in [*bounds, len(ids)]:
            stop = spans[bound][0] if bound < len(ids) else len(text)
            if any(begin < stop and position < end for begin, end in literal):
                own_ids, own_spans = self._encode_literal(text, position, stop, literal, start)
            else:
                own_ids, own_spans = ids[first:bound], spans[first:bound]
            all_ids += [*own_ids, *ids[bound : bound + 1]]
            all_spans += [*own_spans, *spans[bound : bound + 1]]
            first, position = bound + 1, spans[bound][1] if bound < len(ids) else stop
        return all_ids, all_spans

    def _encode_literal(
        self, text: str, first: int, last: int, literal: Sequence[Span], start: bool
    ) -> tuple[list[int], list[Span]]:
        """Ids and spans of text[first:last], without any added token."""
        # A model may have a control token in its vocabulary and make it from characters: not from some of them.
        splits = [begin + 1 for begin, end in literal if first < begin + 1 < last]
        for bounds in ([first, last], [first, *splits, last]):
            ids, spans = [], []
            for begin, end in itertools.pairwise(bounds):
                is_start = begin == 0 and start
                stretch = text[begin:end] if is_start else _BOUNDARY + text[begin:end]
                encoding = self._literal.encode(stretch, add_special_tokens=False)
                skipped = 0 if is_start else 1
                shift = begin - skipped * len(_BOUNDARY)
                ids += encoding.ids[skipped:]
                spans += [(a + shift, b + shift) for a, b in encoding.offsets[skipped:]]
            pairs = zip(ids, spans, strict=True)
            forged = any(i in self._control_ids and _overlaps(span, literal) for i, span in pairs)
            if not forged and _BOUNDARY not in text:
                return ids, spans
        raise InputError(
            f"the tokenizer cannot spell {text[first:last][:40]!r} without its control tokens; remove them from the "
            "messages, or set parse_special_tokens to read them as tokens"
        )

    @functools.cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self._added.items() if token.content in self.control_tokens or token.special)

    def _token(self, number: int) -> str:
        token = self.backend.id_to_token(number) if 0 <= number < self.vocab_size else None
        return _UNKNOWN if token is None else token


def load(files: dict[str, bytes], special: SpecialTokens, path: Path) -> JsonTokenizer:
    """The tokenizer in a directory's files. InputError if it is damaged, or no file defines the end of sequence."""
    location = f"{path}/tokenizer.json" if path.is_dir() else str(path)
    try:
        described = json.loads(files["tokenizer.json"])
        backend = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        continuing = _without_prefix_space(described)
        continuation = backend if continuing == described else tokenizers.Tokenizer.from_str(json.dumps(continuing))
    except Exception as error:  # the library raises plain Exceptions
        raise InputError(f"{location}: not a tokenizer of the library tokenizers, or damaged: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    start_ids = _start_ids(backend)
    _prepare(backend, special.added)
    if continuation is not backend:
        _prepare(continuation, special.added)
    bos_id, eos_id = (backend.token_to_id(special.names.get(f"{name}_token", "")) for name in ("bos", "eos"))
    stop_ids = tuple(dict.fromkeys([*(() if eos_id is None else (eos_id,)), *special.stop_ids]))
    if not stop_ids:
        raise InputError(
            f"{location}: no end of sequence: eos_token in tokenizer_config.json or eos_token_id in "
            "generation_config.json must name it"
        )
    if special.add_bos is not None:
        start_ids = (bos_id,) if special.add_bos and bos_id is not None else ()
    added = backend.get_added_tokens_decoder()
    special_ids = {number for number, token in added.items() if token.special}
    control = {
        token.content for i, token in added.items() if token.special or i in stop_ids or token.content in special.named
    }
    return JsonTokenizer(
        backend=backend,
        continuation=continuation,
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        bos_id=bos_id,
        eos_id=stop_ids[0],
        start_ids=start_ids,
        stop_ids=stop_ids,
        special_ids=frozenset(special_ids),
        control_tokens=frozenset(control),
        template=special.template({}),
        files=files,
    )


def _prepare(backend: tokenizers.Tokenizer, added: tuple[AddedToken, ...]) -> None:
    """Adds the tokens that only the other files name, and disables truncation, padding and the post-processor."""
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = None
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in added:
        if token.content in known or (token.id is None and backend.token_to_id(token.content) is None):
            continue
        flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        backend.add_tokens([tokenizers.AddedToken(token.content, **flags)])


def _start_ids(backend: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The ids that the post-processor puts in front of a text. Those that it would append are no part of a prompt."""
    plain = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return tuple(full[:start])


def _without_prefix_space(described: dict) -> dict:
    """The same tokenizer without the space that some put in front of a text and remove again when decoding."""
    changed = copy.deepcopy({name: described.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")})
    for name, part in changed.items():
        parts = [part] if part else []
        while parts:
            one = parts.pop()
            for several in ("normalizers", "pretokenizers", "decoders"):
                if several in one:
                    one[several] = [each for each in one[several] if (name, each["type"]) not in _SPACE_KEEPERS]
                    parts += one[several]
            if one["type"] == "Metaspace":
                one["prepend_scheme"] = "never"
                one.pop("add_prefix_space", None)
            if one["type"] == "ByteLevel" and name == "pre_tokenizer":
                one["add_prefix_space"] = False
        if part and (name, part["type"]) in _SPACE_KEEPERS:
            changed[name] = None
    return {**described, **changed}


def _overlaps(span: Span, others: Sequence[Span]) -> bool:
    return any(first < span[1] and span[0] < last for first, last in others)


def without_surrogates(text: str) -> str:
    """The text with U+FFFD for every lone surrogate, which UTF-8 cannot represent."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
