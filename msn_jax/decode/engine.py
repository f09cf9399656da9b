"""Text generation: a loaded model, prompts in batches, streams and chats."""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence

from msn_jax import sharding
from msn_jax.cli import InputError
from msn_jax.decode import batch as batches
from msn_jax.decode import draft_model, drafters, models
from msn_jax.decode import tree as trees
from msn_jax.decode.drafters import Drafter
from msn_jax.decode.models import Model
from msn_jax.decode.request import Prompt, Request, encode_prompt
from msn_jax.decode.session import DecodeSession, Prefix, RequestState, collect
from msn_jax.decode.tree import JACOBI, NOISE, RETRIEVAL, RETRIEVAL_OR_JACOBI, SOURCES, TokenTree

DECODERS = ("auto", *drafters.DEFAULT_TREES, "draft_model")

_DRAFT_TREE = trees.chain(JACOBI, 4)
_MAX_BATCH_SIZE = 1 << 16
_STOP_CHECK_INTERVAL = 8  # forward passes between two searches for stop strings
# Sources that a decoder's tree must not have, because `Generation.decoder` names how an output was made.
_FOREIGN_SOURCES = {
    "autoregressive": (JACOBI, RETRIEVAL, NOISE, RETRIEVAL_OR_JACOBI),
    "jacobi": (RETRIEVAL, RETRIEVAL_OR_JACOBI),
    "prompt_lookup": (JACOBI, RETRIEVAL_OR_JACOBI),
}


@dataclasses.dataclass(frozen=True)
class Generation:
    """The output for one prompt. `sum(accept_lengths) == new_tokens == len(tokens)`."""

    index: int  # of the prompt
    prompt: Prompt
    text: str  # without the stop token or stop string; `prompt + text` is the whole text of a raw prompt
    tokens: list[int]  # ends with the stop token if `finish_reason` is 'eos', completes the stop string if it is 'stop'
    new_tokens: int
    forward_passes: int  # after the prefill
    accept_lengths: list[int]  # tokens emitted by each forward pass
    wall_time: float  # seconds for the whole batch, prefill included
    decoder: str
    passes_by_width: dict[int, int]  # tree nodes per forward pass -> forward passes
    finish_reason: str  # 'eos', 'stop' (a stop string) or 'length'

    @property
    def mean_accepted_tokens(self) -> float:
        """Tokens per forward pass."""
        return self.new_tokens / max(self.forward_passes, 1)


@dataclasses.dataclass(frozen=True)
class StreamChunk:
    """A part of a streamed output."""

    text: str  # follows the text of the previous chunks
    tokens: list[int]  # new tokens; their text may come with a later chunk
    generation: Generation | None = None  # set in the last chunk


def compile_first(decoder: "Decoder", requests: Mapping[str, Request], batch_size: int) -> None:
    """Starts to compile the programs of the first batch, while the weights are being read.

    Args:
      decoder: of the model's outline (`models.load`, `while_reading`).
      requests: all of them, by their location for error messages.
      batch_size: requests decoded together.

    Raises:
      InputError: one of the first batch is impossible.
    """
    if 1 < batch_size < len(requests):  # then the longest ones come first
        return
    first = dict(itertools.islice(requests.items(), batch_size))
    prompts = [encode(decoder, request, location) for location, request in first.items()]
    batches.compile_first(decoder.model, decoder.drafter, prompts, list(first.values()), batch_size)


def wait_for_compilation(model: Model) -> None:
    """Returns when no program of the model is being compiled in the background, for measurements."""
    for experience in model.experience.values():
        experience.programs.wait()


