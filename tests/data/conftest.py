"""Fixtures of the tests of tokenizers and chat templates."""

import json

import chat_examples
import pytest

from msn_jax.data import tokenizer as tokenizer_lib


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Loads the small tokenizer with a chat template; equal arguments give one tokenizer."""
    cache = {}

    def load_with(source, **config):
        key = source, json.dumps(config, sort_keys=True)
        if key not in cache:
            directory = tmp_path_factory.mktemp("chat")
            chat_examples.write_directory(directory, source, **config)
            cache[key] = tokenizer_lib.load(directory)
        return cache[key]

    return load_with
