"""Contents that a chat template drops, and calls that it refuses."""

import chat_examples
import pytest
from refusals import refusal

from msn_jax.data import chat

CHATML = chat_examples.unmarked(chat_examples.CHATML)
USER = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
RESULT = {"role": "tool", "content": "7", "tool_call_id": "1"}


def call(arguments):
    function = {"name": "get", "arguments": arguments}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}


CLOSED = "<|im_start|>{{ m.content }}<|im_end|>"


@pytest.mark.parametrize(
    ("source", "messages", "message"),
    [
        (
            "{% for m in messages if m.role != 'system' %}" + CLOSED + "{% endfor %}",
            [{"role": "system", "content": "S"}, USER, ANSWER],
            "message 1 (system): the content is dropped by the chat template (",
        ),
        (
            "{% for m in messages %}{% if m.role != 'system' or loop.first %}" + CLOSED + "{% endif %}{% endfor %}",
            [USER, ANSWER, {"role": "system", "content": "a"}, USER, ANSWER],
            "message 3 (system): the content is dropped",
        ),
        (
            "{% for m in messages %}{% if m.role != 'user' or loop.last %}" + CLOSED + "{% endif %}{% endfor %}",
            [USER, ANSWER, USER],
            "message 1 (user): the content is dropped",
        ),
        (
            "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content[:3] }}<|im_end|>"
            "{% else %}" + CLOSED + "{% endif %}{% endfor %}",
            [{"role": "user", "content": "abcd"}, ANSWER],
            "message 1 (user): the content is dropped",
        ),
        (
            "{% for m in messages %}{% if m.role != 'developer' or loop.first %}" + CLOSED + "{% endif %}{% endfor %}",
            [{"role": "developer", "content": "x"}, USER, {"role": "developer", "content": "x"}, USER],
            "message 3 (developer): the content is dropped",
        ),
    ],
)
def test_contents_that_the_template_drops_are_refused(load, source, messages, message):
    tokenizer = load(source)
    assert refusal(chat.encode_prompt, tokenizer, messages).startswith(message)
    assert refusal(chat.encode_record, tokenizer, {"messages": messages}).startswith(message)
    blank = [{**one, "content": " \n"} if one["role"] == "system" else one for one in messages]
    if blank != messages:
        chat.encode_prompt(tokenizer, blank)


@pytest.mark.parametrize("name", chat_examples.TEMPLATES)
def test_conversations_that_the_template_shows_are_not_refused(load, name):
    tokenizer = load(chat_examples.unmarked(chat_examples.TEMPLATES[name]))
    for messages in chat_examples.conversations(60, seed=2):
        _, mask = chat.encode_record(tokenizer, {"messages": messages})
        assert mask.any()
        assert chat.encode_prompt(tokenizer, messages[:-1])


def test_a_long_conversation_is_checked(load):
    messages = [USER, ANSWER] * 3300 + [USER]
    assert chat.encode_prompt(load(CHATML), messages)
    dropped = "{% for m in messages %}{% if loop.index != 6600 %}" + CLOSED + "{% endif %}{% endfor %}"
    messages[6599] = USER
    assert refusal(chat.encode_prompt, load(dropped), messages).startswith("message 6600 (user)")


@pytest.mark.parametrize(
    ("printed", "arguments", "hint"),
    [
        ("'' + c.function.arguments", {"x": 1}, "JSON text"),
        ("c.function.arguments.items() | list", '{"x": 1}', "an object"),
    ],
)
def test_arguments_of_the_other_type_are_refused_with_a_hint(load, printed, arguments, hint):
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name ~ (" + printed + ") }}{% endfor %}"
    tokenizer = load("{% for m in messages %}<|im_start|>{{ m.content }}" + calls + "<|im_end|>{% endfor %}")
    for messages in ([USER, call(arguments)], [USER, call(arguments), RESULT, ANSWER]):
        message = refusal(chat.encode_record, tokenizer, {"messages": messages})
        assert "the chat template refuses these messages: " in message
        assert message.endswith(f"; message 2 (assistant): give the arguments of call 1 as {hint}")
        assert refusal(chat.encode_prompt, tokenizer, messages) == message
    other = {"x": 1} if isinstance(arguments, str) else '{"x": 1}'
    assert chat.encode_prompt(tokenizer, [USER, call(other)])