class Decoder:
    """A model with a drafter, shared by batches, streams and chats."""

    def __init__(self, model: Model, decoder: str, tree: TokenTree | None = None, draft: Model | None = None):
        """See `generate`. InputError if model, decoder, tree and draft model do not fit together."""
        if (draft is not None) != (decoder == "draft_model"):
            problem = "needs a draft model" if draft is None else "does not use a draft model; choose 'draft_model'"
            raise InputError(f"decoder {decoder!r}: {problem}")
        is_adapted = model.adapter is not None and decoder in drafters.ADAPTED_TREES
        directory = model.adapter.name if is_adapted else model.name
        if tree is None and directory:
            tree = trees.find(directory, "tr_jacobi" if decoder == "auto" else decoder)
        self.model, self.name = model, decoder
        if draft is None:
            self.drafter, self.drafter_params = models.drafter_of(model, decoder, tree)
        else:
            self.drafter = _draft_drafter(model, draft, tree)
            is_placed = draft.mesh is not None
            self.drafter_params = draft.params if is_placed else models.replicate(draft.params, model.mesh)
        _check_tree(self.drafter, model.cfg.vocab_size)

    def check_batch(self, batch_size: int) -> None:
        """InputError if batches of this size cannot be distributed over the mesh."""
        if not 1 <= batch_size <= _MAX_BATCH_SIZE:
            raise InputError(f"batch_size={batch_size}: must be from 1 to {_MAX_BATCH_SIZE}")
        parts = 1 if self.model.mesh is None else sharding.batch_parts(self.model.mesh)
        if batch_size % parts:
            raise InputError(f"batch_size={batch_size}: must be divisible by the {parts} batch shards of the mesh")

    def start(
        self, prompts: Sequence[list[int]], requests: Sequence[Request], batch_size: int, prefix: Prefix | None = None
    ) -> DecodeSession:
        """A session for a batch of encoded prompts, after the prefill."""
        return DecodeSession(self.model, self.drafter, prompts, requests, batch_size, self.drafter_params, prefix)

    def generate_batch(
        self, indices: Sequence[int], prompts: Sequence[list[int]], requests: Sequence[Request], batch_size: int
    ) -> Iterator[Generation]:
        """Generations of one batch; `indices` are those of its prompts."""
        began = time.perf_counter()
        session = self.start(prompts, requests, batch_size)
        states = [RequestState(self.model, request) for request in requests]
        if not any(request.stop for request in requests):
            session.run()
            collect(session, states)
        while any(state.finish_reason is None for state in states):
            session.run(_STOP_CHECK_INTERVAL)
            collect(session, states)
            session.cancel([row for row, state in enumerate(states) if state.finish_reason is not None])
        wall_time = time.perf_counter() - began
        widths = session.passes_by_width()
        for index, request, state, passes in zip(indices, requests, states, widths, strict=False):
            yield self.to_generation(index, request.prompt, state, wall_time, passes)

    def stream(
        self, ids: list[int], request: Request, passes: int = 1, prefix: Prefix | None = None
    ) -> Iterator[tuple[StreamChunk, DecodeSession]]:
        """Streams one output: a chunk after every `passes` forward passes. Closing the iterator ends the decoding."""
        self.check_batch(1)
        began = time.perf_counter()
        session = self.start([ids], [request], 1, prefix)
        state = RequestState(self.model, request)
        while state.finish_reason is None:
            session.run(passes)
            before = len(state.tokens)
            [text] = collect(session, [state])
            generation = None
            if state.finish_reason is not None:
                wall_time = time.perf_counter() - began
                generation = self.to_generation(0, request.prompt, state, wall_time, session.passes_by_width()[0])
            yield StreamChunk(text, state.tokens[before:], generation), session

    def to_generation(
        self, index: int, prompt: Prompt, state: RequestState, wall_time: float, passes_by_width: dict[int, int]
    ) -> Generation:
        """The `Generation` of a finished request."""
        return Generation(
            index=index,
            prompt=prompt,
            text=state.text,
            tokens=state.tokens,
            new_tokens=len(state.tokens),
            forward_passes=len(state.accept_lengths),
            accept_lengths=state.accept_lengths,
            wall_time=wall_time,
            decoder=self.name,
            passes_by_width=passes_by_width,
            finish_reason=state.finish_reason,
        )


