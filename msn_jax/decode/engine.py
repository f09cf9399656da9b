"""From text to text: a loaded model, batches of prompts, and what came of each.

The host's part of decoding is small. It pads prompts of different lengths into a batch, calls the compiled loop until
every row is done, and gives the texts more room when they outgrow it. Shapes come from powers of two, so that a few
compiled programs serve all prompts.
"""

import dataclasses
import math
import operator
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from msn_jax import pretrained
from msn_jax.cli import InputError
from msn_jax.config import LlamaConfig
from msn_jax.data import chat
from msn_jax.data import tokenizer as tokenizers
from msn_jax.data.tokenizer import Tokenizer
from msn_jax.decode import drafters, loop
from msn_jax.decode.drafters import Drafter
from msn_jax.decode.loop import DecodeState
from msn_jax.decode.tree import EITHER, JACOBI, NOISE, RETRIEVAL, SOURCES, TokenTree
from msn_jax.decode.verify import Sampler

_SMALLEST_BUCKET = 64  # slots
_CHUNK = 512  # tokens of a prompt read in one pass: enough to keep an accelerator busy
_CHUNK_ON_CPU = 64
_UNLIMITED = np.int32(np.iinfo(np.int32).max)  # passes
# What a decoder's tree must not have: an answer says by its decoder's name how it was made.
_FOREIGN_SOURCES = {
    "autoregressive": (JACOBI, RETRIEVAL, NOISE, EITHER),
    "jacobi": (RETRIEVAL, EITHER),
    "prompt_lookup": (JACOBI, EITHER),
}

Prompt = str | list[dict]  # raw text, or messages with 'role' and 'content'


@dataclasses.dataclass(frozen=True)
class Model:
    """What decoding needs of a model."""

    params: dict  # decoding layout
    cfg: LlamaConfig
    tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True)
class Generation:
    """One answer. `sum(accept_lengths) == new_tokens == len(tokens)`."""

    index: int  # of the prompt
    prompt: Prompt
    text: str  # without the stop token; it continues a prompt that is text, down to the space between them
    tokens: list[int]  # ends with the stop token when `finish_reason` is 'eos'
    new_tokens: int
    forward_passes: int  # after the prefill
    accept_lengths: list[int]  # tokens emitted by each pass
    wall_time: float  # seconds of the batch it was in, prefill included
    decoder: str
    finish_reason: str  # 'eos' or 'length'

    @property
    def mean_accepted_tokens(self) -> float:
        """Tokens per forward pass."""
        return self.new_tokens / max(self.forward_passes, 1)


def load(name: str | Path, dtype: str | None = None) -> Model:
    """A model, ready to decode.

    Args:
      name: a training workdir, a Hugging Face directory, or a repository of the Hub (`pretrained.py`).
      dtype: of parameters and computation; None is what the model has.

    Raises:
      InputError: there is none, or its tokenizer does not fit.
    """
    path = pretrained.directory(name)
    tokenizer = tokenizers.load(path)
    model = pretrained.load(path, stacked=False, dtype=dtype)
    tokenizers.check_fits(tokenizer, model.cfg.vocab_size, str(path))
    return Model(model.params, model.cfg, tokenizer)


def generate(
    model: Model,
    prompts: Sequence[Prompt],
    decoder: str = "tr_jacobi",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 1,
    tree: TokenTree | None = None,
) -> list[Generation]:
    """Answers every prompt, in order.

    Args:
      model: from `load`.
      prompts: raw texts or lists of messages.
      decoder: 'autoregressive', 'jacobi', 'prompt_lookup' or 'tr_jacobi'. The text does not depend on it.
      max_new_tokens: limit of each answer; the model's context is the other one.
      temperature: 0 takes the best token; above, tokens are sampled.
      seed: of the samples, from 0 to 2**63 - 1. Prompt i uses `fold_in(key(seed), i)`.
      batch_size: prompts decoded at once.
      tree: instead of the decoder's own.

    Raises:
      InputError: an unknown decoder, an empty prompt, one beyond the context, or an impossible setting.
    """
    return list(generate_iter(model, prompts, decoder, max_new_tokens, temperature, seed, batch_size, tree))


