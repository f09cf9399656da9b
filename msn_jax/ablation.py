"""Ablations: grids of training and decoding settings with seeds, as the files of `configs/ablations/` describe them.

Every setting is trained once per seed; `config.train.seed` drives the order of the data, the noise, and the start of a
new adapter. Then it decodes the same prompts with every `Decoding`. `ablate.py` runs a grid.
"""

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from msn_jax import config, pretrained, request_files
from msn_jax.cli import InputError
from msn_jax.config import Config
from msn_jax.decode import engine
from msn_jax.decode.request import Request
from msn_jax.decode.tree import TokenTree

OWN = "own"  # in place of a directory: the model that the run has trained


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of the grid: a model to train and decode with, or a finished one to decode with."""

    factors: dict  # the value of each factor
    config: Config | None = None  # what to train; the seed is set for every run; None: nothing
    base: str = ""  # one of `Ablation.bases`, which the training starts from; '' is `config.train.init_from`
    model: str = ""  # without `config`: the model's directory
    adapter: str = ""  # without `config`: the directory of an adapter, or ''
    max_new_tokens: int | None = None  # in place of the ablation's

    @property
    def name(self) -> str:
        """The directory of the setting's runs."""
        return slug("_".join(f"{factor}-{value}" for factor, value in self.factors.items()))


@dataclasses.dataclass(frozen=True)
class Decoding:
    """A way to decode."""

    decoder: str
    tree: TokenTree | None = None  # None: the decoder's default
    tree_name: str | None = None  # in the report
    name: str = ""  # in the report; '' is the decoder's
    model: str = OWN  # whose text it is: the run's model, or the one in this directory
    draft: str | None = None  # of 'draft_model': the small model, `OWN` or a directory

    @property
    def label(self) -> str:
        """The decoding's name in the report."""
        return self.name or self.decoder


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What the models continue."""

    # A JSONL file as for `generate --prompts`. '': the beginnings of held-out records of the setting's training data
    # (`held_out.py`).
    path: str = ""
    count: int | None = None  # the first ones of the file; of held-out records, in a fixed random order; None: all


@dataclasses.dataclass(frozen=True)
class Ablation:
    """A grid."""

    name: str
    factors: tuple[str, ...]  # that vary between settings, in the order of the report
    settings: tuple[Setting, ...]
    seeds: tuple[int, ...]
    decodings: tuple[Decoding, ...]
    prompts: Prompts
    max_new_tokens: int
    batch_size: int = 8  # prompts decoded together
    bases: dict[str, Config] = dataclasses.field(default_factory=dict)  # trained once, before all settings

    def runs(self) -> list[tuple[Setting, int]]:
        """All settings with the first seed, then all with the next one. Without training, a setting runs once."""
        return [
            (setting, seed)
            for number, seed in enumerate(self.seeds)
            for setting in self.settings
            if number == 0 or setting.config is not None
        ]


def check(ablation: Ablation) -> None:
    """Checks the grid and the configs of all its runs before any work.

    Raises:
      InputError: the first thing that is wrong.
    """
    location = f"ablation {ablation.name!r}"
    for what in ("factors", "settings", "seeds", "decodings"):
        if not getattr(ablation, what):
            raise InputError(f"{location}: has no {what}; give at least one")
    names = [*ablation.bases, *(setting.name for setting in ablation.settings)]
    _require_distinct(names, f"{location}: names of bases and settings")
    _require_distinct(ablation.seeds, f"{location}: seeds")
    _require_distinct([file_name(one) for one in ablation.decodings], f"{location}: files of decodings")
    count = 1 if ablation.prompts.count is None else ablation.prompts.count
    for what, value in (
        ("prompts", count),
        ("max_new_tokens", ablation.max_new_tokens),
        ("batch_size", ablation.batch_size),
    ):
        if value < 1:
            raise InputError(f"{location}: {what} is {value}; must be at least 1")
    if ablation.prompts.path:
        request_files.read(ablation.prompts.path, Request("", ablation.max_new_tokens))
    for name, base in ablation.bases.items():
        _check_config(base, f"{location}, base {name!r}")
    for setting in ablation.settings:
        _check_setting(ablation, setting, f"{location}, setting {setting.name!r}")
    for decoding in ablation.decodings:
        if decoding.decoder not in engine.DECODERS:
            known = ", ".join(engine.DECODERS)
            raise InputError(f"{location}: unknown decoder {decoding.decoder!r}: known decoders are {known}")
        if (decoding.draft is not None) != (decoding.decoder == "draft_model"):
            raise InputError(f"{location}, decoding {decoding.label!r}: 'draft_model', and no other, needs a draft")


def run_config(ablation: Ablation, setting: Setting, seed: int, workdir: Path) -> Config:
    """The config of one run of a setting that trains."""
    start = str(workdir / setting.base) if setting.base else setting.config.train.init_from
    return dataclasses.replace(
        setting.config, train=dataclasses.replace(setting.config.train, seed=seed, init_from=start)
    )


def identity(ablation: Ablation) -> dict:
    """What the result of a run depends on, as JSON; of files, their content. More seeds may be added.

    Raises:
      InputError: a file, model or adapter is missing or cannot be read.
    """
    configs = [*ablation.bases.values(), *(one.config for one in ablation.settings if one.config is not None)]
    paths = {cfg.data.path for cfg in configs} | {ablation.prompts.path}
    own = [one.config for one in ablation.settings if one.config is not None and not one.base]
    models = {cfg.train.init_from for cfg in (*ablation.bases.values(), *own)}
    models |= {cfg.adapter.init_from for cfg in configs}
    models |= {path for one in ablation.settings for path in (one.model, one.adapter)}
    models |= {path for one in ablation.decodings for path in (one.model, one.draft or OWN)} - {OWN}
    fields = dataclasses.asdict(ablation)
    return {name: value for name, value in fields.items() if name not in ("seeds", "batch_size")} | {
        "files": {path: _digest(path) for path in sorted(paths - {""})},
        "models": {path: _digest_model(Path(path)) for path in sorted(models - {""})},
    }


def numbers(given: Sequence[str], defaults: Sequence[int]) -> list[int]:
    """The given parts of a config's argument as positive integers, then the defaults of the others.

    Raises:
      ValueError: too many parts, or one that is not such a number.
    """
    if len(given) > len(defaults) or not all(part.isdecimal() and int(part) for part in given):
        raise ValueError(f"{':'.join(given)!r}: expected at most {len(defaults)} numbers above 0, separated by colons")
    return [*map(int, given), *defaults[len(given) :]]


def file_name(decoding: Decoding) -> str:
    """The file of a run that holds the outputs of a decoding."""
    name = slug("_".join(part for part in (decoding.label, decoding.tree_name) if part))
    if decoding.model != OWN:
        name += "_" + hashlib.sha256(decoding.model.encode()).hexdigest()[:8]
    return f"{name}.jsonl"


def slug(text: str) -> str:
    """The text as the name of a file."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.")


