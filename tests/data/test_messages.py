"""Fields of messages: shown as transformers shows them, or refused. Calls are learned, results of tools are not."""

import chat_examples
import numpy as np
import pytest
from refusals import refusal

from msn_jax import cli
from msn_jax.cli import InputError
from msn_jax.data import chat
from msn_jax.data import tokenizer as tokenizer_lib
from msn_jax.data.messages import join_text_parts

CHATML = chat_examples.unmarked(chat_examples.CHATML)
# In the style of Qwen3: tools, calls, results and thoughts, where the last turn always has a thought.
TOOLS = """
{%- if tools %}{{ '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{ messages[0].content ~ '\\n' }}{% endif %}
    {{- tools | tojson ~ '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' ~ messages[0].content ~ '<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|im_start|>user\\n' ~ m.content ~ '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
    {{- '<|im_start|>assistant\\n' }}
    GENERATION
    {%- if loop.index0 > ns.last and (loop.last or m.reasoning_content) %}
        {{- '<think>\\n' ~ (m.reasoning_content or '') ~ '\\n</think>\\n' }}
    {%- endif %}
    {{- m.content or '' }}
    {%- for call in m.tool_calls or [] %}
        {{- '\\n<call>' ~ {'name': call.function.name, 'arguments': call.function.arguments} | tojson ~ '</call>' }}
    {%- endfor %}
    {{- '<|im_end|>' }}END{{ '\\n' }}
{%- elif m.role == 'tool' %}{{ '<|im_start|>user\\n<result>' ~ m.content ~ '</result><|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

FUNCTION = {"type": "function", "function": {"name": "get", "parameters": {"type": "object", "properties": {}}}}
RESULT = {"role": "tool", "content": "7", "tool_call_id": "1"}
USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}


def call(*arguments, content="", name="get", **fields):
    calls = [
        {"id": str(i), "type": "function", "function": {"name": name, "arguments": a}} for i, a in enumerate(arguments)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls, **fields}


def text_of(tokenizer, ids):
    return tokenizer.backend.decode(list(map(int, ids)), skip_special_tokens=False)


def learned(tokenizer, messages, tools=None):
    """The text of each stretch of learned tokens."""
    tokens, mask = chat.encode_record(tokenizer, {"messages": messages, "tools": tools})
    bounds = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(int), [0]]))).reshape(-1, 2)
    return [text_of(tokenizer, tokens[first:last]) for first, last in bounds]


# --- Tools


CONVERSATIONS = [
    [USER, call({"x": 1}), RESULT, ANSWER],
    [USER, call("{}"), RESULT, call({}, {"y": "é"}, content="more"), RESULT, RESULT, ANSWER, USER, ANSWER],
    [{"role": "system", "content": "s"}, USER, call({"k": "<|im_end|>"}, reasoning_content="hm"), RESULT, ANSWER],
    [USER, call({}, reasoning_content="hm"), RESULT, ANSWER, USER, ANSWER],  # a later question drops the thought
    [USER, call({"x": 1}, content=None)],
    [ANSWER, USER, ANSWER],
    [call({"x": 1}), RESULT, ANSWER],
]


@pytest.mark.parametrize("tools", [None, [FUNCTION]])
@pytest.mark.parametrize("index", range(len(CONVERSATIONS)))
def test_constructed_spans_equal_generation_blocks(load, index, tools):
    messages = CONVERSATIONS[index]
    by_markers, by_construction = (load(mark(TOOLS)) for mark in (chat_examples.marked, chat_examples.unmarked))
    expected = learned(by_markers, messages, tools)
    assert learned(by_construction, messages, tools) == expected
    assert len(expected) == sum(message["role"] == "assistant" for message in messages)


def test_a_call_is_learned_and_its_result_is_not(load):
    tokenizer = load(chat_examples.unmarked(TOOLS))
    assert learned(tokenizer, CONVERSATIONS[0]) == [
        '\n<call>{"name": "get", "arguments": {"x": 1}}</call><|im_end|>',
        "<think>\n\n</think>\nb<|im_end|>",
    ]


def test_legacy_function_calls_equal_tool_calls(load):
    tokenizer = load(chat_examples.unmarked(TOOLS))
    legacy = [
        USER,
        {"role": "assistant", "content": None, "function_call": {"name": "get", "arguments": "{}"}},
        {"role": "function", "name": "get", "content": "7"},
        ANSWER,
    ]
    assert learned(tokenizer, legacy) == learned(tokenizer, [USER, call("{}", content=None), RESULT, ANSWER])
    bare = {"role": "assistant", "content": "", "tool_calls": [{"name": "get", "arguments": "{}"}]}
    assert learned(tokenizer, [USER, bare]) == learned(tokenizer, [USER, call("{}")])


def test_prompts_show_tools_and_results(load):
    tokenizer = load(chat_examples.unmarked(TOOLS))
    text = text_of(tokenizer, chat.encode_prompt(tokenizer, CONVERSATIONS[0][:3], [FUNCTION]))
    assert '"name": "get", "parameters"' in text and "<result>7</result>" in text
    assert text.endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("source", "rendered"),
    [
        ("{{ m.content }}", ""),  # null would be printed
        ("{% if m['content'] is none %}-{% else %}{{ '' + m['content'] }}{% endif %}", "-"),
        ("{{ m['content'] + '' }}", ""),
    ],
)
def test_a_call_may_lack_content(load, source, rendered):
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    tokenizer = load("{% for m in messages %}[" + source + calls + "]{% endfor %}")
    for message in (call("{}", content=None), {k: v for k, v in call("{}").items() if k != "content"}):
        ids = chat.encode_prompt(tokenizer, [USER, message])
        assert text_of(tokenizer, ids) == f"[a][{rendered}get]"


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("shown", ["reasoning_content", "thinking"])
def test_reasoning_has_several_names(load, name, shown):
    tokenizer = load("{% for m in messages %}[{{ m." + shown + " }}{{ m.content }}]{% endfor %}")
    ids = chat.encode_prompt(tokenizer, [USER, {**ANSWER, name: "hm"}])
    assert text_of(tokenizer, ids) == "[a][hmb]"


def test_empty_optional_fields_are_absent(load):
    tokenizer = load(CHATML)
    empty = {"tool_calls": [], "function_call": None, "reasoning_content": "", "name": None, "tool_call_id": None}
    assert learned(tokenizer, [{**USER, "name": None}, {**ANSWER, **empty}], []) == learned(tokenizer, [USER, ANSWER])


# --- Fields that a template does not show


@pytest.mark.parametrize(
    ("messages", "tools", "message"),
    [
        ([USER, call({})], None, "message 2 (assistant): tool_calls: the chat template does not show it"),
        ([USER, {**ANSWER, "reasoning_content": "hm"}], None, "message 2 (assistant): reasoning_content: the chat"),
        ([USER, {**ANSWER, "thinking": "hm"}], None, "message 2 (assistant): reasoning_content: the chat"),
        ([{**USER, "name": "Bob"}, ANSWER], None, "message 1 (user): name: the chat template does not show it"),
        ([USER, ANSWER], [FUNCTION], "tools: the chat template does not show it"),
    ],
)
def test_fields_that_the_template_ignores_are_refused(load, messages, tools, message):
    tokenizer = load(CHATML)
    for function, arguments in (
        (chat.encode_prompt, (tokenizer, messages, tools)),
        (chat.encode_record, (tokenizer, {"messages": messages, "tools": tools})),
    ):
        assert refusal(function, *arguments).startswith(message)


@pytest.mark.parametrize("role", ["developer", "tool"])
def test_roles_that_the_template_ignores_are_refused(load, role):
    source = (
        "{% for m in messages %}{% if m.role in ('user', 'assistant') %}"
        "<|im_start|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    message = refusal(chat.encode_prompt, load(source), [{"role": role, "content": "x"}, USER])
    assert message.startswith(f"message 1 ({role}): the chat template does not show messages of this role")
    shown = text_of(load(CHATML), chat.encode_prompt(load(CHATML), [{"role": role, "content": "x"}, USER]))
    assert shown.startswith(f"<|im_start|>{role}\nx<|im_end|>")


@pytest.mark.parametrize(
    ("call_source", "message"),
    [
        ("{{ m.tool_calls[0].function.name }}", "message 2 (assistant): call 2 is dropped"),
        ("{% for c in m.tool_calls %}{{ c.function.name }}{% endfor %}", "message 2 (assistant): the content next to"),
    ],
)
def test_parts_of_calls_that_the_template_drops_are_refused(load, call_source, message):
    source = (
        "{% for m in messages %}<|im_start|>{% if m.tool_calls %}"
        + call_source
        + "{% else %}{{ m.content }}{% endif %}"
        "<|im_end|>{% endfor %}"
    )
    messages = [USER, call("{}", "{}", content="let me see"), RESULT]
    assert refusal(chat.encode_prompt, load(source), messages).startswith(message)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tool_calls": "f"}, "message 2 (assistant): malformed tool_calls"),
        ({"tool_calls": [{"type": "function"}]}, "message 2 (assistant): malformed tool_calls"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": 7}}]}, "message 2 (assistant): malformed tool_calls"),
        (
            {"tool_calls": [{"type": "custom", "function": {"name": "f", "arguments": ""}}]},
            "message 2 (assistant): a call has the type 'custom'",
        ),
        ({"role": "user", **{"tool_calls": [{"name": "f", "arguments": ""}]}}, "message 2 (user): has tool_calls"),
        ({"reasoning_content": ["hm"]}, "message 2 (assistant): reasoning_content must be text"),
    ],
)
def test_malformed_messages_are_refused(load, changed, message):
    tokenizer = load(chat_examples.unmarked(TOOLS))
    assert refusal(chat.encode_prompt, tokenizer, [USER, {**ANSWER, **changed}]).startswith(message)


def test_deeply_nested_arguments_are_refused(load):
    nested = {}
    for _ in range(5000):
        nested = {"a": nested}
    tokenizer = load(chat_examples.unmarked(TOOLS))
    expected = "the messages or their tools are nested more than 100 levels deep"
    assert refusal(chat.encode_prompt, tokenizer, [USER, call(nested)]) == expected
    assert refusal(chat.encode_prompt, tokenizer, [USER], [{**FUNCTION, "parameters": nested}]) == expected


# --- What is learned


@pytest.mark.parametrize("mark", [chat_examples.marked, chat_examples.unmarked])
def test_messages_with_train_false_are_context(load, mark):
    tokenizer = load(mark(TOOLS))
    messages = [USER, {**call({}), "train": False}, RESULT, ANSWER, {**USER, "train": False}, {**ANSWER, "train": True}]
    whole = [{key: value for key, value in message.items() if key != "train"} for message in messages]
    assert learned(tokenizer, messages) == learned(tokenizer, whole)[1:]
    tokens, _ = chat.encode_record(tokenizer, {"messages": messages})
    assert tokens.tolist() == chat.encode_record(tokenizer, {"messages": whole})[0].tolist()


GENERATED = "{% generation %}{{ m.content }}{% endgeneration %}"
LAST = "{% if loop.last %}{% generation %}</s>{% endgeneration %}{% endif %}"


@pytest.mark.parametrize(
    "source",
    [
        "{% if m.content %}" + GENERATED + "{% endif %}" + LAST,  # the empty reply has no block, the last has two
        "{% if m.content == 'b' %}" + GENERATED * 2 + "{% endif %}",  # two blocks for one of two replies
        "{% if m.content == 'b' %}" + GENERATED + "-" + GENERATED + "{% else %}{{ m.content }}{% endif %}",
    ],
)
@pytest.mark.parametrize("index", [1, 3])
def test_generation_blocks_that_are_not_one_per_message_cannot_be_left_out(load, source, index):
    tokenizer = load(
        "{% for m in messages %}{% if m.role == 'assistant' %}" + source + "{% else %}[{{ m.content }}]{% endif %}"
        "{% endfor %}"
    )
    messages = [USER, {**ANSWER, "content": ""}, USER, ANSWER]
    assert len(learned(tokenizer, messages)) >= 1
    messages[index] = {**messages[index], "train": False}
    message = refusal(chat.encode_record, tokenizer, {"messages": messages})
    assert message.endswith("to the assistant's messages one to one, so a message with train false cannot be left out")


@pytest.mark.parametrize("name", chat_examples.TEMPLATES)
def test_generation_blocks_with_train_false(load, name):
    """Odd contents: blank, with thoughts, with private-use characters."""
    tokenizer = load(chat_examples.marked(chat_examples.TEMPLATES[name]))
    for number, messages in enumerate(chat_examples.conversations(60, seed=4)):
        turns = [message for message in messages if message["role"] == "assistant"]
        tokens, whole = chat.encode_record(tokenizer, {"messages": messages})
        turns[number % len(turns)]["train"] = False
        same_tokens, mask = chat.encode_record(tokenizer, {"messages": messages})
        assert same_tokens.tolist() == tokens.tolist() and not (mask & ~whole).any() and (mask != whole).any()


@pytest.mark.parametrize("name", chat_examples.TEMPLATES)
def test_a_conversation_that_the_assistant_opens(load, name):
    messages = [ANSWER, USER, {"role": "assistant", "content": "c"}]
    by_markers, by_construction = (
        load(mark(chat_examples.TEMPLATES[name])) for mark in (chat_examples.marked, chat_examples.unmarked)
    )
    if name == "mistral":
        assert "roles must alternate" in refusal(chat.encode_record, by_construction, {"messages": messages})
        return
    assert learned(by_construction, messages) == learned(by_markers, messages)


def test_the_first_token_is_not_learned(load):
    source = "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %}{{ m.content }}</s>{% endif %}"
    source = "{% set first = messages[0].role %}" + source + "{% endfor %}"
    tokens, mask = chat.encode_record(load(source), {"messages": [{"role": "assistant", "content": "xyz"}, USER]})
    assert text_of(load(source), tokens[mask]) == "yz</s>" and not mask[0]


# --- Raw text, and text parts


@pytest.mark.parametrize(
    ("record", "warnings"),
    [
        ({"text": "<s>a"}, ["begins with the start token"]),
        ({"text": "a</s>"}, ["ends with the end token"]),
        ({"prompt": "<s>a", "response": "b</s>"}, ["begins with the start token", "ends with the end token"]),
        ({"prompt": "a</s>", "response": "<s>b"}, []),
        ({"text": "a <s> </s> b"}, []),
    ],
)
def test_doubled_start_and_end_tokens_are_warned_of_once(tmp_path, capsys, record, warnings):
    chat_examples.write_directory(tmp_path, None, add_bos_token=True)
    tokenizer = tokenizer_lib.load(tmp_path)
    cli.warn_once.cache_clear()
    for _ in range(2):
        chat.encode_record(tokenizer, record)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(warnings) and all(part in line for part, line in zip(warnings, lines, strict=True))
    cli.warn_once.cache_clear()
    prompt = record.get("text", record.get("prompt"))
    for _ in range(2):
        chat.encode_prompt(tokenizer, prompt)
    assert len(capsys.readouterr().err.splitlines()) == prompt.startswith("<s>")


def test_text_parts():
    assert join_text_parts([{"type": "text", "text": "a"}, {"text": "b"}, {"type": "text", "value": "c"}], "w") == "abc"
    assert [join_text_parts(content, "w") for content in ("a", None, [])] == ["a", None, ""]
    for part, problem in (
        ({"type": "image"}, "of type 'image'"),
        ("a", "without text"),
        ({"type": "text"}, "without text"),
    ):
        with pytest.raises(InputError, match=f"w: content part 1 is {problem}"):
            join_text_parts([part], "w")