def generate_iter(
    model: Model,
    prompts: Sequence[Prompt],
    decoder: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    tree: TokenTree | None,
    places: Sequence[str] | None = None,
) -> Iterator[Generation]:
    """`generate`, one answer at a time. Everything is checked before this returns.

    `places` says where each prompt stands, for messages about it: a flag, or a file and its line.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name}={value}: must be at least 1")
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature={temperature}: must be 0, or a positive finite number")
    if not 0 <= seed < 1 << 63:
        raise InputError(f"seed={seed}: must be from 0 to 2**63 - 1")
    if isinstance(prompts, str):
        raise InputError("prompts: found one text: give a list of prompts, even of one")
    drafter = drafters.get(decoder, tree)
    _check_tree(drafter, model.cfg.vocab_size)
    places = places or [f"prompts[{index}]" for index in range(len(prompts))]
    encoded = [_encode(model, prompt, place) for prompt, place in zip(prompts, places, strict=True)]

    def answers() -> Iterator[Generation]:
        for start in range(0, len(encoded), batch_size):
            batch = encoded[start : start + batch_size]
            request_ids = np.arange(start, start + batch_size)
            began = time.perf_counter()
            state = decode_batch(model, drafter, batch, max_new_tokens, temperature, seed, request_ids)
            wall_time = time.perf_counter() - began
            for row, ids in enumerate(batch):
                index = start + row
                yield _generation(model, drafter.name, state, row, index, prompts[index], len(ids), wall_time)

    return answers()


def decode_batch(
    model: Model,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    request_ids: np.ndarray,
) -> DecodeState:
    """Decodes a batch of token ids to the end.

    Args:
      model: the model.
      drafter: who guesses.
      prompts: at most as many as `request_ids`, each at least one token; missing rows are idle.
      max_new_tokens: limit of each row.
      temperature: 0 for greedy decoding.
      seed: of the samples.
      request_ids: int [B], what makes the samples of a row its own.

    Returns:
      The final state. Its arrays are on the device; all rows are done.
    """
    batch_size, depth = len(request_ids), drafter.tree.max_depth
    longest = max(map(len, prompts))
    tokens = np.zeros((batch_size, bucket(longest + depth + 1)), np.int32)
    lengths = np.ones(batch_size, np.int32)
    limits = np.ones(batch_size, np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = ids
        lengths[row] = len(ids)
        limits[row] = min(len(ids) + max_new_tokens, model.cfg.max_length)
    sampler = request_sampler(temperature, np.array(divmod(operator.index(seed), 1 << 32), np.uint32), request_ids)
    stop_ids = np.array(model.tokenizer.stop_ids, np.int32)

    chunk = min(_CHUNK_ON_CPU if jax.default_backend() == "cpu" else _CHUNK, tokens.shape[1])
    state = loop.prefill(model.params, model.cfg, drafter, tokens, lengths, limits, sampler, chunk)
    while True:
        state = loop.decode(model.params, model.cfg, drafter, stop_ids, state, _UNLIMITED)
        if np.asarray(state.done).all():
            return state
        state = loop.grow(state, 2 * state.capacity)


@jax.jit
def request_sampler(temperature: float, seed_words: np.ndarray, request_ids: np.ndarray) -> Sampler:
    """One temperature for all rows, and for each request the key `fold_in(key(seed), id)`.

    `seed_words`, uint32 [2], are the high and low half of the seed. They are what threefry makes of it, but without
    x64 `jax.random.key` would drop the high one.
    """
    key = jax.random.wrap_key_data(seed_words, impl="threefry2x32")
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, request_ids)
    return Sampler(jnp.full(request_ids.shape, temperature, jnp.float32), keys)


def bucket(slots: int) -> int:
    """The capacity for texts of `slots` tokens: a power of two, so that few programs are compiled."""
    return max(_SMALLEST_BUCKET, 1 << (slots - 1).bit_length())


def _check_tree(drafter: Drafter, vocab_size: int) -> None:
    tree = drafter.tree
    foreign = [SOURCES[source] for source in _FOREIGN_SOURCES.get(drafter.name, ()) if source in tree.sources]
    if foreign:
        raise InputError(f"tree: has {foreign[0]} nodes, decoder {drafter.name!r} has none: tr_jacobi takes any tree")
    if tree.count(JACOBI) > vocab_size:
        raise InputError(f"tree: has jacobi rank {tree.count(JACOBI) - 1}, the model a vocabulary of {vocab_size}")


def _encode(model: Model, prompt: Prompt, place: str) -> list[int]:
    is_chat = isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)
    if not is_chat and not isinstance(prompt, str):
        raise InputError(f"{place}: found {type(prompt).__name__}: a prompt is a text or a list of messages")
    try:
        ids = chat.encode_prompt(model.tokenizer, prompt)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    if len(ids) >= model.cfg.max_length:
        raise InputError(
            f"{place}: {len(ids)} tokens leave no room for an answer in the model's context of "
            f"{model.cfg.max_length}; shorten it"
        )
    return ids


def _generation(
    model: Model,
    decoder: str,
    state: DecodeState,
    row: int,
    index: int,
    prompt: Prompt,
    prompt_length: int,
    wall_time: float,
) -> Generation:
    tokens = np.asarray(state.tokens)[row, prompt_length : state.lengths[row]].tolist()
    forward_passes = int(state.forward_passes[row])
    stopped = tokens[-1] in model.tokenizer.stop_ids
    return Generation(
        index=index,
        prompt=prompt,
        text=model.tokenizer.decode(tokens[:-1] if stopped else tokens, start=not isinstance(prompt, str)),
        tokens=tokens,
        new_tokens=len(tokens),
        forward_passes=forward_passes,
        accept_lengths=np.asarray(state.accept_lengths)[row, :forward_passes].tolist(),
        wall_time=wall_time,
        decoder=decoder,
        finish_reason="eos" if stopped else "length",
    )
