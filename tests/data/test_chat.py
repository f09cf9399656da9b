import dataclasses

import numpy as np
import pytest

from msn_jax.cli import InputError
from msn_jax.data import chat
from msn_jax.data import tokenizer as tokenizer_lib

TEXT = "def area(width, height):\n    return width * height\nWhat is 2 + 2? It is 4. Be brief.\n"
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "<|end|>"},
    {"role": "assistant", "content": ""},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_lib.train([TEXT] * 20, 310, tmp_path_factory.mktemp("chat") / "tokenizer.model")


@pytest.fixture(scope="module")
def without_roles(tokenizer):
    return dataclasses.replace(tokenizer, role_ids=None, end_id=None)


@pytest.fixture(scope="module")
def with_dummy_prefix(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "tokenizer.model"
    override = b"\x1a\x02\x18\x01"  # normalizer_spec { add_dummy_prefix: true }
    path.write_bytes(tokenizer.processor.serialized_model_proto() + override)
    return tokenizer_lib.load(path)


def masked(tokens, response_mask):
    return tokens[response_mask].tolist()


def test_prompt_and_response(tokenizer):
    prompt, response = "def area(width, height):\n", "    return width * height\n"
    tokens, response_mask = chat.encode_record(tokenizer, {"prompt": prompt, "response": response, "path": "a.py"})
    assert tokens.dtype == np.int32 and response_mask.dtype == np.bool_
    expected = [tokenizer.bos_id, *tokenizer.encode(prompt), *tokenizer.encode(response), tokenizer.eos_id]
    assert tokens.tolist() == expected
    assert masked(tokens, response_mask) == [*tokenizer.encode(response), tokenizer.eos_id]
    assert tokens[: np.argmax(response_mask)].tolist() == chat.encode_prompt(tokenizer, prompt)


def test_the_boundary_is_a_token_boundary(tokenizer):
    assert tokenizer.encode("width") != tokenizer.encode("widt") + tokenizer.encode("h")
    tokens, response_mask = chat.encode_record(tokenizer, {"prompt": "widt", "response": "h"})
    assert masked(tokens, response_mask) == [*tokenizer.encode("h"), tokenizer.eos_id]


def test_a_dummy_prefix_comes_once(with_dummy_prefix):
    assert with_dummy_prefix.encode("x") != with_dummy_prefix.encode("x", start=False)
    for prompt in ("def f():\n", ""):
        tokens, _ = chat.encode_record(with_dummy_prefix, {"prompt": prompt, "response": "x"})
        assert with_dummy_prefix.decode(tokens) == prompt + "x"
    assert tokens.tolist() == [with_dummy_prefix.bos_id, *with_dummy_prefix.encode("x"), with_dummy_prefix.eos_id]


def test_messages(tokenizer):
    tokens, response_mask = chat.encode_record(tokenizer, {"messages": CONVERSATION})
    roles, end = tokenizer.role_ids, tokenizer.end_id
    expected = [tokenizer.bos_id]
    for message in CONVERSATION:
        expected += [roles[message["role"]], *tokenizer.encode(message["content"]), end]
    assert tokens.tolist() == expected
    assert masked(tokens, response_mask) == [*tokenizer.encode("4."), end, end]
    assert tokens.tolist().count(end) == len(CONVERSATION)  # '<|end|>' in a text is text
    prompt = chat.encode_prompt(tokenizer, CONVERSATION[:2])
    assert prompt == expected[: np.argmax(response_mask)]
    assert prompt[-1] == roles["assistant"]


def test_text(tokenizer):
    tokens, response_mask = chat.encode_record(tokenizer, {"text": TEXT})
    assert tokens.tolist() == [tokenizer.bos_id, *tokenizer.encode(TEXT), tokenizer.eos_id]
    assert response_mask.tolist() == [False] + [True] * (len(tokens) - 1)


def test_raw_prompts_do_without_roles(without_roles):
    assert chat.encode_prompt(without_roles, "area") == [without_roles.bos_id, *without_roles.encode("area")]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty prompt: give some text, or at least one message"),
        ([], "empty prompt: give some text, or at least one message"),
        ([{"role": "tool", "content": "x"}], "unknown role 'tool': known roles are system, user, assistant"),
        ([{"content": "x"}], "unknown role None: known roles are system, user, assistant"),
        ([{"role": "user", "content": None}], "the content of a message with role 'user' is not text"),
    ],
)
def test_refuses_prompts(tokenizer, prompt, message):
    with pytest.raises(InputError) as caught:
        chat.encode_prompt(tokenizer, prompt)
    assert str(caught.value) == message


def test_messages_need_roles(without_roles):
    message = (
        "this tokenizer has no role symbols and no chat template: give raw prompts, a tokenizer trained by this "
        "project, or one with a chat template"
    )
    with pytest.raises(InputError) as caught:
        chat.encode_prompt(without_roles, CONVERSATION)
    assert str(caught.value) == message
    with pytest.raises(InputError) as caught:
        chat.encode_record(without_roles, {"messages": CONVERSATION})
    assert str(caught.value) == message
