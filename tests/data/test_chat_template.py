import dataclasses
import json
import time
from pathlib import Path

import chat_examples
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msn_jax.cli import InputError
from msn_jax.data import chat
from msn_jax.data import tokenizer as tokenizer_lib
from msn_jax.data.chat_template import ChatTemplate

REFERENCES = json.loads(Path(__file__).with_name("chat_references.json").read_text(encoding="utf-8"))
QUESTION = [{"role": "user", "content": "a"}]
ANSWERED = [*QUESTION, {"role": "assistant", "content": "b"}]
ENDS = frozenset(chat_examples.SPECIAL_TOKENS)

# Texts that meet what templates look for, at the edges of contents.
CONTENT = st.lists(
    st.sampled_from(
        [*" \n\tab<\ue000\ue001", "<think>", "</think>", "<|im_end|>", "</s>", "[/INST]", "assistant\n", "é"]
    )
).map("".join)
CHATS = st.tuples(st.lists(CONTENT, max_size=1), st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4)).map(
    lambda parts: (
        [{"role": "system", "content": content} for content in parts[0]]
        + [
            {"role": role, "content": content}
            for turn in parts[1]
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
    )
)


def template(source, **special_tokens):
    return ChatTemplate(source, "T", tuple({"bos_token": "<s>", "eos_token": "</s>", **special_tokens}.items()))


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Loads the small tokenizer with a template."""

    def load_with(source, **config):
        directory = tmp_path_factory.mktemp("chat")
        chat_examples.write_directory(directory, source, **config)
        return tokenizer_lib.load(directory)

    return load_with


def refusal(call, *arguments):
    with pytest.raises(InputError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- Against transformers


@pytest.mark.parametrize("name", chat_examples.TEMPLATES)
def test_text_tokens_and_mask_are_those_of_transformers(load, name):
    for mark in (chat_examples.unmarked, chat_examples.marked):
        tokenizer = load(mark(chat_examples.TEMPLATES[name]))
        rows = REFERENCES[name]
        for messages, row in zip(chat_examples.conversations(len(rows)), rows, strict=True):
            assert tokenizer.template.render(messages, add_generation_prompt=False) == row["text"]
            assert tokenizer.template.render(messages[:-1], add_generation_prompt=True) == row["prompt"]
            tokens, response_mask = chat.encode_record(tokenizer, {"messages": messages})
            assert (tokens.dtype, response_mask.dtype) == (np.int32, np.bool_)
            assert tokens.tolist() == row["tokens"]
            assert "".join(map(str, response_mask.astype(int))) == row["response_mask"]


@pytest.mark.parametrize("name", chat_examples.TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(messages=CHATS)
def test_construction_agrees_with_markers(name, messages):
    source = chat_examples.TEMPLATES[name]
    text, marked = template(chat_examples.marked(source)).render_with_spans(messages, ENDS)
    same_text, constructed = template(chat_examples.unmarked(source)).render_with_spans(messages, ENDS)
    assert text == same_text
    if name == "open_thought":  # what the generation prompt says is not the answer's, even where the answer says it too
        marked = [(a + 8 if text.startswith("<think>\n", a) else a, b) for a, b in marked]
    assert marked == constructed
    assert len(marked) == sum(message["role"] == "assistant" for message in messages)


# --- What is the assistant's


def spoken(source, messages):
    text, spans = template(source).render_with_spans(messages, ENDS)
    return [text[a:b] for a, b in spans]


def test_example():
    messages = [
        *ANSWERED,
        {"role": "user", "content": "<|im_end|>"},
        {"role": "assistant", "content": "c <|im_end|> d"},
    ]
    assert spoken(chat_examples.unmarked(chat_examples.CHATML), messages) == ["b<|im_end|>", "c <|im_end|> d<|im_end|>"]
    thinking = chat_examples.unmarked(chat_examples.TEMPLATES["thinking"])
    messages[1] = {"role": "assistant", "content": "<think>\nlong\n</think>\n\nb"}
    assert spoken(thinking, messages) == ["b<|im_end|>", "<think>\n\n</think>\n\nc <|im_end|> d<|im_end|>"]


def test_a_generation_prompt_that_the_template_does_not_know():
    source = chat_examples.unmarked(chat_examples.CHATML).partition("{% if add_generation_prompt")[0]
    assert spoken(source, [*ANSWERED, *ANSWERED]) == ["b<|im_end|>"] * 2


@pytest.mark.parametrize(
    ("source", "messages", "said"),
    [
        ("{{ messages | map(attribute='content') | join('\\n') }}", ANSWERED, "there is no special token at the end"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}</s>{% endfor %}", ANSWERED, "does not print"),
        ("{% for m in messages %}{{ m.content }}</s>{{ m.content }}</s>{% endfor %}", ANSWERED, "drops or repeats"),
        (
            "{% for m in messages %}{{ m.content }}{{ m.content | length }}</s>{% endfor %}",
            ANSWERED,
            "it changes with what stands at the end of an answer",
        ),
        (
            "{% for m in messages %}{{ m.content | replace('c\ue000', 'd\ue000') }}</s>{% endfor %}",
            [*QUESTION, {"role": "assistant", "content": "bc"}],
            "it changes an answer with what stands at its end",
        ),
        (
            "{{ messages | length > 3 }}{% for m in messages %}{{ m.content }}</s>{% endfor %}",
            [*ANSWERED, *ANSWERED],
            "what stands before message 2 depends on what comes behind it",
        ),
        (
            "{% for m in messages %}{{ m.content | reverse }}</s>{% endfor %}",
            [*QUESTION, {"role": "assistant", "content": "bc"}],
            "message 2 does not end as an assistant's turn usually does, '</s>'",
        ),
        (
            "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}</s>{% endfor %}"
            "{% if add_generation_prompt %}[A]{% endif %}",
            ANSWERED,
            "its generation prompt is not how a turn of the assistant begins",
        ),
        (
            "{% if messages | length == 0 %}{% generation %}{% endgeneration %}{% endif %}a</s>",
            ANSWERED,
            "mark nothing",
        ),
        (
            "{% set x %}{% generation %}b{% endgeneration %}{% endset %}{{ x | length }}",
            ANSWERED,
            "does more with its {% generation %} blocks",
        ),
    ],
)
def test_what_is_not_found_exactly_is_refused(source, messages, said):
    message = refusal(template(source).render_with_spans, messages, ENDS)
    assert message.startswith("T: cannot tell which part of the chat is the assistant's: ") and said in message


def test_blocks_may_be_in_macros_and_in_each_other():
    source = (
        "{% macro turn(m) %}[{% generation %}{{ m.content }}{% generation %}!{% endgeneration %}{% endgeneration %}]"
        "{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}"
    )
    assert spoken(source, ANSWERED) == ["a!", "b!"]


# --- What a template may do


def test_lines_of_blocks_leave_no_trace():
    source = "a\n  {% if true %}\nb\n  {% endif %}\nc"
    assert template(source).render(ANSWERED, False) == "a\nb\nc"


def test_the_tools_of_a_template():
    source = (
        "{{ messages | tojson }}{{ {'b': [1, none], 'a': '<é>'} | tojson(indent=1, sort_keys=true) }}"
        "{{ strftime_now('%%') }}{{ tools is none }}{{ missing }}{{ 1 ~ none ~ 'x' }}{{ '%s=%d' % ('a', 2) }}"
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ 'ab' * 2 + 'c' }}{% endfor %}"
    )
    assert template(source).render(ANSWERED, False) == (
        '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'
        '{\n "a": "<é>",\n "b": [\n  1,\n  null\n ]\n}%True1Nonexa=2ababc'
    )


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "loops more than"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
            "loops more than",
        ),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 'a' * 10 ** 10 }}", "more than 33554432 characters"),
        ("{{ [1] * 10 ** 10 }}", "more than 33554432 characters"),
        ("{{ 9 ** (9 ** 9) }}", "more than 33554432"),
        ("{{ '%999999999d' % 1 }}", "width"),
        ("{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "more than"),
        ("{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}", "more than"),
        ("{% set a = 'a' * 999999 %}{% for i in range(60) %}{{ a }}{% endfor %}", "more than 33554432 characters"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content + none }}", "concatenate"),
        ("{{ nobody.name }}", "'nobody' is undefined"),
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ ", "the chat template is broken"),
        ("{% generation %}", "the chat template is broken"),
    ],
)
def test_bad_templates(monkeypatch, source, said):
    monkeypatch.setattr("msn_jax.data.chat_template._MAX_TURNS", 10_000)
    began = time.monotonic()
    message = refusal(template(source).render, QUESTION, True)
    assert message.startswith("T: the chat template ") and said in message
    assert time.monotonic() - began < 5


# --- In a tokenizer


def test_a_template_brings_its_own_bos(load):
    tokenizer = load(chat_examples.unmarked(chat_examples.TEMPLATES["llama3"]), add_bos_token=True)
    ids = chat.encode_prompt(tokenizer, QUESTION)
    assert ids.count(0) == 1 and ids[0] == 0
    assert chat.encode_prompt(tokenizer, "a")[0] == 0
    assert ids == tokenizer.encode(
        "<s><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_the_prompt_is_the_beginning_of_the_record(load):
    tokenizer = load(chat_examples.unmarked(chat_examples.CHATML))
    tokens, response_mask = chat.encode_record(tokenizer, {"messages": ANSWERED})
    assert chat.encode_prompt(tokenizer, QUESTION) == tokens[: np.argmax(response_mask)].tolist()
    assert tokenizer.decode(tokens[response_mask]) == "b"
    assert tokens[response_mask][-1] == chat_examples.SPECIAL_TOKENS.index("<|im_end|>")


def test_messages_are_checked_first(load):
    tokenizer = load(chat_examples.unmarked(chat_examples.CHATML))
    for messages, said in (
        ([{"role": "tool", "content": "x"}], "unknown role 'tool': known roles are system, user, assistant"),
        ([{"role": "user", "content": None}], "the content of a message with role 'user' is not text"),
    ):
        assert refusal(chat.encode_prompt, tokenizer, messages) == said
        assert refusal(chat.encode_record, tokenizer, {"messages": messages}) == said
    assert refusal(chat.encode_prompt, tokenizer, []).startswith("empty prompt")


def test_without_a_template_messages_are_refused(load):
    tokenizer = load(None)
    assert refusal(chat.encode_prompt, tokenizer, QUESTION).startswith("this tokenizer has no role symbols and no chat")
    nothing = dataclasses.replace(load("{{ '' }}"), start_ids=())
    assert refusal(chat.encode_prompt, nothing, QUESTION) == "empty prompt: the tokenizer leaves nothing of it"
