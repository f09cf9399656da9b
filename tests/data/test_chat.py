"""Records and prompts to tokens and response masks, with a tokenizer of our own."""

import dataclasses

import numpy as np
import pytest

from msn_jax.cli import InputError
from msn_jax.data import chat
from msn_jax.data import tokenizer as tokenizer_lib

TEXT = "def area(width, height):\n    return width * height\nWhat is 2 + 2? It is 4. Be brief.\n"
CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
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


def test_prompt_and_response_are_encoded_separately(tokenizer):
    assert tokenizer.encode("width") != tokenizer.encode("widt") + tokenizer.encode("h")
    tokens, response_mask = chat.encode_record(tokenizer, {"prompt": "widt", "response": "h"})
    assert masked(tokens, response_mask) == [*tokenizer.encode("h"), tokenizer.eos_id]


def test_a_dummy_prefix_is_added_once(with_dummy_prefix):
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
    assert tokens.tolist().count(end) == len(CONVERSATION)  # '<|end|>' in a content is text
    prompt = chat.encode_prompt(tokenizer, CONVERSATION[:2])
    assert prompt == expected[: np.argmax(response_mask)]
    assert prompt[-1] == roles["assistant"]


def test_text(tokenizer):
    tokens, response_mask = chat.encode_record(tokenizer, {"text": TEXT})
    assert tokens.tolist() == [tokenizer.bos_id, *tokenizer.encode(TEXT), tokenizer.eos_id]
    assert response_mask.tolist() == [False] + [True] * (len(tokens) - 1)


def test_raw_prompts_need_no_roles(without_roles):
    assert chat.encode_prompt(without_roles, "area") == [without_roles.bos_id, *without_roles.encode("area")]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty prompt: give some text, or at least one message"),
        ([], "empty prompt: give some text, or at least one message"),
        ([{"role": "tool", "content": "x"}], "message 1: unknown role 'tool': known roles are system, user, assistant"),
        ([{"content": "x"}], "message 1: unknown role None: known roles are system, user, assistant"),
        ([{"role": ["user"]}], "message 1: unknown role ['user']: known roles are system, user, assistant"),
        (
            [{"role": "user", "content": None}],
            "message 1 (user): has no content; it must be text, and only a message with tool_calls may lack it",
        ),
        (
            [{"role": "user", "content": 7}],
            "message 1 (user): content is of type int; must be text or a list of text parts",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "message 1 (user): content part 1 is of type 'image_url'; only {'type': 'text', 'text': ...} parts can be "
            "read",
        ),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
            "message 2 (assistant): tool_calls: this tokenizer has no chat template and shows only role and content; "
            "remove it, or use a model whose template shows it",
        ),
        (
            [{"role": "user", "content": "a", "train": 0}],
            "message 1 (user): 'train' is 0; must be true or false",
        ),
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


def test_content_parts_are_joined(tokenizer):
    parts = [{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]
    for encode in (chat.encode_prompt, lambda *args: chat.encode_record(args[0], {"messages": args[1]})[0].tolist()):
        whole = encode(tokenizer, [{"role": "user", "content": "2 + 2?"}])
        assert encode(tokenizer, [{"role": "user", "content": parts}]) == whole


def test_messages_that_are_not_trained_on_are_context(tokenizer):
    messages = [dict(message) for message in CONVERSATION]
    tokens, whole = chat.encode_record(tokenizer, {"messages": messages})
    messages[2]["train"] = False
    messages[4]["train"] = True
    same_tokens, response_mask = chat.encode_record(tokenizer, {"messages": messages})
    assert tokens.tolist() == same_tokens.tolist()
    assert masked(tokens, whole) == [*tokenizer.encode("4."), tokenizer.end_id, tokenizer.end_id]
    assert masked(tokens, response_mask) == [tokenizer.end_id]


def test_tools_need_a_template(tokenizer):
    for call in (
        lambda: chat.encode_prompt(tokenizer, CONVERSATION, [{"name": "f"}]),
        lambda: chat.encode_record(tokenizer, {"messages": CONVERSATION, "tools": [{"name": "f"}]}),
    ):
        with pytest.raises(InputError, match="tools: this tokenizer has no chat template"):
            call()
    with pytest.raises(InputError, match="tools need messages"):
        chat.encode_prompt(tokenizer, "a", [{"name": "f"}])


@pytest.mark.parametrize(
    "value",
    [
        {"text": "a\ud800"},
        {"prompt": "\udfff", "response": "a"},
        {"prompt": "a", "response": "\udc80"},
        {"messages": [{"role": "user", "content": "a\ud800"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}]},
        {"messages": CONVERSATION, "tools": [{"\ud800": 1}]},
    ],
    ids=str,
)
def test_lone_surrogates_are_refused(tokenizer, value):
    with pytest.raises(InputError, match="lone surrogate") as caught:
        chat.encode_record(tokenizer, value)
    assert str(caught.value).isprintable() and str(caught.value).encode()
    prompt = value.get("messages") or "".join(value.values())
    with pytest.raises(InputError, match="lone surrogate"):
        chat.encode_prompt(tokenizer, prompt, value.get("tools"))


def test_text_outside_of_the_read_fields_is_not_checked(tokenizer):
    tokens, mask = chat.encode_record(tokenizer, {"text": "a", "path": "\udc80.py"})
    expected_tokens, expected_mask = chat.encode_record(tokenizer, {"text": "a"})
    assert (tokens.tolist(), mask.tolist()) == (expected_tokens.tolist(), expected_mask.tolist())