def generate(
    model: Model,
    prompts: Sequence[Prompt | Request],
    decoder: str = "auto",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 1,
    tree: TokenTree | None = None,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop: str | Sequence[str] | None = (),
    draft: Model | None = None,
    parse_special_tokens: bool = False,
) -> list[Generation]:
    """Generates an output for every prompt, in order.

    Args:
      model: from `load`.
      prompts: raw texts, lists of messages, or `Request`s, which carry their own settings.
      decoder: one of `DECODERS`. The output does not depend on it.
      max_new_tokens: limit of each output; the model's context is the other limit.
      temperature: 0 is greedy; above 0, tokens are sampled.
      seed: of the samples, from 0 to 2**63 - 1. Prompt i uses `fold_in(key(seed), i)`.
      batch_size: prompts decoded together.
      tree: overrides the tree that `calibrate` stored with the model, or else the decoder's default.
      top_k: samples from the k most probable tokens; 0 keeps all.
      top_p: samples from the most probable tokens with this total probability.
      min_p: samples from tokens with at least this share of the highest probability.
      stop: a string that ends an output and is not part of it, or several.
      draft: the small model of decoder 'draft_model'.
      parse_special_tokens: whether special tokens that messages spell are those tokens; by default they are text.

    Raises:
      InputError: an unknown decoder, an empty prompt, a prompt beyond the context, or an impossible setting.
    """
    own = {"stop": stop, "parse_special_tokens": parse_special_tokens}
    settings = Request("", max_new_tokens, temperature, top_k, top_p, min_p, seed, **own)
    if isinstance(prompts, str):
        raise InputError("prompts: is a string; give a list of prompts, even for one")
    locations = [f"prompts[{index}]" for index in range(len(prompts))]
    generations = generate_iter(Decoder(model, decoder, tree, draft), prompts, settings, batch_size, locations)
    return sorted(generations, key=lambda generation: generation.index)


def generate_iter(
    decoder: Decoder,
    prompts: Sequence[Prompt | Request],
    settings: Request,
    batch_size: int,
    locations: Sequence[str],
    skip: frozenset[int] = frozenset(),
) -> Iterator[Generation]:
    """Like `generate`, but yields generations as batches finish: prompts of similar length share a batch.

    All prompts are checked before this returns.

    Args:
      decoder: model and drafter.
      prompts: as for `generate`.
      settings: for the prompts that are not `Request`s.
      batch_size: prompts decoded together.
      locations: the location of each prompt, for error messages: a flag, or a file and line.
      skip: indices of prompts that need no output.
    """
    decoder.check_batch(batch_size)
    settings.check("")
    requests, encoded = [], []
    for index, (prompt, location) in enumerate(zip(prompts, locations, strict=True)):
        request = as_request(prompt, settings, index)
        requests.append(request)
        encoded.append(encode(decoder, request, location))

    def generations() -> Iterator[Generation]:
        left = [index for index in range(len(requests)) if index not in skip]
        if batch_size > 1:
            left.sort(key=lambda index: (len(encoded[index]), requests[index].max_new_tokens), reverse=True)
        for start in range(0, len(left), batch_size):
            batch = left[start : start + batch_size]
            batch_prompts, batch_requests = [encoded[i] for i in batch], [requests[i] for i in batch]
            yield from decoder.generate_batch(batch, batch_prompts, batch_requests, batch_size)

    return generations()


def stream(
    model: Model,
    prompt: Prompt | Request,
    decoder: str = "auto",
    tree: TokenTree | None = None,
    draft: Model | None = None,
    passes: int = 1,
    **settings: object,
) -> Iterator[StreamChunk]:
    """Streams one output: a chunk after every `passes` forward passes, with the text that is final by then.

    The chunks' texts join to the text of `generate`; the last chunk holds the `Generation`. To cancel, close the
    iterator or drop it. `settings` are fields of `Request`.
    """
    request = as_request(prompt, Request("", **settings), 0)
    model_decoder = Decoder(model, decoder, tree, draft)
    ids = encode(model_decoder, request, "prompt")
    if passes < 1:
        raise InputError(f"passes={passes}: must be at least 1")
    return (chunk for chunk, _ in model_decoder.stream(ids, request, passes))


