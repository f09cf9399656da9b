"""Chat templates: rendering, the assistant's spans, and the bounds on what a template may do."""

import dataclasses
import datetime
import json
import time
from pathlib import Path

import chat_examples
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refusals import refusal

from msn_jax.data import chat, response_spans
from msn_jax.data.chat_template import ChatTemplate

REFERENCES = json.loads(Path(__file__).with_name("chat_references.json").read_text(encoding="utf-8"))
QUESTION = [{"role": "user", "content": "a"}]
ANSWERED = [*QUESTION, {"role": "assistant", "content": "b"}]
ENDS = frozenset(chat_examples.SPECIAL_TOKENS)

# Strings that templates look for, at the edges of contents.
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


def render_with_spans(one, messages, ends=ENDS):
    """The text of a conversation and the assistant's spans, without calls and literal special tokens."""
    now = datetime.datetime.now()
    text = one.render(messages, False, now=now)
    return text, response_spans.find_response_spans(one, messages, None, now, text, (), ends)


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
    text, marked = render_with_spans(template(chat_examples.marked(source)), messages)
    same_text, constructed = render_with_spans(template(chat_examples.unmarked(source)), messages)
    assert text == same_text
    if name == "open_thought":  # the generation prompt is not the assistant's, even where the content repeats it
        marked = [(a + 8 if text.startswith("<think>\n", a) else a, b) for a, b in marked]
    assert marked == constructed
    assert len(marked) == sum(message["role"] == "assistant" for message in messages)


# --- The assistant's spans


def responses(source, messages):
    text, spans = render_with_spans(template(source), messages)
    return [text[a:b] for a, b in spans]


def test_example():
    messages = [
        *ANSWERED,
        {"role": "user", "content": "<|im_end|>"},
        {"role": "assistant", "content": "c <|im_end|> d"},
    ]
    assert responses(chat_examples.unmarked(chat_examples.CHATML), messages) == [
        "b<|im_end|>",
        "c <|im_end|> d<|im_end|>",
    ]
    thinking = chat_examples.unmarked(chat_examples.TEMPLATES["thinking"])
    messages[1] = {"role": "assistant", "content": "<think>\nlong\n</think>\n\nb"}
    assert responses(thinking, messages) == ["b<|im_end|>", "<think>\n\n</think>\n\nc <|im_end|> d<|im_end|>"]


def test_a_template_without_generation_prompt():
    source = chat_examples.unmarked(chat_examples.CHATML).partition("{% if add_generation_prompt")[0]
    assert responses(source, [*ANSWERED, *ANSWERED]) == ["b<|im_end|>"] * 2


@pytest.mark.parametrize(
    ("source", "messages", "reason"),
    [
        ("{{ messages | map(attribute='content') | join('\\n') }}", ANSWERED, "it writes no special token at the end"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}</s>{% endfor %}", ANSWERED, "does not print"),
        ("{% for m in messages %}{{ m.content }}</s>{{ m.content }}</s>{% endfor %}", ANSWERED, "drops or repeats"),
        (
            "{% for m in messages %}{{ m.content }}{{ m.content | length }}</s>{% endfor %}",
            ANSWERED,
            "the end of a content changes the text after it",
        ),
        (
            "{% for m in messages %}{{ m.content | replace('c\ue000', 'd\ue000') }}</s>{% endfor %}",
            [*QUESTION, {"role": "assistant", "content": "bc"}],
            "the end of a content changes how it renders the content",
        ),
        (
            "{{ messages | length > 3 }}{% for m in messages %}{{ m.content }}</s>{% endfor %}",
            [*ANSWERED, *ANSWERED],
            "the text before message 2 depends on later messages",
        ),
        (
            "{% for m in messages %}{{ m.content | reverse }}</s>{% endfor %}",
            [*QUESTION, {"role": "assistant", "content": "bc"}],
            "message 2 does not end as the assistant's turns usually do, with '</s>'",
        ),
        (
            "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}</s>{% endfor %}"
            "{% if add_generation_prompt %}[A]{% endif %}",
            ANSWERED,
            "its generation prompt differs from the beginning of an assistant's turn",
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
def test_spans_that_cannot_be_located_exactly_are_refused(source, messages, reason):
    message = refusal(render_with_spans, template(source), messages)
    assert message.startswith("T: cannot locate the assistant's part of the chat exactly: ") and reason in message


def test_generation_blocks_in_macros_and_nested():
    source = (
        "{% macro turn(m) %}[{% generation %}{{ m.content }}{% generation %}!{% endgeneration %}{% endgeneration %}]"
        "{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}"
    )
    assert responses(source, ANSWERED) == ["a!", "b!"]


# --- Rendering, and its bounds


def test_block_lines_are_removed():
    source = "a\n  {% if true %}\nb\n  {% endif %}\nc"
    assert template(source).render(ANSWERED, False) == "a\nb\nc"


def test_filters_globals_and_statements():
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
    ("source", "reason"),
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
        ("{{ unknown.name }}", "'unknown' is undefined"),
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ ", "the chat template is broken"),
        ("{% generation %}", "the chat template is broken"),
    ],
)
def test_broken_and_unbounded_templates_are_refused(monkeypatch, source, reason):
    monkeypatch.setattr("msn_jax.data.template_sandbox._MAX_ITERATIONS", 10_000)
    began = time.monotonic()
    message = refusal(template(source).render, QUESTION, True)
    assert message.startswith("T: the chat template ") and reason in message
    assert time.monotonic() - began < 5


# --- In a tokenizer


def test_a_template_writes_bos_itself(load):
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
    for messages, reason in (
        (
            [{"role": "wizard", "content": "x"}],
            "message 1: unknown role 'wizard': known roles are system, user, assistant, developer, tool",
        ),
        (
            [{"role": "user", "content": None}],
            "message 1 (user): has no content; it must be text, and only a message with tool_calls may lack it",
        ),
    ):
        assert refusal(chat.encode_prompt, tokenizer, messages) == reason
        assert refusal(chat.encode_record, tokenizer, {"messages": messages}) == reason
    assert refusal(chat.encode_prompt, tokenizer, []).startswith("empty prompt")


def test_without_a_template_messages_are_refused(load):
    tokenizer = load(None)
    assert refusal(chat.encode_prompt, tokenizer, QUESTION).startswith("this tokenizer has no role symbols and no chat")
    nothing = dataclasses.replace(load("{{ '' }}"), start_ids=())
    blank = [{"role": "user", "content": " "}]
    assert refusal(chat.encode_prompt, nothing, blank) == "empty prompt: the tokenizer turns it into no tokens"
