"""What the JSON files beside a tokenizer say of it: special tokens, begin and end of a text, chat template.

Read are, where present, `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json`, `chat_template.jinja`,
`generation_config.json` and `config.json`, as transformers writes them, in old spellings and new.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from msn_jax import json_files
from msn_jax.cli import InputError
from msn_jax.data.chat_template import ChatTemplate

# What belongs to a tokenizer and is kept with it. `config.json` belongs to the model and is only read.
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
    """A text that is one token wherever it stands."""

    content: str
    id: int | None  # None where the tokenizer itself knows
    special: bool  # says nothing in decoded text
    lstrip: bool = False  # takes the white space on its left
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclasses.dataclass(frozen=True)
class SpecialTokens:
    """The files' answers, not yet brought together with a vocabulary."""

    names: dict[str, str]  # such as 'bos_token': '<s>'
    added: tuple[AddedToken, ...]  # by id
    stop_ids: tuple[int, ...]  # those of the generation config, or else of the model's config
    add_bos: bool | None  # None where nothing is said
    add_prefix_space: bool | None
    legacy: bool  # SentencePiece: text behind a special token begins with a space, as text at the start does
    template_source: str | None
    template_place: str
    described: bool  # whether there is more than a model of tokens

    def template(self, names: Mapping[str, str]) -> ChatTemplate | None:
        """The chat template, which is told of the special tokens `names` unless the files name others."""
        if self.template_source is None:
            return None
        return ChatTemplate(self.template_source, self.template_place, tuple({**names, **self.names}.items()))


def read_files(directory: Path) -> dict[str, bytes]:
    """The files of `directory` that belong to its tokenizer, by name.

    Where there is no generation config, one is added with the EOS ids of `config.json`, which stays behind.
    """
    names = [*FILES, *(f"additional_chat_templates/{path.name}" for path in _named_templates(directory))]
    files = {name: (directory / name).read_bytes() for name in names if (directory / name).is_file()}
    if "generation_config.json" not in files and (directory / "config.json").is_file():
        config = json_files.read(directory / "config.json")
        ids = {name: config[name] for name in ("bos_token_id", "eos_token_id") if config.get(name) is not None}
        if "eos_token_id" in ids:
            files["generation_config.json"] = json_files.dump(ids)
    return files


def parse(files: Mapping[str, bytes], directory: Path) -> SpecialTokens:
    """What `files`, from `read_files(directory)`, say. InputError names the file that is malformed."""

    def read(name: str) -> dict:
        return json_files.parse(files[name], f"{directory}/{name}") if name in files else {}

    config, generation = read("tokenizer_config.json"), read("generation_config.json")
    listed = read("special_tokens_map.json")
    names = {}
    for name in _NAMES:
        value = config.get(name) if config.get(name) is not None else listed.get(name)
        if value is not None:
            names[name] = _content(value, f"{directory}/tokenizer_config.json: {name}")
    source, place = _template(files, config, directory)
    return SpecialTokens(
        names=names,
        added=_added(config, read("added_tokens.json"), names, directory),
        stop_ids=_ids(generation.get("eos_token_id"), f"{directory}/generation_config.json: eos_token_id"),
        add_bos=config.get("add_bos_token"),
        add_prefix_space=config.get("add_prefix_space"),
        legacy=bool(config.get("legacy")),
        template_source=source,
        template_place=place,
        described=bool(config) or source is not None,
    )


def _template(files: Mapping[str, bytes], config: dict, directory: Path) -> tuple[str | None, str]:
    """The default chat template and its place. A file of its own comes first."""
    if "chat_template.jinja" in files:
        return _text(
            f"{directory}/chat_template.jinja", files["chat_template.jinja"]
        ), f"{directory}/chat_template.jinja"
    place = f"{directory}/tokenizer_config.json"
    source = config.get("chat_template")
    if isinstance(source, list):
        try:
            named = {entry["name"]: entry["template"] for entry in source}
        except (TypeError, KeyError) as error:
            raise InputError(f"{place}: chat_template: a list needs entries with 'name' and 'template'") from error
        source = next(iter(named.values())) if len(named) == 1 else named.get("default")
        if named and source is None:
            raise InputError(f"{place}: chat_template: none of {', '.join(map(str, named))} is named 'default'")
    if not isinstance(source, str | None):
        raise InputError(f"{place}: chat_template: found {type(source).__name__}: needs a text or a list")
    return source, place


def _added(config: dict, listed: dict, names: dict[str, str], directory: Path) -> tuple[AddedToken, ...]:
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
        raise InputError(f"{directory}/tokenizer_config.json: additional_special_tokens: needs a list")
    further = [*names.values(), *map(_content_or_none, additional)]
    for content in dict.fromkeys(further):
        if content and content not in {token.content for token in tokens}:
            tokens.append(AddedToken(content, None, special=True))
    return tuple(tokens)


def _content_or_none(value: object) -> str | None:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _content(value: object, place: str) -> str:
    content = _content_or_none(value)
    if content is None:
        raise InputError(f"{place}: found {value!r}: needs the token's text")
    return content


def _ids(value: object, place: str) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in ids):
        raise InputError(f"{place}: found {value!r}: needs an id or a list of ids")
    return tuple(ids)


def _named_templates(directory: Path) -> list[Path]:
    return sorted((directory / "additional_chat_templates").glob("*.jinja"))


def _text(place: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not UTF-8: {error}") from error
