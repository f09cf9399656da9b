"""One record of a user's conversations, in any of the common forms, normalized for chat templates.

    OpenAI      messages: [{role, content, tool_calls, ...}], optional tools (or the older functions)
    ShareGPT    conversations: [{from, value}], optional system and tools (a list, or JSON in a string)
    Alpaca      instruction, output (or response), optional input, system and history ([question, answer] pairs)
    completion  prompt, response
    text        text

The first three become {'messages': [...], optional 'tools': [...]} as `apply_chat_template` of transformers takes them.
A message has 'role' and 'content', where needed 'tool_calls', 'reasoning_content', 'name' and 'tool_call_id', and
'train': False where an assistant turn is context only. The last two forms stay as they are.

Invariant: no text of a record is lost silently. A field that would change the text and is not understood is refused;
other top-level fields (id, source, ...) are ignored and returned by name. Null and empty fields count as absent,
because tables with one schema for all records have them.
"""

import json

from msn_jax import json_files
from msn_jax.cli import InputError
from msn_jax.data.messages import join_text_parts

FORMS = "messages, conversations, instruction and output (or response), prompt and response, or text"

_CALL = "call"  # a ShareGPT turn whose value is the JSON of a call
_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": _CALL,
    "tool_call": _CALL,
    "tool": "tool",
    "function": "tool",  # OpenAI's name before tools
    "observation": "tool",
    "tool_response": "tool",
}
_SHARED_FIELDS = ("system", "tools", "functions")  # of every form that becomes messages
_LEARN_FLAGS = ("weight", "loss_weight", "train", "trainable", "loss")  # of a turn: 0 or false keeps it as context
# Top-level fields that change the text or its meaning, refused where the record's form does not use them.
MEANINGFUL_FIELDS = frozenset(
    "messages conversations instruction input output prompt response completion text history context "
    "system system_prompt system_message tools functions tool_calls function_call "
    "reasoning reasoning_content thinking chat_template_kwargs enable_thinking "
    "image images video videos audio audios documents objects "
    "chosen rejected chosen_response rejected_response rejected_messages kto_tag".split()
)


def normalize(value: object, where: str) -> tuple[dict, set[str]]:
    """Normalizes one record.

    Args:
      value: the record as parsed from JSON.
      where: its location, such as `chats.jsonl:3`, for errors.

    Returns:
      The record in its normalized form, and the names of the top-level fields that were ignored.

    Raises:
      InputError: the record has no known form, has a field that cannot be used, or leaves nothing to learn.
    """
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected an object, not {kind(value)}")
    fields = {name: field for name, field in value.items() if field is not None}
    if "messages" in fields or "conversations" in fields:
        name = "messages" if "messages" in fields else "conversations"
        # A rendered copy of the conversation often accompanies it; UltraChat repeats the first turn as 'prompt'.
        used, redundant = {name, *_SHARED_FIELDS}, {"prompt", "text"}
        record = _conversation(_parse_turns(fields[name], where), fields, where)
    elif "instruction" in fields and ("output" in fields or ("response" in fields and "prompt" not in fields)):
        reply = "output" if fields.get("output") or "response" not in fields else "response"
        used, redundant = {"instruction", "input", reply, "history", *_SHARED_FIELDS}, {"prompt", "text"}
        record = _conversation(_parse_alpaca(fields, reply, where), fields, where)
    elif "prompt" in fields and "response" in fields:
        used, redundant = {"prompt", "response"}, {"text"}
        record = {name: _text(fields, name, where) for name in ("prompt", "response")}
    elif "text" in fields:
        used, redundant = {"text"}, set()
        record = {"text": _text(fields, "text", where)}
    else:
        names = ", ".join(name if name in fields else f"{name}=null" for name in sorted(value)) or "none"
        raise InputError(f"{where}: unknown form (keys: {names}): expected {FORMS}")
    others = {name for name, field in fields.items() if name not in used and not is_empty(field)}
    if refused := others & (MEANINGFUL_FIELDS - redundant):
        raise InputError(
            f"{where}: cannot use field {min(refused)!r} next to {' and '.join(sorted(used & set(fields)))}, "
            "and it would change the text: remove it, or write its text into messages"
        )
    _check_record_flags(fields, where)
    _check_characters(record, where)
    return record, others


