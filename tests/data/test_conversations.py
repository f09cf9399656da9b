"""`conversations.normalize`: every form of a record, and which fields it uses, ignores or refuses."""

import json

import pytest
from conversations import CHAT

from msn_jax.cli import InputError
from msn_jax.data import conversations

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
CALL = {"name": "weather", "arguments": {"city": "Paris"}}
TOOL_CALL = {"type": "function", "function": CALL}
FUNCTION = {"name": "weather", "description": "Looks up the weather.", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": FUNCTION}
CALLING = {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]}
RESULT = {"role": "tool", "content": "sunny"}


def normalize(value):
    return conversations.normalize(value, "a.jsonl:1")[0]


def error_of(value):
    with pytest.raises(InputError) as caught:
        conversations.normalize(value, "a.jsonl:1")
    message = str(caught.value)
    assert message.startswith("a.jsonl:1: ") and "\n" not in message
    return message.removeprefix("a.jsonl:1: ")


def turns_of(*turns):
    """The normalized messages of an OpenAI record with these turns and a last turn of the assistant."""
    return normalize({"messages": [*turns, ASSISTANT]})["messages"][:-1]


# --- Forms


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "a", "response": "b", "id": 3}, {"prompt": "a", "response": "b"}),
        ({"text": "a", "meta": {"source": "b"}}, {"text": "a"}),
        ({"messages": CHAT}, {"messages": CHAT}),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"value": "i"}]}, CHAT[1]]},
            {"messages": CHAT},
        ),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, {"messages": CHAT}),
        ({"conversations": CHAT}, {"messages": CHAT}),
        (
            {"system": "Be kind", "conversations": [{"from": "human", "value": "Hi"}, CHAT[1]]},
            {"messages": [{"role": "system", "content": "Be kind"}, *CHAT]},
        ),
        ({"system": "Be kind", "messages": CHAT}, {"messages": [{"role": "system", "content": "Be kind"}, *CHAT]}),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, {"messages": CHAT}),
        ({"instruction": "Hi", "response": "Hello"}, {"messages": CHAT}),
        ({"instruction": "Hi", "output": None, "response": "Hello"}, {"messages": CHAT}),
        ({"instruction": "Hi", "output": "Hello", "response": ""}, {"messages": CHAT}),
        (
            {"instruction": "Add", "input": "2, 2", "output": "4"},
            {"messages": [{"role": "user", "content": "Add\n2, 2"}, {"role": "assistant", "content": "4"}]},
        ),
        (
            {"instruction": "Hi", "output": "Hello", "history": [["a", "b"], ["c", "d"]], "system": "Be kind"},
            {
                "messages": [
                    {"role": "system", "content": "Be kind"},
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b"},
                    {"role": "user", "content": "c"},
                    {"role": "assistant", "content": "d"},
                    *CHAT,
                ]
            },
        ),
        ({"instruction": "Hi", "output": "Hello", "history": [], "system": ""}, {"messages": CHAT}),
        ({"messages": CHAT[1:]}, {"messages": CHAT[1:]}),  # the assistant opens
    ],
)
def test_every_form_becomes_messages_or_stays_as_it_is(record, expected):
    assert normalize(record) == expected


def test_null_and_empty_fields_count_as_absent():
    empty = {"tools": None, "functions": [], "system": "", "images": [], "conversations": None, "history": None}
    turns = [turn | {"tool_calls": None, "name": "", "audio": {}, "weight": None} for turn in CHAT]
    assert normalize({"messages": turns, **empty}) == {"messages": CHAT}
    assert normalize({"messages": [turn | {"from": None, "value": None} for turn in CHAT]}) == {"messages": CHAT}
    assert normalize({"text": "a", "messages": None, "prompt": None, "system": None}) == {"text": "a"}


def test_fields_without_a_meaning_are_ignored_by_name():
    for record, names in [
        ({"messages": CHAT, "id": 1, "source": "x", "score": None}, {"id", "source"}),
        ({"messages": CHAT, "prompt": "Hi", "text": "<user>Hi"}, {"prompt", "text"}),  # copies, as in UltraChat
        ({"instruction": "Hi", "output": "Hello", "prompt": "Hi"}, {"prompt"}),
        ({"prompt": "a", "response": "b", "metadata": {"x": 1}}, {"metadata"}),
    ]:
        assert conversations.normalize(record, "a.jsonl:1")[1] == names


