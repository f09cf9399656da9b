"""What is asked of a model: a prompt, and how it is to be answered."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax import Array

from msn_jax.cli import InputError
from msn_jax.data import chat
from msn_jax.data.tokenizer import Tokenizer
from msn_jax.decode.verify import Sampler

Prompt = str | list[dict]  # raw text, or messages with 'role' and 'content'

_MOST_TOKENS = 1 << 30
_HOTTEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and its settings. The answer depends on nothing else: not on the decoder, the batch, or its place."""

    prompt: Prompt
    max_new_tokens: int = 256  # the model's context is the other limit
    temperature: float = 0.0  # 0 takes the best token; above, tokens are sampled
    top_k: int = 0  # of so many best tokens; 0: of all
    top_p: float = 1.0  # of the best tokens that together are as probable as this
    min_p: float = 0.0  # of tokens at least this probable, as a share of the best one's
    seed: int = 0  # of the samples, from 0 to 2**63 - 1
    sample: int = 0  # which sample of that seed: prompt i of a list has the i-th
    stop: tuple[str, ...] = ()  # texts that end the answer, and are not part of it

    def check(self, place: str) -> None:
        """InputError if a setting is impossible; `place` says whose."""

        def need(holds: bool, name: str, rule: str) -> None:
            if not holds:
                raise InputError(f"{place}{name}={getattr(self, name)!r}: must be {rule}")

        for name in ("max_new_tokens", "top_k", "seed", "sample"):
            need(_is_integer(getattr(self, name)), name, "an integer")
        for name in ("temperature", "top_p", "min_p"):
            need(_is_number(getattr(self, name)), name, "a number")
        need(1 <= self.max_new_tokens <= _MOST_TOKENS, "max_new_tokens", f"at least 1 and at most {_MOST_TOKENS}")
        need(0 <= self.temperature <= _HOTTEST, "temperature", "0, or a positive finite number")
        need(0 <= self.top_k < 1 << 31, "top_k", "0 for all tokens, or a positive number of them")
        need(0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        need(0 <= self.min_p <= 1, "min_p", "from 0 to 1")
        need(0 <= self.seed < 1 << 63, "seed", "from 0 to 2**63 - 1")
        need(0 <= self.sample < 1 << 32, "sample", "from 0 to 2**32 - 1")
        texts = isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop)
        need(texts, "stop", "texts, none of them empty")


SETTINGS = tuple(field.name for field in dataclasses.fields(Request) if field.name not in ("prompt", "sample"))


def with_settings(request: Request, settings: dict) -> Request:
    """The request with other settings, as they come from JSON or flags: `stop` may be one text or a list of them."""
    stop = settings.get("stop", request.stop)
    stop = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else stop
    return dataclasses.replace(request, **{**settings, "stop": stop})


def encode(tokenizer: Tokenizer, prompt: Prompt, max_length: int, place: str) -> list[int]:
    """The token ids of a prompt.

    Raises:
      InputError: it is no prompt, empty, or leaves no room for an answer in a context of `max_length` tokens.
    """
    is_chat = isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)
    if not is_chat and not isinstance(prompt, str):
        raise InputError(f"{place}: found {type(prompt).__name__}: a prompt is a text or a list of messages")
    try:
        ids = chat.encode_prompt(tokenizer, prompt)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    if len(ids) >= max_length:
        raise InputError(
            f"{place}: {len(ids)} tokens leave no room for an answer in the model's context of {max_length}; shorten it"
        )
    return ids


def sampler(requests: Sequence[Request]) -> Sampler:
    """How the choices of a batch of requests are made. Each has the key `fold_in(key(seed), sample)`."""

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
    """`seeds`, uint32 [B, 2], are the high and low half of each seed. They are what threefry makes of it, but without
    x64 `jax.random.key` would drop the high one.
    """
    return jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(seeds, impl="threefry2x32"), samples)


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_integer(value) or isinstance(value, float | np.floating)