def kind(value: object) -> str:
    """The JSON type of a value, with its article, for messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


# --- Conversations


def _conversation(messages: list[dict], fields: dict, where: str) -> dict:
    """The record of `messages` with the record's own 'system' and tools."""
    if not is_empty(fields.get("system")):
        if messages and messages[0]["role"] in ("system", "developer"):
            raise InputError(f"{where}: 'system' next to a conversation that has a system turn: give one of them")
        messages = [{"role": "system", "content": _text(fields, "system", where)}, *messages]
    if not any(message["role"] == "assistant" and message.get("train", True) for message in messages):
        raise InputError(f"{where}: no assistant turn to learn")
    parsed = [_parse_tools(fields.get(name), f"{where}: {name}") for name in ("tools", "functions")]
    if all(parsed):
        raise InputError(f"{where}: has both 'tools' and 'functions': give one of them")
    tools = parsed[0] or parsed[1]
    return {"messages": messages, "tools": tools} if tools else {"messages": messages}


def _parse_alpaca(fields: dict, reply: str, where: str) -> list[dict]:
    """The messages of an Alpaca record whose last turn is the field `reply`."""
    history = [] if is_empty(fields.get("history")) else fields["history"]
    if not isinstance(history, list):
        raise InputError(f"{where}: history: expected a list of [question, answer] pairs, not {kind(history)}")
    turns = []
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise InputError(f"{where}: history: entry {number} is not a [question, answer] pair of strings")
        turns += zip(("user", "assistant"), pair, strict=True)
    question = [_text(fields, name, where) for name in ("instruction", "input") if not is_empty(fields.get(name))]
    turns += [("user", "\n".join(text for text in question if text)), ("assistant", _text(fields, reply, where))]
    return [{"role": role, "content": content} for role, content in turns]


def _parse_turns(turns: object, where: str) -> list[dict]:
    if not isinstance(turns, list):
        raise InputError(f"{where}: expected a list of turns, not {kind(turns)}")
    return [_parse_turn(turn, f"{where}: turn {number}") for number, turn in enumerate(turns, 1)]


def _parse_turn(turn: object, where: str) -> dict:
    """One message, from OpenAI's or ShareGPT's form."""
    if not isinstance(turn, dict):
        raise InputError(f"{where}: expected an object, not {kind(turn)}")
    role_key, content_key = ("role", "content") if turn.get("from") is None else ("from", "value")
    role = turn.get(role_key)
    if not isinstance(role, str) or role not in _ROLES:
        raise InputError(
            f"{where}: unknown role {role!r}: known are system, developer, user, assistant and tool, "
            "in ShareGPT's form also human, gpt, function_call and observation"
        )
    rest = {name: field for name, field in turn.items() if not is_empty(field)}
    rest.pop(role_key)
    rest.pop(content_key, None)
    calls = {name: rest.pop(name) for name in ("tool_calls", "function_call") if name in rest}
    if _ROLES[role] == _CALL:
        calls[content_key] = turn.get(content_key)
        message = {"role": "assistant", "content": None}  # OpenAI's form of a turn that only calls
    else:
        message = {"role": _ROLES[role], "content": join_text_parts(turn.get(content_key), where)}
    calls = {name: _parse_calls(value, f"{where}: {name}") for name, value in calls.items()}
    if message["role"] == "assistant" and not message["content"] and calls and not any(calls.values()):
        raise InputError(f"{where}: {next(iter(calls))}: has no call, and the turn has no content")
    calls = {name: value for name, value in calls.items() if value}
    if calls:
        name = next(iter(calls))
        if len(calls) > 1 or message["role"] != "assistant":
            raise InputError(f"{where}: {name!r} next to another call, or in a turn that is not the assistant's")
        message["tool_calls"] = calls[name]
    if not isinstance(message["content"], str) and not (calls and message["content"] is None):
        raise InputError(f"{where}: {content_key!r} is not text")
    for name in ("reasoning_content", "name", "tool_call_id"):
        if name in rest:
            message[name] = rest.pop(name)
            if not isinstance(message[name], str):
                raise InputError(f"{where}: {name!r} is not text")
    flags = {name: rest.pop(name) for name in _LEARN_FLAGS if name in rest}
    if not _is_learned(flags, message["role"], where):
        message["train"] = False
    if rest:
        raise InputError(f"{where}: unknown field {min(rest)!r}: it may change the text; remove it")
    return message