def _check_setting(ablation: Ablation, setting: Setting, location: str) -> None:
    if tuple(setting.factors) != ablation.factors:
        raise InputError(f"{location}: its factors must be {', '.join(ablation.factors)}, in this order")
    if (setting.config is None) != bool(setting.model):
        raise InputError(f"{location}: give either a config to train or a model")
    if setting.config is None:
        if not ablation.prompts.path:
            raise InputError(f"{location}: has no training data to take prompts from: name a file of prompts")
        return
    if setting.base and setting.base not in ablation.bases:
        raise InputError(f"{location}: unknown base {setting.base!r}: known are {', '.join(ablation.bases) or 'none'}")
    _check_config(run_config(ablation, setting, ablation.seeds[0], Path()), location)


def _check_config(cfg: Config, location: str) -> None:
    try:
        config.check(cfg)
    except InputError as error:
        raise InputError(f"{location}: {error}") from error


def _require_distinct(values: Sequence, what: str) -> None:
    if len(set(values)) < len(values):
        twice = next(value for value in values if list(values).count(value) > 1)
        raise InputError(f"{what}: {twice!r} occurs twice; each may occur once")


def _digest_model(path: Path) -> str:
    """Of all files of a model or adapter. InputError if it is neither there nor in the Hub."""
    path = path if path.exists() else pretrained.directory(path)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digests = [f"{file.relative_to(path)} {_digest(str(file))}\n" for file in files]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _digest(path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
