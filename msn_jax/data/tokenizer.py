"""Tokenizers with one interface: SentencePiece models trained by this project, and those of Hugging Face directories.

Our own tokenizer is a SentencePiece BPE with byte fallback, trained on the corpus itself. It never normalizes text, so
`decode(encode(text)) == text` for any Unicode text. Characters outside the vocabulary are spelled in bytes, and so is
U+2581, which SentencePiece uses for the space and would decode to one. Runs of spaces are pieces, so that indentation
takes few tokens. Control symbols (`<s>`, `</s>`, the roles, `<|end|>`) have ids but no text: `encode` never produces
one, whatever the text spells, and `decode` skips them.

Tokenizers of Hugging Face directories have no role symbols, but may have a chat template (`chat_template.py`):

    tokenizer.json    loaded with the library `tokenizers` (`tokenizer_json.py`); takes precedence over the other
    tokenizer.model   SentencePiece. A model alone is read as ours are. Where other files describe it, the added tokens
                      that they name are matched anywhere in a text, as in transformers.
    FILE.gguf         becomes a tokenizer.json in memory (`gguf/tokenizer_files.py`)

A dummy prefix (a space that the model puts in front of every text) is preserved.
"""

import io
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece

from msn_jax.cli import InputError
from msn_jax.data import special_tokens, tokenizer_json, tokenizer_sentencepiece
from msn_jax.data.chat_template import ChatTemplate, Span
from msn_jax.data.tokenizer_json import without_surrogates
from msn_jax.data.tokenizer_sentencepiece import END, ROLES
from msn_jax.gguf import container, tokenizer_files

_UNTRAINABLE = re.compile("[\0\u2581\u2585]+")  # the trainer skips or misreads text with these
_CHUNK = 4096  # characters: the trainer sees texts in chunks of this length
_MAX_CHUNKS = 4096  # the trainer sees at most this many (2 s of work), spread evenly over the texts


class Tokenizer(Protocol):
    """A tokenizer, as the rest of the project uses it; made by `load` or `train`."""

    vocab_size: int  # ids are below it; the model's vocabulary may be larger
    start_ids: tuple[int, ...]  # put in front of raw text: BOS, or nothing
    eos_id: int
    stop_ids: tuple[int, ...]  # end an output; `eos_id` comes first
    role_ids: dict[str, int] | None  # of ROLES; None in Hugging Face tokenizers
    end_id: int | None  # closes a turn, for tokenizers with roles
    template: ChatTemplate | None
    special_tokens: frozenset[str]  # strings whose tokens decode to no text, or stop generation
    added_tokens: frozenset[str]  # all strings that `encode` matches as one token wherever they occur
    control_tokens: frozenset[str]  # added tokens that are special, named by the files (BOS, EOS, ...), or stop tokens
    files: dict[str, bytes]  # by name

    def encode(self, text: str, start: bool = True, literal: Sequence[Span] = ()) -> list[int]:
        """Token ids of `text`, without `start_ids`.

        Args:
          text: any text. A lone surrogate, which UTF-8 cannot represent, becomes U+FFFD.
          start: False where `text` continues other text, so that a model with a dummy prefix does not add a space.
          literal: characters in which added tokens are not matched: they are encoded as text.

        Raises:
          InputError: the vocabulary cannot spell one of the `literal` spans without a control token.
        """

    def encode_with_spans(self, text: str, literal: Sequence[Span] = ()) -> tuple[list[int], list[Span]]:
        """Token ids of `text` as from `encode`, and for each the characters [from, to) that it covers.

        Tokens that together spell one character all cover it, and a dummy prefix covers none.

        Raises:
          InputError: also if the model normalizes the text, so that tokens cannot be aligned with characters.
        """

    def find_added_tokens(self, text: str, among: frozenset[str]) -> list[tuple[str, Span]]:
        """The added tokens in `among` that `encode` matches in `text`, in order, each with the characters it covers."""

    def decode(self, ids: Iterable[int], start: bool = True) -> str:
        """Text of any list of ids: special ids decode to nothing, unknown ids and incomplete UTF-8 to U+FFFD.

        Args:
          ids: any integers.
          start: False where the text continues other text: a model with a dummy prefix then keeps its first space.
        """


def load(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer at `path`: a training workdir, a Hugging Face directory, a GGUF file, or a `tokenizer.model` alone.

    Raises:
      InputError: a file is missing, damaged or malformed, or no file defines the end of sequence.
    """
    path = Path(path)
    if container.is_gguf(path):
        files, location = tokenizer_files.tokenizer_files(path), path
    elif not path.is_dir():
        name = "tokenizer.json" if path.suffix == ".json" else "tokenizer.model"
        files, location = {name: _read(path)}, path
        if name == "tokenizer.json":
            raise InputError(f"{path}: name its directory: other files there define which token ends a text")
    else:
        files, location = special_tokens.read_files(path), path / "tokenizer.model"
    described = special_tokens.parse(files, path)
    if "tokenizer.json" in files:
        return tokenizer_json.load(files, described, path)
    if "tokenizer.model" not in files:
        raise InputError(f"{path}: no tokenizer: neither tokenizer.json nor tokenizer.model")
    try:
        return tokenizer_sentencepiece.from_proto(files, described)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"{location}: not a SentencePiece model with byte fallback, <s> and </s>, or damaged"
        ) from error


def save(tokenizer: Tokenizer, directory: str | os.PathLike) -> None:
    """Writes the tokenizer's files into `directory`, unchanged and each atomically; removes other tokenizer files.

    Raises:
      InputError: a directory has the name of such a file.
    """
    directory = Path(directory)
    for name in special_tokens.FILES:
        _refuse_directory(directory / name)
        if name not in tokenizer.files:
            (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / "additional_chat_templates", ignore_errors=True)
    for name, content in tokenizer.files.items():
        _write(content, directory / name)


def check_fits(tokenizer: Tokenizer, vocab_size: int, source: str) -> None:
    """Refuses a tokenizer from `source` that a model of `vocab_size` ids cannot use.

    Our own tokenizers have exactly `vocab_size` ids. Others have at most as many: models often pad the vocabulary.

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

    The result is deterministic. Of more than 16 million characters, an even sample is used.

    Raises:
      InputError: `vocab_size` is too small for the bytes, control symbols and characters of the texts, or larger than
        the number of pieces that the texts yield.
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
            control_symbols=[f"<|{role}|>" for role in ROLES] + [END],
            num_threads=2,  # the result does not depend on it
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(_vocabulary_problem(str(error), vocab_size)) from error
    _write(proto.getvalue(), Path(path))
    return tokenizer_sentencepiece.from_proto(
        {"tokenizer.model": proto.getvalue()}, special_tokens.parse({}, Path(path).parent)
    )


def _vocabulary_problem(message: str, vocab_size: int) -> str:
    """The trainer's error message in terms of our config."""
    if limit := re.search(r"value <= (\d+)", message):
        return f"config.model.vocab_size={vocab_size}: too large for this text: at most {limit[1]}"
    if limit := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return f"config.model.vocab_size={vocab_size}: too small: this text needs at least {limit[1]}"
    return f"config.model.vocab_size={vocab_size}: cannot train such a tokenizer: {message}"


def _refuse_directory(path: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path}: is a directory, where a file of the tokenizer goes: remove it")


def _write(content: bytes, path: Path) -> None:
    _refuse_directory(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