def _is_learned(flags: dict, role: str, where: str) -> bool:
    """Whether the turn's flags leave it to be learned, where its role allows that."""
    for name, flag in flags.items():
        if not isinstance(flag, bool | int | float) or flag not in (0, 1):
            raise InputError(f"{where}: {name}={json.dumps(flag)}: must be 0, 1, false or true")
        if flag and role != "assistant":
            raise InputError(f"{where}: {name}={json.dumps(flag)}: only turns of the assistant can be learned")
    if len({bool(flag) for flag in flags.values()}) > 1:
        raise InputError(f"{where}: {' and '.join(flags)} contradict each other")
    return role != "assistant" or all(flags.values())


def _check_record_flags(fields: dict, where: str) -> None:
    for name in _LEARN_FLAGS:
        if not is_empty(fields.get(name)) and fields[name] not in (1, True):
            raise InputError(
                f"{where}: {name}={json.dumps(fields[name])} of a whole record: only the turns of messages can be left "
                "out of the loss; remove the field, or the record"
            )


# --- Tools


def _parse_calls(calls: object, where: str) -> list[dict]:
    """Calls as [{'type': 'function', 'function': {'name', 'arguments'}, optional 'id'}].

    Args:
      calls: a list of calls or one call, each as above or {'name', 'arguments'}; or the JSON of these. Null and empty
        values are no calls.
      where: for errors.
    """
    calls = _parse_embedded(calls, where)
    if is_empty(calls):
        return []
    parsed = []
    for call in calls if isinstance(calls, list) else [calls]:
        rest = dict(call) if isinstance(call, dict) else {}
        function = rest.pop("function", None)
        if function is None:
            function = {name: rest.pop(name) for name in ("name", "arguments") if name in rest}
        if (
            not isinstance(function, dict)
            or set(function) != {"name", "arguments"}
            or not isinstance(function["name"], str)
            or not isinstance(function["arguments"], dict | str)
        ):
            raise InputError(f"{where}: expected calls with a name and arguments (an object, or JSON in a string)")
        entry = {"type": "function", "function": function}
        if rest.pop("type", "function") != "function":
            raise InputError(f"{where}: only calls of type 'function' can be read")
        rest.pop("index", None)  # a position in a stream
        if (name := rest.pop("id", None)) is not None:
            if not isinstance(name, str):
                raise InputError(f"{where}: 'id' is not text")
            entry["id"] = name
        for name in sorted(name for name, field in rest.items() if not is_empty(field)):
            raise InputError(f"{where}: unknown field {name!r}: it may change the text; remove it")
        parsed.append(entry)
    return parsed


def _parse_tools(tools: object, where: str) -> list[dict]:
    """Tools as [{'type': 'function', 'function': {'name', ...}}], from that form, bare functions, or JSON of either."""
    tools = _parse_embedded(tools, where)
    if is_empty(tools):
        return []
    if not isinstance(tools, list):
        raise InputError(f"{where}: expected a list, not {kind(tools)}")
    parsed = []
    for number, tool in enumerate(tools, 1):
        function = tool.get("function") if isinstance(tool, dict) else None
        if isinstance(tool, dict) and "function" not in tool:
            function = {name: field for name, field in tool.items() if name != "type"}
            tool = {"type": tool.get("type", "function"), "function": function}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InputError(f"{where}: entry {number} is not a function with a name")
        if tool.setdefault("type", "function") != "function":
            raise InputError(f"{where}: entry {number}: only tools of type 'function' can be read")
        parsed.append(tool)
    return parsed


def _parse_embedded(value: object, where: str) -> object:
    """Values that some data sets keep as JSON inside a string."""
    if not isinstance(value, str) or not value:
        return value
    try:
        return json_files.loads(value)
    except (RecursionError, ValueError) as error:
        raise InputError(f"{where}: the string is not JSON: {error}") from error


# --- Text


def _text(fields: dict, name: str, where: str) -> str:
    text = join_text_parts(fields[name], f"{where}: {name}")
    if not isinstance(text, str):
        raise InputError(f"{where}: {name!r} is not text")
    return text


def is_empty(field: object) -> bool:
    """Whether a field counts as absent: null, or an empty string, list or object."""
    return field is None or field in ("", [], {})


def _check_characters(record: dict, where: str) -> None:
    r"""InputError if a text has half of a surrogate pair, which JSON's \u escapes allow but no tokenizer takes."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        character = f"\\u{ord(error.object[error.start]):04x}"
        raise InputError(
            f"{where}: {character} is half of a surrogate pair, not a character: repair the text"
        ) from error