@pytest.mark.parametrize(
    "field",
    [
        "images",
        "image",
        "videos",
        "audio",
        "audios",
        "documents",
        "chosen",
        "rejected",
        "reasoning_content",
        "system_prompt",
        "context",
        "completion",
        "tool_calls",
        "chat_template_kwargs",
    ],
)
def test_fields_that_would_change_the_text_are_refused_next_to_every_form(field):
    for record, used in [
        ({"messages": CHAT}, "messages"),
        ({"conversations": CHAT}, "conversations"),
        ({"instruction": "Hi", "output": "Hello"}, "instruction and output"),
        ({"prompt": "a", "response": "b"}, "prompt and response"),
        ({"text": "a"}, "text"),
    ]:
        assert error_of({**record, field: "x"}) == (
            f"cannot use field {field!r} next to {used}, and it would change the text: "
            "remove it, or write its text into messages"
        )


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"prompt": "a", "response": "b", "system": "x"}, "system"),
        ({"prompt": "a", "response": "b", "tools": [TOOL]}, "tools"),
        ({"prompt": "a", "response": "b", "history": [["c", "d"]]}, "history"),
        ({"prompt": "a", "response": "b", "instruction": "x"}, "instruction"),
        ({"text": "a", "prompt": "b"}, "prompt"),
        ({"messages": CHAT, "conversations": CHAT}, "conversations"),
        ({"messages": CHAT, "response": "x"}, "response"),
        ({"instruction": "a", "output": "b", "response": "c"}, "response"),
    ],
)
def test_a_field_of_another_form_is_refused(record, field):
    assert error_of(record).startswith(f"cannot use field {field!r} next to ")


# --- Turns


def test_roles_of_all_forms():
    for name, role in [
        ("system", "system"),
        ("developer", "developer"),
        ("user", "user"),
        ("human", "user"),
        ("tool", "tool"),
        ("function", "tool"),
        ("observation", "tool"),
        ("tool_response", "tool"),
    ]:
        for turn in ({"role": name, "content": "x"}, {"from": name, "value": "x"}):
            assert turns_of(turn) == [{"role": role, "content": "x"}]


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]},
        {"role": "assistant", "tool_calls": [TOOL_CALL]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": json.dumps([TOOL_CALL])},
        {"role": "assistant", "content": None, "tool_calls": [{**TOOL_CALL, "index": 0}], "refusal": None},
        {"role": "assistant", "content": None, "function_call": CALL},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "function_call", "value": json.dumps([CALL])},
        {"from": "tool_call", "value": json.dumps(CALL)},
        {"from": "function_call", "value": CALL},
        {"from": "function_call", "value": [CALL]},
    ],
)
def test_every_form_of_a_call_becomes_tool_calls(turn):
    """A call with empty content must not be learned as an empty reply."""
    for record in ({"messages": [USER, turn]}, {"conversations": [USER, turn]}):
        assert normalize(record) == {"messages": [USER, CALLING]}


def test_calls_keep_ids_content_and_the_form_of_their_arguments():
    text = {"name": "weather", "arguments": '{"city":"Paris"}'}
    call = {"id": "c1", "type": "function", "function": text}
    for content in ("", "Let me look."):
        turn = {"role": "assistant", "content": content, "tool_calls": [call, TOOL_CALL]}
        assert normalize({"messages": [turn]}) == {"messages": [turn]}
    assert turns_of({"role": "assistant", "function_call": text})[0]["tool_calls"] == [
        {"type": "function", "function": text}
    ]


def test_fields_of_messages_are_kept():
    turns = [
        {"role": "user", "content": "Hi", "name": "Ann"},
        {"role": "assistant", "content": "Hello", "reasoning_content": "Be friendly."},
        {"role": "tool", "content": "sunny", "name": "weather", "tool_call_id": "c1"},
    ]
    assert turns_of(*turns) == turns
    parts = [{"type": "text", "text": "sun"}, {"type": "text", "text": "ny"}]
    assert turns_of(RESULT | {"content": parts}) == [RESULT]


@pytest.mark.parametrize(
    "tools",
    [
        {"tools": [TOOL]},
        {"tools": [FUNCTION]},
        {"tools": [{"type": "function", **FUNCTION}]},
        {"tools": [{"function": FUNCTION}]},
        {"tools": json.dumps([TOOL])},
        {"tools": json.dumps([FUNCTION])},
        {"functions": [FUNCTION]},
    ],
)
def test_tools_of_a_record_are_kept(tools):
    for record in ({"messages": CHAT}, {"conversations": CHAT}, {"instruction": "Hi", "output": "Hello"}):
        assert normalize({**record, **tools}) == {"messages": CHAT, "tools": [TOOL]}
    for empty in ("[]", "null", " null "):
        assert normalize({"messages": CHAT, "tools": empty}) == {"messages": CHAT}
        assert normalize({"messages": CHAT, "tools": empty, "functions": [FUNCTION]})["tools"] == [TOOL]


