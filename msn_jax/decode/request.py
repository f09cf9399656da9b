"""Requests: a prompt and the settings of its output."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax import Array

from msn_jax.cli import InputError
from msn_jax.data import chat
from msn_jax.data.tokenizer import Tokenizer
from msn_jax.decode.verify import Sampler

Prompt = str | list[dict]  # raw text, or messages as in `data/messages.py`

_MAX_NEW_TOKENS = 1 << 30
_MAX_TEMPERATURE = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and its settings. The output depends on nothing else: not on decoder, batch or row."""

    prompt: Prompt
    max_new_tokens: int = 256  # the model's context is the other limit
    temperature: float = 0.0  # 0 is greedy; above 0, tokens are sampled
    top_k: int = 0  # samples from the k most probable tokens; 0 keeps all
    top_p: float = 1.0  # samples from the most probable tokens with this total probability
    min_p: float = 0.0  # samples from tokens with at least this share of the highest probability
    seed: int = 0  # of the samples, from 0 to 2**63 - 1
    sample: int = 0  # which sample of that seed: prompt i of a list has the i-th
    stop: tuple[str, ...] = ()  # strings that end the output and are not part of it; one string, a list or None works
    parse_special_tokens: bool = False  # whether special tokens that messages spell are those tokens, or text
    tools: list[dict] | None = None  # JSON schemas of the functions that the model may call; only with messages
    response_prefix: str = ""  # text that the reply to messages begins with; it is not part of the output

    def __post_init__(self):
        stop = () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else self.stop
        object.__setattr__(self, "stop", tuple(stop) if isinstance(stop, list) else stop)

    def check(self, location: str) -> None:
        """InputError if a setting is impossible; the message begins with `location`."""

        def require(condition: bool, name: str, expected: str) -> None:
            if not condition:
                raise InputError(f"{location}{name}={getattr(self, name)!r}: must be {expected}")

        for name in ("max_new_tokens", "top_k", "seed", "sample"):
            require(_is_integer(getattr(self, name)), name, "an integer")
        for name in ("temperature", "top_p", "min_p"):
            require(_is_number(getattr(self, name)), name, "a number")
        require(
            1 <= self.max_new_tokens <= _MAX_NEW_TOKENS, "max_new_tokens", f"at least 1 and at most {_MAX_NEW_TOKENS}"
        )
        require(0 <= self.temperature <= _MAX_TEMPERATURE, "temperature", "0, or a positive finite number")
        require(0 <= self.top_k < 1 << 31, "top_k", "0 for all tokens, or a positive number of them")
        require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        require(0 <= self.min_p <= 1, "min_p", "from 0 to 1")
        require(0 <= self.seed < 1 << 63, "seed", "from 0 to 2**63 - 1")
        require(0 <= self.sample < 1 << 32, "sample", "from 0 to 2**32 - 1")
        is_strings = isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop)
        require(is_strings, "stop", "a non-empty string, or a list of them")
        require(all(map(_is_unicode, self.stop)), "stop", "Unicode text; it has a lone surrogate")
        require(isinstance(self.parse_special_tokens, bool), "parse_special_tokens", "true or false")


# The fields that flags and the lines of a prompt file may set for any prompt.
SETTING_NAMES = tuple(
    field.name
    for field in dataclasses.fields(Request)
    if field.name not in ("prompt", "sample", "tools", "response_prefix")
)


def encode_prompt(tokenizer: Tokenizer, request: Request, max_length: int, location: str) -> list[int]:
    """The token ids of a request's prompt.

    Args:
      tokenizer: the model's.
      request: its prompt, and how to encode it.
      max_length: the model's context, in tokens.
      location: location of the prompt, for error messages.

    Raises:
      InputError: the prompt is malformed or empty, the tokenizer cannot show all of it, or it fills the context.
    """
    prompt = request.prompt
    is_chat = isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)
    if not is_chat and not isinstance(prompt, str):
        raise InputError(f"{location}: is of type {type(prompt).__name__}; a prompt is a string or a list of messages")
    try:
        ids = chat.encode_prompt(tokenizer, prompt, request.tools, request.parse_special_tokens)
        if request.response_prefix:
            ids = [*ids, *tokenizer.encode(request.response_prefix)]
    except InputError as error:
        raise InputError(f"{location}: {error}") from error
    if len(ids) >= max_length:
        raise InputError(
            f"{location}: {len(ids)} tokens leave no space for an output in the model's context of {max_length} "
            "tokens; shorten the prompt"
        )
    return ids


def make_sampler(requests: Sequence[Request]) -> Sampler:
    """The sampling settings of a batch. Each request has the key `fold_in(key(seed), sample)`."""

    def column(name: str, dtype: type) -> np.ndarray:
        return np.array([getattr(request, name) for request in requests], dtype)

    seeds = np.array([divmod(int(request.seed), 1 << 32) for request in requests], np.uint32)
    keys = _keys(seeds, column("sample", np.uint32))
    return Sampler(
        temperature=column("temperature", np.float32),
        top_k=column("top_k", np.int32),
        top_p=column("top_p", np.float32),
        min_p=column("min_p", np.float32),
        keys=keys,
    )


@jax.jit
def _keys(seeds: np.ndarray, samples: np.ndarray) -> Array:
    """Keys of 64-bit seeds, uint32 [B, 2], high word first.

    This is how threefry stores a seed; `jax.random.key` would drop the high word unless x64 is enabled.
    """
    return jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(seeds, impl="threefry2x32"), samples)


def _is_unicode(text: str) -> bool:
    """False for text with half of a surrogate pair, as from a malformed JSON escape or an argument with bad bytes."""
    return text.encode("utf-8", "ignore") == text.encode("utf-8", "surrogatepass")


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_integer(value) or isinstance(value, float | np.floating)
