"""A tokenizer's metadata from the JSON files in its directory: special tokens, BOS and EOS, chat template.

Reads `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`, `chat_template.jinja`,
`generation_config.json` and `config.json`, as far as they are present, in the old and new spellings of transformers.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from msn_jax import json_files
from msn_jax.cli import InputError
from msn_jax.data.chat_template import ChatTemplate

# The files that are stored with a tokenizer. `config.json` belongs to the model and is only read.
FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """A string that is one token wherever it occurs in a text."""

    content: str
    id: int | None  # None where only the tokenizer itself knows the id
    special: bool  # decodes to no text
    lstrip: bool = False  # includes the white space on its left
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """The files' metadata, not yet matched with a vocabulary."""

    names: dict[str, str]  # such as 'bos_token': '<s>'
    added: tuple[AddedToken, ...]  # by id
    named: frozenset[str]  # the tokens that the files name or mark as special
    stop_ids: tuple[int, ...]  # from the generation config, or else from the model's config
    add_bos: bool | None  # None where no file decides
    add_prefix_space: bool | None
    legacy: bool  # SentencePiece: text after a special token gets a dummy prefix, as text at the start does
    template_source: str | None
    template_location: str
    described: bool  # whether there are files other than the vocabulary

    def template(self, names: Mapping[str, str]) -> ChatTemplate | None:
        """The chat template. Its special tokens are those that the files name, or else `names`."""
        if self.template_source is None:
            return None
        return ChatTemplate(self.template_source, self.template_location, tuple({**names, **self.names}.items()))


def read_files(directory: Path) -> dict[str, bytes]:
    """The files of `directory` that belong to its tokenizer, by name.

    Where the generation config has no EOS ids, the copy of it gets those of `config.json`, which is not kept.

    Raises:
      InputError: names the file that is malformed.
    """
    names = [*FILES, *(f"additional_chat_templates/{path.name}" for path in _named_templates(directory))]
    files = {name: (directory / name).read_bytes() for name in names if (directory / name).is_file()}
    generation = {}
    if "generation_config.json" in files:
        generation = json_files.parse(files["generation_config.json"], f"{directory}/generation_config.json")
    if generation.get("eos_token_id") in (None, []) and (directory / "config.json").is_file():
        config = json_files.read(directory / "config.json")
        ids = {name: config[name] for name in ("bos_token_id", "eos_token_id") if config.get(name) is not None}
        if _ids(ids.get("eos_token_id"), f"{directory}/config.json: eos_token_id"):
            files["generation_config.json"] = json_files.dump({**ids, **_without_nulls(generation, ids)})
    return files


def _without_nulls(generation: dict, ids: dict) -> dict:
    """The generation config without the values that `ids` replaces."""
    return {name: value for name, value in generation.items() if name not in ids or value not in (None, [])}


def parse(files: Mapping[str, bytes], directory: Path) -> SpecialTokens:
    """The metadata in `files`, the result of `read_files(directory)`. InputError names the file that is malformed."""

    def read(name: str) -> dict:
        return json_files.parse(files[name], f"{directory}/{name}") if name in files else {}

    config, generation = read("tokenizer_config.json"), read("generation_config.json")
    listed = read("special_tokens_map.json")
    names = {}
    for name in _NAMES:
        value = config.get(name) if config.get(name) is not None else listed.get(name)
        if value is not None:
            names[name] = _content(value, f"{directory}/tokenizer_config.json: {name}")
    source, location = _template(files, config, directory)
    added, additional = _added(config, read("added_tokens.json"), names, directory)
    return SpecialTokens(
        names=names,
        added=added,
        named=frozenset([*names.values(), *additional, *(token.content for token in added if token.special)]),
        stop_ids=_ids(generation.get("eos_token_id"), f"{directory}/generation_config.json: eos_token_id"),
        add_bos=config.get("add_bos_token"),
        add_prefix_space=config.get("add_prefix_space"),
        legacy=bool(config.get("legacy")),
        template_source=source,
        template_location=location,
        described=bool(config) or source is not None,
    )


def _template(files: Mapping[str, bytes], config: dict, directory: Path) -> tuple[str | None, str]:
    """The default chat template and the file that holds it. `chat_template.jinja` takes precedence."""
    location = f"{directory}/chat_template.jinja"
    if "chat_template.jinja" in files:
        return _text(location, files["chat_template.jinja"]), location
    location = f"{directory}/tokenizer_config.json"
    source = config.get("chat_template")
    if isinstance(source, list):
        try:
            named = {entry["name"]: entry["template"] for entry in source}
        except (TypeError, KeyError) as error:
            raise InputError(f"{location}: chat_template: a list needs entries with 'name' and 'template'") from error
        source = next(iter(named.values())) if len(named) == 1 else named.get("default")
        if named and source is None:
            raise InputError(f"{location}: chat_template: none of {', '.join(map(str, named))} is named 'default'")
    if not isinstance(source, str | None):
        raise InputError(f"{location}: chat_template: is of type {type(source).__name__}; must be a string or a list")
    return source, location


def _added(
    config: dict, listed: dict, names: dict[str, str], directory: Path
) -> tuple[tuple[AddedToken, ...], list[str]]:
    """The added tokens, and those of them that `additional_special_tokens` lists."""
    flags = ("lstrip", "rstrip", "single_word", "normalized")
    try:
        added = {
            int(number): AddedToken(
                _content(entry, f"{directory}/tokenizer_config.json: added token {number}"),
                int(number),
                bool(entry.get("special")),
                *(bool(entry.get(flag)) for flag in flags),
            )
            for number, entry in (config.get("added_tokens_decoder") or {}).items()
        }
        known = {token.content for token in added.values()}
        for content, number in listed.items():
            if content not in known:
                added[int(number)] = AddedToken(content, int(number), special=content in names.values())
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        raise InputError(
            f"{directory}: malformed added tokens in tokenizer_config.json or added_tokens.json"
        ) from error
    tokens = [token for _, token in sorted(added.items())]
    additional = config.get("additional_special_tokens") or []
    if not isinstance(additional, list):
        raise InputError(f"{directory}/tokenizer_config.json: additional_special_tokens: must be a list")
    contents = [content for content in map(_content_or_none, additional) if content]
    for content in dict.fromkeys([*names.values(), *contents]):
        if content and content not in {token.content for token in tokens}:
            tokens.append(AddedToken(content, None, special=True))
    return tuple(tokens), contents


def _content_or_none(value: object) -> str | None:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _content(value: object, location: str) -> str:
    content = _content_or_none(value)
    if content is None:
        raise InputError(f"{location}: is {value!r}; must be the token's text")
    return content


def _ids(value: object, location: str) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in ids):
        raise InputError(f"{location}: is {value!r}; must be a token id or a list of token ids")
    return tuple(ids)


def _named_templates(directory: Path) -> list[Path]:
    return sorted((directory / "additional_chat_templates").glob("*.jinja"))


def _text(location: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{location}: not UTF-8: {error}") from error