@pytest.mark.parametrize("empty", ["[]", "null", "{}", " [] "])
def test_empty_calls_count_as_absent(empty):
    for name in ("tool_calls", "function_call"):
        assert turns_of(ASSISTANT | {name: empty}) == [ASSISTANT]
        assert turns_of(USER | {"content": "", name: empty}) == [USER | {"content": ""}]
        for content in ({}, {"content": None}, {"content": ""}):  # not to be learned as an empty reply
            turn = {"role": "assistant", name: empty, **content}
            assert error_of({"messages": [USER, turn]}) == f"turn 2: {name}: has no call, and the turn has no content"
    for value in (empty, json.loads(empty), ""):
        error = error_of({"conversations": [{"from": "function_call", "value": value}, ASSISTANT]})
        assert error == "turn 1: value: has no call, and the turn has no content"


@pytest.mark.parametrize("name", ["weight", "loss_weight", "train", "trainable", "loss"])
def test_flags_keep_a_turn_as_context(name):
    for forms in (("role", "content"), ("from", "value")):
        for off, on in ((0, 1), (0.0, 1.0), (False, True)):
            turns = [
                {forms[0]: "user", forms[1]: "Hi", name: off},
                {forms[0]: "assistant", forms[1]: "no", name: off},
                {forms[0]: "assistant", forms[1]: "yes", name: on},
            ]
            assert normalize({"messages": turns})["messages"] == [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "no", "train": False},
                {"role": "assistant", "content": "yes"},
            ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"weight": 0.5}, "turn 1: weight=0.5: must be 0, 1, false or true"),
        ({"weight": 2}, "turn 1: weight=2: must be 0, 1, false or true"),
        ({"train": "false"}, 'turn 1: train="false": must be 0, 1, false or true'),
        ({"weight": float("nan")}, "turn 1: weight=NaN: must be 0, 1, false or true"),
        ({"weight": 1, "train": False}, "turn 1: weight and train contradict each other"),
        ({"weight": 0}, "no assistant turn to learn"),
        ({"role": "user", "train": True}, "turn 1: train=true: only turns of the assistant can be learned"),
    ],
)
def test_other_flags_are_refused(flags, message):
    assert error_of({"messages": [ASSISTANT | flags]}) == message


@pytest.mark.parametrize("name", ["weight", "loss_weight", "train", "trainable", "loss"])
def test_flags_of_a_whole_record_are_refused(name):
    for record in ({"messages": CHAT}, {"instruction": "Hi", "output": "Hello"}, {"prompt": "a", "response": "b"}):
        for flag in (0, False, 0.5, "no"):
            assert error_of({**record, name: flag}) == (
                f"{name}={json.dumps(flag)} of a whole record: only the turns of messages can be left out of the loss; "
                "remove the field, or the record"
            )
        for flag in (1, True, None):
            assert normalize({**record, name: flag}) == normalize(record)


def test_a_duplicate_key_in_embedded_json_is_refused():
    value = '{"name": "f", "name": "g", "arguments": {}}'
    assert error_of({"conversations": [{"from": "function_call", "value": value}]}) == (
        "turn 1: value: the string is not JSON: key 'name' occurs twice in an object"
    )


def test_a_surrogate_is_refused_in_every_text():
    bad = "x\ud800"
    message = "\\ud800 is half of a surrogate pair, not a character: repair the text"
    for record in [
        {"prompt": bad, "response": "a"},
        {"prompt": "a", "response": bad},
        {"text": bad},
        {"instruction": "a", "output": bad},
        {"instruction": "a", "output": "b", "history": [["c", bad]]},
        {"messages": [USER, {"role": "assistant", "content": bad}]},
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": bad}]}]},
        {"messages": [USER, ASSISTANT | {"reasoning_content": bad}]},
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {bad: 1}}]}]},
        {"messages": CHAT, "tools": [FUNCTION | {"description": bad}]},
        {"conversations": CHAT, "system": bad},
    ]:
        assert error_of(record) == message
        assert error_of(json.loads(json.dumps(record))) == message  # as an escape in the file
    assert normalize(json.loads('{"text": "\\ud83d\\ude00", "id": "\\ud800"}')) == {"text": "\U0001f600"}