class Chat:
    """A conversation. Each turn reuses the cache of the turns before it."""

    def __init__(
        self,
        model: Model,
        decoder: str = "auto",
        tree: TokenTree | None = None,
        draft: Model | None = None,
        system: str | None = None,
        **settings: object,
    ):
        """`settings` are fields of `Request`."""
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.num_cached_tokens = 0  # tokens of the last prompt that came from the cache
        self._decoder = Decoder(model, decoder, tree, draft)
        self._settings = Request("", **settings)
        self._settings.check("")
        self._prefix: Prefix | None = None
        self._streaming: object | None = None  # identifies the turn that is streaming

    def stream(self, content: str) -> Iterator[StreamChunk]:
        """Sends `content` as the user and streams the reply. A cancelled turn is not remembered.

        Raises:
          InputError: another turn is still streaming, or the message cannot be encoded.
        """
        if self._streaming is not None:
            raise InputError("chat: another turn is still streaming; read it to its end or close it first")
        self._streaming = turn = object()
        try:
            messages = [*self.messages, {"role": "user", "content": content}]
            request = dataclasses.replace(self._settings, prompt=messages, sample=len(messages))
            ids = encode(self._decoder, request, "chat")
            for chunk, session in self._decoder.stream(ids, request, prefix=self._prefix):
                if chunk.generation is not None:
                    self.messages = [*messages, {"role": "assistant", "content": chunk.generation.text}]
                    self.num_cached_tokens, self._prefix = session.num_cached_tokens, session.prefix()
                    self._streaming = None  # complete, even if the iterator is never exhausted
                yield chunk
        finally:
            if self._streaming is turn:
                self._streaming = None

    def send(self, content: str) -> Generation:
        """Sends `content` as the user; returns the whole reply."""
        *_, last = self.stream(content)
        return last.generation


def encode(decoder: Decoder, request: Request, location: str) -> list[int]:
    """The token ids of a request's prompt. InputError, with its location, if the request is impossible."""
    request.check(f"{location}: ")
    return encode_prompt(decoder.model.tokenizer, request, decoder.model.cfg.max_length, location)


def as_request(prompt: Prompt | Request, settings: Request, index: int) -> Request:
    """Prompt number `index` as a request: unchanged if it is one, else with these settings."""
    if isinstance(prompt, Request):
        return prompt
    return dataclasses.replace(settings, prompt=prompt, sample=index)


def _draft_drafter(model: Model, draft: Model, tree: TokenTree | None) -> Drafter:
    tree = _DRAFT_TREE if tree is None else tree
    if tree.num_ranks(JACOBI) == 0:
        raise InputError("tree: decoder 'draft_model' needs jacobi nodes, which hold the draft model's predictions")
    ours, theirs = model.tokenizer, draft.tokenizer
    same = ours.vocab_size == theirs.vocab_size
    if not same or any(ours.decode([i]) != theirs.decode([i]) for i in range(ours.vocab_size)):
        raise InputError(f"draft model {draft.name or ''}: its vocabulary differs from the model's")
    return draft_model.drafter(tree, draft.cfg)


def _check_tree(drafter: Drafter, vocab_size: int) -> None:
    tree = drafter.tree
    foreign = [SOURCES[source] for source in _FOREIGN_SOURCES.get(drafter.name, ()) if source in tree.sources]
    if foreign:
        raise InputError(
            f"tree: has {foreign[0]} nodes, which decoder {drafter.name!r} does not allow; tr_jacobi allows any tree"
        )
    smallest = min(vocab_size, drafter.cfg.vocab_size if drafter.cfg is not None else vocab_size)
    if tree.num_ranks(JACOBI) > smallest:
        raise InputError(
            f"tree: has jacobi rank {tree.num_ranks(JACOBI) - 1}, but the vocabulary has {smallest} tokens"
        )
