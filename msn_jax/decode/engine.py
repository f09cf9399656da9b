"""From text to text: a loaded model, prompts in batches, and what came of each."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from jax.sharding import NamedSharding, PartitionSpec

from msn_jax import llama, pretrained, sharding
from msn_jax.cli import InputError
from msn_jax.config import MeshConfig
from msn_jax.data import tokenizer as tokenizers
from msn_jax.decode import draft_model, drafters, requests
from msn_jax.decode import tree as trees
from msn_jax.decode.drafters import Drafter
from msn_jax.decode.requests import Prompt, Request
from msn_jax.decode.session import Decoding, Model, Prefix, Row
from msn_jax.decode.tree import EITHER, JACOBI, NOISE, RETRIEVAL, SOURCES, TokenTree

DECODERS = (*drafters.DEFAULT_TREES, "draft_model")

_DRAFT_TREE = trees.chain(JACOBI, 4)
_MOST_ROWS = 1 << 16  # of a batch
_PIECE = 8  # passes between two looks at the text, where there is reason to look
# What a decoder's tree must not have: an answer says by its decoder's name how it was made.
_FOREIGN_SOURCES = {
    "autoregressive": (JACOBI, RETRIEVAL, NOISE, EITHER),
    "jacobi": (RETRIEVAL, EITHER),
    "prompt_lookup": (JACOBI, EITHER),
}


@dataclasses.dataclass(frozen=True)
class Generation:
    """One answer. `sum(accept_lengths) == new_tokens == len(tokens)`."""

    index: int  # of the prompt
    prompt: Prompt
    text: str  # without the stop token or string; it continues a prompt that is text, down to the space between them
    tokens: list[int]  # ends with the stop token when `finish_reason` is 'eos', and completes the stop string at 'stop'
    new_tokens: int
    forward_passes: int  # after the prefill
    accept_lengths: list[int]  # tokens emitted by each pass
    wall_time: float  # seconds of the batch it was in, prefill included
    decoder: str
    finish_reason: str  # 'eos', 'stop' (a stop string) or 'length'

    @property
    def mean_accepted_tokens(self) -> float:
        """Tokens per forward pass."""
        return self.new_tokens / max(self.forward_passes, 1)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of an answer, as it comes."""

    text: str  # behind the text of the pieces before
    tokens: list[int]  # new ones; their text may come with a later piece
    generation: Generation | None = None  # of the last piece


def load(name: str | Path, dtype: str | None = None, mesh: MeshConfig | None = None) -> Model:
    """A model, ready to decode.

    Args:
      name: a training workdir, a Hugging Face directory, or a repository of the Hub (`pretrained.py`).
      dtype: of parameters and computation; None is what the model has.
      mesh: how to spread it over several devices: batches over `data`, weights over `tensor`. None is one device.

    Raises:
      InputError: there is none, its tokenizer does not fit, or it cannot be spread like that.
    """
    path = pretrained.directory(name)
    tokenizer = tokenizers.load(path)
    devices = None if mesh is None else sharding.make_mesh(mesh, name="mesh of the model")
    model = pretrained.load(path, devices, stacked=False, dtype=dtype)
    tokenizers.check_fits(tokenizer, model.cfg.vocab_size, str(path))
    return Model(llama.suit_backend(model.params, model.cfg), model.cfg, tokenizer, devices, str(path))