# --- Refusals


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "expected an object, not a list"),
        (
            {"question": "a", "answer": None},
            "unknown form (keys: answer=null, question): expected messages, conversations, "
            "instruction and output (or response), prompt and response, or text",
        ),
        (
            {"messages": [{"role": "wizard", "content": "x"}]},
            "turn 1: unknown role 'wizard': known are system, developer, user, assistant and tool, "
            "in ShareGPT's form also human, gpt, function_call and observation",
        ),
        ({"messages": [["user", "x"]]}, "turn 1: expected an object, not a list"),
        ({"messages": "x"}, "expected a list of turns, not a string"),
        ({"messages": []}, "no assistant turn to learn"),
        ({"messages": [USER]}, "no assistant turn to learn"),
        ({"messages": [USER, RESULT]}, "no assistant turn to learn"),
        ({"messages": [{"role": "assistant", "content": None}]}, "turn 1: 'content' is not text"),
        ({"messages": [USER | {"content": {"a": 1}}, ASSISTANT]}, "turn 1: 'content' is not text"),
        ({"messages": [{"from": "gpt", "value": 3}]}, "turn 1: 'value' is not text"),
        (
            {"messages": [USER, ASSISTANT | {"thinking": "x"}]},
            "turn 2: unknown field 'thinking': it may change the text; remove it",
        ),
        (
            {"messages": [{"from": "gpt", "value": "x", "content": "y"}]},
            "turn 1: unknown field 'content': it may change the text; remove it",
        ),
        ({"messages": [USER, ASSISTANT | {"reasoning_content": 3}]}, "turn 2: 'reasoning_content' is not text"),
        ({"messages": [USER, ASSISTANT | {"name": 3}]}, "turn 2: 'name' is not text"),
        ({"prompt": 1, "response": "b"}, "'prompt' is not text"),
        ({"instruction": "a", "input": 0, "output": "b"}, "'input' is not text"),
        ({"instruction": "a", "output": "b", "system": False}, "'system' is not text"),
        ({"prompt": "a", "response": [{"x": 1}]}, None),
        (
            {"instruction": "a", "output": "b", "history": [["c"]]},
            "history: entry 1 is not a [question, answer] pair of strings",
        ),
        (
            {"instruction": "a", "output": "b", "history": "c"},
            "history: expected a list of [question, answer] pairs, not a string",
        ),
        (
            {"system": "x", "messages": [{"role": "system", "content": "y"}, *CHAT]},
            "'system' next to a conversation that has a system turn: give one of them",
        ),
        (
            {"system": "x", "messages": [{"role": "developer", "content": "y"}, *CHAT]},
            "'system' next to a conversation that has a system turn: give one of them",
        ),
        (
            {"messages": CHAT, "tools": [TOOL], "functions": [FUNCTION]},
            "has both 'tools' and 'functions': give one of them",
        ),
        ({"messages": CHAT, "tools": "weather"}, None),
        ({"messages": CHAT, "tools": {"name": "f"}}, "tools: expected a list, not an object"),
        ({"messages": CHAT, "tools": [{"description": "x"}]}, "tools: entry 1 is not a function with a name"),
        (
            {"messages": CHAT, "tools": [{"type": "web_search", "name": "x"}]},
            "tools: entry 1: only tools of type 'function' can be read",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f"}]}]},
            "turn 2: tool_calls: expected calls with a name and arguments (an object, or JSON in a string)",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{**TOOL_CALL, "type": "custom"}]}]},
            "turn 2: tool_calls: only calls of type 'function' can be read",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{**TOOL_CALL, "extra": 1}]}]},
            "turn 2: tool_calls: unknown field 'extra': it may change the text; remove it",
        ),
        ({"conversations": [{"from": "function_call", "value": "weather(Paris)"}]}, None),
        (
            {"messages": [USER | {"tool_calls": [TOOL_CALL]}, ASSISTANT]},
            "turn 1: 'tool_calls' next to another call, or in a turn that is not the assistant's",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [TOOL_CALL], "function_call": CALL}]},
            "turn 1: 'tool_calls' next to another call, or in a turn that is not the assistant's",
        ),
        ({"messages": [USER | {"content": [{"type": "image_url", "image_url": "x"}]}, ASSISTANT]}, None),
        ({"messages": [USER | {"content": [{"type": "input_audio"}]}, ASSISTANT]}, None),
    ],
)
def test_bad_records_are_refused_in_one_line(record, message):
    assert error_of(record) == message or message is None
