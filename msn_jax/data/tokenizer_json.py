"""Tokenizers of the library `tokenizers`: a Hugging Face directory with a `tokenizer.json`.

Texts are encoded as transformers does: special tokens that stand in a text are those tokens, whoever wrote them.
"""

import copy
import dataclasses
import functools
import json
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from msn_jax.cli import InputError
from msn_jax.data.chat_template import ChatTemplate, Span
from msn_jax.data.special_tokens import AddedToken, SpecialTokens

_UNKNOWN = "\ufffd"
_SPACE_KEEPERS = (("normalizer", "Prepend"), ("decoder", "Strip"))  # of the space in front of a text


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
    template: ChatTemplate | None
    files: dict[str, bytes] = dataclasses.field(repr=False)
    role_ids: None = None
    end_id: None = None

    @functools.cached_property
    def special_tokens(self) -> frozenset[str]:
        """The texts of the special tokens."""
        return frozenset(map(self._token, self.special_ids.union(self.stop_ids)))

    def encode(self, text: str, start: bool = True) -> list[int]:
        """Token ids of `text`; see `tokenizer.Tokenizer`."""
        backend = self.backend if start else self.continuation
        return backend.encode(without_surrogates(text), add_special_tokens=False).ids

    def encode_with_spans(self, text: str) -> tuple[list[int], list[Span]]:
        """Token ids of `text` and the characters each stands for; see `tokenizer.Tokenizer`."""
        encoding = self.backend.encode(without_surrogates(text), add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Iterable[int], start: bool = True) -> str:
        """Text of any list of ids; see `tokenizer.Tokenizer`."""
        decoder = (self.backend if start else self.continuation).decoder
        tokens = [self._token(i) for i in map(int, ids) if i not in self.special_ids]
        return decoder.decode(tokens) if decoder is not None else "".join(tokens)

    def _token(self, number: int) -> str:
        token = self.backend.id_to_token(number) if 0 <= number < self.vocab_size else None
        return _UNKNOWN if token is None else token


def load(files: dict[str, bytes], special: SpecialTokens, path: Path) -> JsonTokenizer:
    """The tokenizer of a directory's files. InputError if it is damaged, or has no end of sequence."""
    place = f"{path}/tokenizer.json" if path.is_dir() else str(path)
    try:
        described = json.loads(files["tokenizer.json"])
        backend = tokenizers.Tokenizer.from_buffer(files["tokenizer.json"])
        continuing = _without_prefix_space(described)
        continuation = backend if continuing == described else tokenizers.Tokenizer.from_str(json.dumps(continuing))
    except Exception as error:  # the library raises plain Exceptions
        raise InputError(f"{place}: not a tokenizer of the library tokenizers, or damaged: {error}") from error
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
            f"{place}: no end of sequence: eos_token in tokenizer_config.json or eos_token_id in "
            "generation_config.json must name it"
        )
    if special.add_bos is not None:
        start_ids = (bos_id,) if special.add_bos and bos_id is not None else ()
    special_ids = {number for number, token in backend.get_added_tokens_decoder().items() if token.special}
    return JsonTokenizer(
        backend=backend,
        continuation=continuation,
        vocab_size=max(backend.get_vocab(with_added_tokens=True).values()) + 1,
        bos_id=bos_id,
        eos_id=stop_ids[0],
        start_ids=start_ids,
        stop_ids=stop_ids,
        special_ids=frozenset(special_ids),
        template=special.template({}),
        files=files,
    )


def _prepare(backend: tokenizers.Tokenizer, added: tuple[AddedToken, ...]) -> None:
    """Gives a tokenizer the tokens that only the other files know, and takes away what would change its results."""
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
    """What the post-processor puts in front of a text. What it would put behind is no part of a prompt."""
    plain = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    return tuple(full[:start])


def _without_prefix_space(described: dict) -> dict:
    """The same tokenizer, but for the space that some put in front of a text and take off again."""
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


def without_surrogates(text: str) -> str:
    """The text with U+FFFD for every lone surrogate, which no UTF-8 can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