class Decoder:
    """A model with a drafter: what every way to ask it has in common."""

    def __init__(self, model: Model, decoder: str, tree: TokenTree | None = None, draft: Model | None = None):
        """See `generate`. InputError if model, decoder, tree and draft model do not fit each other."""
        if (draft is not None) != (decoder == "draft_model"):
            missing = "needs a draft model" if draft is None else "has no use for a draft model: take 'draft_model'"
            raise InputError(f"decoder {decoder!r}: {missing}")
        if tree is None and model.name:
            tree = trees.find(model.name, decoder)
        self.model, self.name = model, decoder
        self.weights = None if draft is None else draft.params
        if draft is not None and draft.mesh is None and model.mesh is not None:  # small: every device has all of it
            self.weights = jax.device_put(draft.params, NamedSharding(model.mesh, PartitionSpec()))
        self.drafter = _draft_drafter(model, draft, tree) if draft is not None else drafters.get(decoder, tree)
        _check_tree(self.drafter, model.cfg.vocab_size)

    def check_batch(self, batch_size: int) -> None:
        """InputError if batches of this size cannot be dealt to the devices."""
        if not 1 <= batch_size <= _MOST_ROWS:
            raise InputError(f"batch_size={batch_size}: must be from 1 to {_MOST_ROWS}")
        parts = 1 if self.model.mesh is None else sharding.batch_parts(self.model.mesh)
        if batch_size % parts:
            raise InputError(f"batch_size={batch_size}: cannot be dealt evenly to {parts} parts of the mesh")

    def begin(
        self, prompts: Sequence[list[int]], asked: Sequence[Request], batch_size: int, prefix: Prefix | None = None
    ) -> Decoding:
        """A batch of encoded prompts, read and ready to be decoded."""
        return Decoding(self.model, self.drafter, prompts, asked, batch_size, self.weights, prefix)

    def batch(
        self, indices: Sequence[int], prompts: Sequence[list[int]], asked: Sequence[Request], batch_size: int
    ) -> Iterator[Generation]:
        """Answers of one batch; `indices` say which prompts they belong to."""
        began = time.perf_counter()
        session = self.begin(prompts, asked, batch_size)
        rows = [Row(self.model, request) for request in asked]
        if not any(request.stop for request in asked):
            session.advance()
            read(session, rows)
        while any(row.finish_reason is None for row in rows):
            session.advance(_PIECE)
            read(session, rows)
            session.cancel([number for number, row in enumerate(rows) if row.finish_reason is not None])
        wall_time = time.perf_counter() - began
        for index, request, row in zip(indices, asked, rows, strict=True):
            yield self.generation(index, request.prompt, row, wall_time)

    def stream(
        self, ids: list[int], request: Request, passes: int = 1, prefix: Prefix | None = None
    ) -> Iterator[tuple[Piece, Decoding]]:
        """One answer, every `passes` passes what is new. Closing the iterator ends the decoding."""
        self.check_batch(1)
        began = time.perf_counter()
        session = self.begin([ids], [request], 1, prefix)
        row = Row(self.model, request)
        while row.finish_reason is None:
            session.advance(passes)
            before = len(row.tokens)
            [text] = read(session, [row])
            generation = None
            if row.finish_reason is not None:
                generation = self.generation(0, request.prompt, row, time.perf_counter() - began)
            yield Piece(text, row.tokens[before:], generation), session

    def generation(self, index: int, prompt: Prompt, row: Row, wall_time: float) -> Generation:
        """What is told of a finished row."""
        return Generation(
            index=index,
            prompt=prompt,
            text=row.text,
            tokens=row.tokens,
            new_tokens=len(row.tokens),
            forward_passes=len(row.accept_lengths),
            accept_lengths=row.accept_lengths,
            wall_time=wall_time,
            decoder=self.name,
            finish_reason=row.finish_reason,
        )


def read(session: Decoding, rows: Sequence[Row]) -> list[str]:
    """Hands every row what it has got; the new text of each."""
    done = session.state.done.tolist()
    return [
        row.take(tokens, accept_lengths, is_done)
        for row, (tokens, accept_lengths), is_done in zip(rows, session.answers(), done, strict=False)
    ]


def generate(
    model: Model,
    prompts: Sequence[Prompt | Request],
    decoder: str = "tr_jacobi",
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 1,
    tree: TokenTree | None = None,
    *,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    stop: Sequence[str] = (),
    draft: Model | None = None,
) -> list[Generation]:
    """Answers every prompt, in order.

    Args:
      model: from `load`.
      prompts: raw texts, lists of messages, or requests (`requests.Request`), which have settings of their own.
      decoder: one of `DECODERS`. The text does not depend on it.
      max_new_tokens: limit of each answer; the model's context is the other one.
      temperature: 0 takes the best token; above, tokens are sampled.
      seed: of the samples, from 0 to 2**63 - 1. Prompt i uses `fold_in(key(seed), i)`.
      batch_size: prompts decoded at once.
      tree: instead of the one that `calibrate` left beside the model, or else the decoder's own.
      top_k: samples are of so many best tokens; 0: of all.
      top_p: of the best tokens that together are as probable as this.
      min_p: of tokens at least this probable, as a share of the best one's.
      stop: texts that end an answer and are not part of it.
      draft: the small model of 'draft_model'.

    Raises:
      InputError: an unknown decoder, an empty prompt, one beyond the context, or an impossible setting.
    """
    settings = Request("", max_new_tokens, temperature, top_k, top_p, min_p, seed)
    settings = requests.with_settings(settings, {"stop": stop if isinstance(stop, str) else list(stop)})
    if isinstance(prompts, str):
        raise InputError("prompts: found one text: give a list of prompts, even of one")
    places = [f"prompts[{index}]" for index in range(len(prompts))]
    answers = generate_iter(Decoder(model, decoder, tree, draft), prompts, settings, batch_size, places)
    return sorted(answers, key=lambda generation: generation.index)


