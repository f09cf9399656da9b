"""Random models small enough to decode hundreds of sequences in a test, and random prompts, samplers and trees."""

import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
import random_params

from msn_jax import checkpoint, directories
from msn_jax.config import LlamaConfig
from msn_jax.data import tokenizer as tokenizers
from msn_jax.data.tokenizer import Tokenizer
from msn_jax.decode import batch
from msn_jax.decode.models import Model
from msn_jax.decode.tree import NOISE, TokenTree
from msn_jax.decode.verify import Sampler


def config(
    vocab_size: int = 13, n_heads: int = 4, n_kv_heads: int = 2, max_length: int = 512, n_layers: int = 2
) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        d_model=32,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=8,
        d_mlp=48,
        max_length=max_length,
        rope_theta=777.0,
        rope_scaling="none",
        sliding_window=0,
        norm_eps=1e-3,
        qkv_bias=False,
        qk_norm=False,
        tie_embeddings=n_heads != n_kv_heads,
        dtype="float32",
        param_dtype="float32",
    )


def sampler(
    count: int, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 9
) -> Sampler:
    """The same settings for every row, with a key per row."""
    return Sampler(
        temperature=np.full(count, temperature, np.float32),
        top_k=np.full(count, top_k, np.int32),
        top_p=np.full(count, top_p, np.float32),
        min_p=np.full(count, min_p, np.float32),
        keys=jax.random.split(jax.random.key(seed), count),
    )


def params(cfg: LlamaConfig, seed: int) -> dict:
    """Decoding layout. The weights are large enough that completions do not repeat one token from the start."""
    return random_params.unstacked(cfg, seed, gain=1.5)


def prompts(rng: np.random.Generator, count: int, vocab_size: int, longest: int = 24) -> list[list[int]]:
    """Prompts of 1 to `longest` tokens; two thirds of them end with a run of one token."""
    drawn = []
    for number in range(count):
        prompt = rng.integers(0, vocab_size, rng.integers(1, longest + 1)).tolist()
        if number % 3:
            start = int(rng.integers(0, len(prompt)))
            prompt[start:] = [prompt[start]] * (len(prompt) - start)
        drawn.append(prompt)
    return drawn


def random_nodes(rng: np.random.Generator, width: int, sources: list[int], first: int = 1) -> list[tuple]:
    """Nodes `first` to `width - 1` of a token tree as (parent, source, rank), for `tree.build`. Ranks are below 3."""
    nodes = []
    for node in range(first, width):
        source = int(rng.choice(sources))
        nodes.append((int(rng.integers(0, node)), source, 0 if source == NOISE else int(rng.integers(0, 3))))
    return nodes


def with_noise_tails(tree: TokenTree, nodes: list[int], length: int) -> TokenTree:
    """The same tree with a noise tail of `length` nodes after each of `nodes`.

    Whichever of them is accepted last, the predictions in its tail are fresh drafts for the next forward pass; a leaf
    without a tail leaves none (BiTA, arXiv 2401.12522).
    """
    parents, sources, ranks = (list(values) for values in (tree.parents, tree.sources, tree.ranks))
    for node in nodes:
        for _ in range(length):
            parents.append(node)
            sources.append(NOISE)
            ranks.append(0)
            node = len(parents) - 1
    return TokenTree(tuple(parents), tuple(sources), tuple(ranks), tree.min_match)


@functools.cache
def tokenizer() -> Tokenizer:
    """A SentencePiece model of 320 pieces, trained by this repository."""
    text = "the cat sat on the mat, and a dog sat on the cat: three and four is seven, five and six is eleven. "
    with tempfile.TemporaryDirectory() as directory:
        return tokenizers.train([text] * 9, 320, f"{directory}/tokenizer.model")


@functools.cache
def model(max_length: int = 256, seed: int = 0) -> Model:
    """A random model with a tokenizer; of one layer, because most of a test's time is compilation."""
    cfg = config(320, max_length=max_length, n_layers=1)
    return Model(params(cfg, seed), cfg, tokenizer())


def endless(model: Model) -> Model:
    """The same model without a stop token."""
    return dataclasses.replace(model, tokenizer=dataclasses.replace(model.tokenizer, stop_ids=(-1,)))


def small_caches(monkeypatch: pytest.MonkeyPatch, slots: int) -> None:
    """Initial caches of `slots` tokens, or of little more than the prompts, so that decoding has to grow them."""
    monkeypatch.setattr(batch, "_SMALLEST_BUCKET", slots)
    monkeypatch.setattr(batch, "_SMALLEST_CAPACITY", slots)
    monkeypatch.setattr(batch, "_INITIAL_OUTPUT", 1)


def write_model(directory: Path, max_length: int = 256, seed: int = 0, n_layers: int = 2) -> None:
    """Writes a training workdir with untied embeddings; the models that tests train have tied ones."""
    with directories.whole(directory) as workdir:
        tokenizers.save(tokenizer(), workdir)
        cfg = dataclasses.replace(config(320, max_length=max_length, n_layers=n_layers), tie_embeddings=False)
        checkpoint.save_model(workdir, random_params.stacked(cfg, seed, gain=1.5), cfg)