def generate_iter(
    decoder: Decoder,
    prompts: Sequence[Prompt | Request],
    settings: Request,
    batch_size: int,
    places: Sequence[str],
    skip: frozenset[int] = frozenset(),
) -> Iterator[Generation]:
    """`generate`, one answer at a time, as they are finished: texts of similar length share a batch.

    Everything is checked before this returns.

    Args:
      decoder: model and drafter.
      prompts: as for `generate`.
      settings: of the prompts that are no requests.
      batch_size: prompts decoded at once.
      places: where each prompt stands, for messages about it: a flag, or a file and its line.
      skip: prompts that need no answer.
    """
    decoder.check_batch(batch_size)
    settings.check("")
    asked, encoded = [], []
    for index, (prompt, place) in enumerate(zip(prompts, places, strict=True)):
        request = as_request(prompt, settings, index)
        asked.append(request)
        encoded.append(encode(decoder, request, place))

    def answers() -> Iterator[Generation]:
        left = [index for index in range(len(asked)) if index not in skip]
        if batch_size > 1:
            left.sort(key=lambda index: (len(encoded[index]), asked[index].max_new_tokens), reverse=True)
        for start in range(0, len(left), batch_size):
            batch = left[start : start + batch_size]
            yield from decoder.batch(batch, [encoded[i] for i in batch], [asked[i] for i in batch], batch_size)

    return answers()


def stream(
    model: Model,
    prompt: Prompt | Request,
    decoder: str = "tr_jacobi",
    tree: TokenTree | None = None,
    draft: Model | None = None,
    passes: int = 1,
    **settings: object,
) -> Iterator[Piece]:
    """One answer as it comes: a piece every `passes` forward passes, each with what is certain of the text.

    The pieces together are the text of `generate`; the last one has the `Generation`. To cancel, close the iterator or
    drop it. `settings` are those of `Request`.
    """
    request = as_request(prompt, requests.with_settings(Request(""), settings), 0)
    answerer = Decoder(model, decoder, tree, draft)
    ids = encode(answerer, request, "prompt")
    if passes < 1:
        raise InputError(f"passes={passes}: must be at least 1")
    return (piece for piece, _ in answerer.stream(ids, request, passes))


class Chat:
    """A conversation whose every turn goes on from what the cache knows of the turns before."""

    def __init__(
        self,
        model: Model,
        decoder: str = "tr_jacobi",
        tree: TokenTree | None = None,
        draft: Model | None = None,
        system: str | None = None,
        **settings: object,
    ):
        """`settings` are those of `Request`."""
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.reused = 0  # tokens of the last prompt that did not have to be read
        self._decoder = Decoder(model, decoder, tree, draft)
        self._settings = requests.with_settings(Request(""), settings)
        self._settings.check("")
        self._prefix: Prefix | None = None

    def stream(self, content: str) -> Iterator[Piece]:
        """Says `content` as the user, and gives the answer as it comes. A cancelled turn is not remembered."""
        messages = [*self.messages, {"role": "user", "content": content}]
        request = dataclasses.replace(self._settings, prompt=messages, sample=len(messages))
        ids = encode(self._decoder, request, "chat")
        for piece, session in self._decoder.stream(ids, request, prefix=self._prefix):
            if piece.generation is not None:
                self.messages = [*messages, {"role": "assistant", "content": piece.generation.text}]
                self.reused, self._prefix = session.reused, session.prefix()
            yield piece

    def say(self, content: str) -> Generation:
        """Says `content` as the user; the whole answer."""
        *_, last = self.stream(content)
        return last.generation


def encode(decoder: Decoder, request: Request, place: str) -> list[int]:
    """The token ids of a request's prompt. InputError, with its place, if it cannot be answered."""
    request.check(f"{place}: ")
    return requests.encode(decoder.model.tokenizer, request.prompt, decoder.model.cfg.max_length, place)


def as_request(prompt: Prompt | Request, settings: Request, index: int) -> Request:
    """The request for prompt number `index`: its own, or one with these settings."""
    if isinstance(prompt, Request):
        return prompt
    return dataclasses.replace(settings, prompt=prompt, sample=index)


def _draft_drafter(model: Model, draft: Model, tree: TokenTree | None) -> Drafter:
    tree = _DRAFT_TREE if tree is None else tree
    if tree.count(JACOBI) == 0:
        raise InputError("tree: decoder 'draft_model' needs jacobi nodes: they hold what the draft model predicts")
    ours, theirs = model.tokenizer, draft.tokenizer
    same = ours.vocab_size == theirs.vocab_size
    if not same or any(ours.decode([i]) != theirs.decode([i]) for i in range(ours.vocab_size)):
        raise InputError(f"draft model {draft.name or ''}: its vocabulary is not that of the model")
    return draft_model.drafter(tree, draft.cfg)


def _check_tree(drafter: Drafter, vocab_size: int) -> None:
    tree = drafter.tree
    foreign = [SOURCES[source] for source in _FOREIGN_SOURCES.get(drafter.name, ()) if source in tree.sources]
    if foreign:
        raise InputError(f"tree: has {foreign[0]} nodes, decoder {drafter.name!r} has none: tr_jacobi takes any tree")
    smallest = min(vocab_size, drafter.cfg.vocab_size if drafter.cfg is not None else vocab_size)
    if tree.count(JACOBI) > smallest:
        raise InputError(f"tree: has jacobi rank {tree.count(JACOBI) - 1}, the model a vocabulary of {smallest}")
