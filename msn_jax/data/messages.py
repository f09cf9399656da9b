"""Chat messages in OpenAI's form, checked before a chat template or role symbols render them.

    {"role": "system" | "developer" | "user" | "assistant" | "tool", "content": text or text parts,
     "reasoning_content": text, "tool_calls": [{"type": "function", "function": {"name", "arguments"}}],
     "name": text, "tool_call_id": text, "train": False}

Fields reach the template as in transformers' `apply_chat_template`: fields that are null are removed, and reasoning
gets all its usual names. Beyond that, text parts are joined; optional fields that are empty are removed; a call gets
its `"type": "function"` where it is missing; the legacy forms `function_call` and role `function` become `tool_calls`
and role `tool`; the content next to calls is null where the template insists on it; `train` is removed.

Nothing is dropped silently. A field that the template never shows is refused, and so is a conversation of which the
template drops a content of the system, the user, a developer or a tool, a call, or the content next to a call. The
assistant's other contents are exempt, because many templates drop old thoughts. So are identifiers, because they carry
no content and few templates show them: `tool_call_id`, the `id` of a call, and the `name` of a tool message.
"""

import functools
import re
from collections.abc import Callable, Iterator

from msn_jax.cli import InputError
from msn_jax.data.chat_template import ChatTemplate, unused_characters
from msn_jax.data.tokenizer import ROLES

TEMPLATE_ROLES = (*ROLES, "developer", "tool")
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # the first that a message has counts

_IDENTIFIERS = {("tool", "tool_call_id"), ("tool", "name")}
_LEGACY_ROLES = {"function": "tool"}
_MAX_DEPTH = 100  # of nested values


def join_text_parts(content: object, where: str) -> object:
    """Joins a list of {'type': 'text', 'text': str} parts to one string; returns any other content as it is.

    Args:
      content: the content of a message.
      where: location of the message, for the error.

    Raises:
      InputError: a part is not text, such as an image.
    """
    if not isinstance(content, list):
        return content
    texts = []
    for number, part in enumerate(content, 1):
        kind = part.get("type", "text") if isinstance(part, dict) else None
        text = part.get("text", part.get("value")) if isinstance(part, dict) else None
        if kind != "text" or not isinstance(text, str):
            problem = f"of type {kind!r}" if isinstance(kind, str) and kind != "text" else "without text"
            raise InputError(
                f"{where}: content part {number} is {problem}; only {{'type': 'text', 'text': ...}} parts can be read"
            )
        texts.append(text)
    return "".join(texts)


def strings(value: object, depth: int = 0) -> Iterator[str]:
    """All strings of a nested JSON value, keys of objects included. InputError if it is nested too deeply."""
    if depth > _MAX_DEPTH:
        raise InputError(f"the messages or their tools are nested more than {_MAX_DEPTH} levels deep")
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings(key, depth + 1)
            yield from strings(item, depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings(item, depth + 1)


def map_strings(value: object, change: Callable[[str], str]) -> object:
    """The same nested JSON value with every string changed, keys of objects included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {map_strings(key, change): map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_strings(item, change) for item in value]
    return value


def has_calls(message: dict) -> bool:
    """Whether a normalized message calls tools."""
    return "tool_calls" in message


def normalize(
    messages: list[dict], tools: list[dict] | None, template: ChatTemplate | None
) -> tuple[list[dict], list[bool]]:
    """Messages as the template gets them, and for each whether an assistant's turn is learned.

    Args:
      messages: as the module's docstring describes them.
      tools: JSON schemas of functions, or None.
      template: the tokenizer's chat template; None for role symbols, which show only role and content.

    Raises:
      InputError: a malformed message, or one that the template does not show completely.
    """
    if not isinstance(messages, list):
        raise InputError(f"messages: is of type {type(messages).__name__}; must be a list of messages")
    if tools is not None and (not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools)):
        raise InputError("tools: must be a list of objects, one for each function")
    normalized, learned = [], []
    for number, message in enumerate(messages, 1):
        one, is_learned = _normalize_message(message, f"message {number}", template)
        normalized.append(one)
        learned.append(is_learned)
    _check_shown(normalized, tools, template)
    return normalized, learned


def _normalize_message(message: object, where: str, template: ChatTemplate | None) -> tuple[dict, bool]:
    if not isinstance(message, dict):
        raise InputError(f"{where}: is of type {type(message).__name__}; must be an object with 'role' and 'content'")
    role, roles = message.get("role"), TEMPLATE_ROLES if template else ROLES
    role = _LEGACY_ROLES.get(role, role) if isinstance(role, str) and template else role
    if role not in roles:
        raise InputError(f"{where}: unknown role {role!r}: known roles are {', '.join(roles)}")
    where = f"{where} ({role})"
    is_learned = message.get("train", True)
    if not isinstance(is_learned, bool):
        raise InputError(f"{where}: 'train' is {is_learned!r}; must be true or false")
    optional = {name: message[name] for name in message if name not in ("role", "content", "train")}
    optional = {name: value for name, value in optional.items() if value not in (None, "", [], {})}
    if "function_call" in optional:
        optional.setdefault("tool_calls", [optional.pop("function_call")])
    content = join_text_parts(message.get("content"), where)
    if "tool_calls" in optional:
        if role != "assistant":
            raise InputError(f"{where}: has tool_calls; only messages of the assistant may call tools")
        optional["tool_calls"] = _normalize_calls(optional["tool_calls"], where)
    elif content is None:
        raise InputError(f"{where}: has no content; it must be text, and only a message with tool_calls may lack it")
    if content is not None and not isinstance(content, str):
        raise InputError(f"{where}: content is of type {type(content).__name__}; must be text or a list of text parts")
    for field in REASONING_FIELDS:
        if not isinstance(optional.get(field, ""), str):
            raise InputError(f"{where}: {field} must be text")
    reasoning = next((optional[field] for field in REASONING_FIELDS if field in optional), None)
    if reasoning is not None and template:
        optional = {"thinking": reasoning, **optional, "reasoning_content": reasoning}
    content = {"content": content} if content is not None else _absent_content(template) if template else {}
    return {"role": role, **content, **optional}, is_learned


def _normalize_calls(calls: object, where: str) -> list[dict]:
    normalized = []
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        arguments = function.get("arguments") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name or not isinstance(arguments, str | dict):
            raise InputError(
                f"{where}: malformed tool_calls; must be a list of "
                '{"type": "function", "function": {"name": text, "arguments": an object or its JSON text}}'
            )
        if function is call:
            call = {"function": {key: value for key, value in call.items() if key not in ("type", "id")}} | {
                key: call[key] for key in ("type", "id") if key in call
            }
        if call.get("type", "function") != "function":
            raise InputError(f"{where}: a call has the type {call['type']!r}; only 'function' can be read")
        normalized.append({"type": "function", **call})
    return normalized


def _check_shown(messages: list[dict], tools: list[dict] | None, template: ChatTemplate | None) -> None:
    """InputError if the template ignores a field, a role, or a part of this conversation."""
    if tools and not (template and _shows_tools(template)):
        raise _not_shown(template, "tools")
    for number, message in enumerate(messages, 1):
        role = message["role"]
        where = f"message {number} ({role})"
        if role not in ROLES and not _shows_field(template, role, "content"):
            raise InputError(
                f"{where}: the chat template does not show messages of this role ({template.location}); remove it, or "
                "use a model whose template shows it"
            )
        for field in message:
            if field in ("role", "content") or (role, field) in _IDENTIFIERS:
                continue
            names = REASONING_FIELDS if field in REASONING_FIELDS else (field,)
            if template is None or not any(_shows_field(template, role, name) for name in names):
                raise _not_shown(template, f"{where}: {names[0]}")
    if template is not None:
        _check_parts_shown(messages, tools, template)


def _not_shown(template: ChatTemplate | None, field: str) -> InputError:
    if template is None:
        reason = "this tokenizer has no chat template and shows only role and content"
    else:
        reason = f"the chat template does not show it ({template.location})"
    return InputError(f"{field}: {reason}; remove it, or use a model whose template shows it")


def _check_parts_shown(messages: list[dict], tools: list[dict] | None, template: ChatTemplate) -> None:
    """InputError if the template drops a content that is not the assistant's, a call, or the content next to a call."""
    (mark,) = unused_characters("".join(strings([messages, tools])), 1)
    marked, locations = [], []
    for number, message in enumerate(messages, 1):
        where = f"message {number} ({message['role']})"

        def add_mark(text: str, part: str, where: str = where) -> str:
            locations.append(f"{where}: {part}")
            return f"{text}{mark}{len(locations) - 1}{mark}"

        if has_calls(message):
            calls = [
                {**call, "function": {**call["function"], "name": add_mark(call["function"]["name"], f"call {index}")}}
                for index, call in enumerate(message["tool_calls"], 1)
            ]
            message = {**message, "tool_calls": calls}
            if (message.get("content") or "").strip():
                message["content"] = add_mark(message["content"], "the content next to the calls")
        elif message["role"] == "tool" or (message["role"] != "assistant" and message["content"].strip()):
            message = {**message, "content": add_mark(message["content"], "the content")}
        marked.append(message)
    if not locations:
        return
    try:
        text = template.render(marked, False, tools)
    except InputError as error:
        raise InputError(f"{error}{_arguments_hint(messages, template)}") from error
    shown = set(re.findall(f"{mark}([0-9]+){mark}", text))
    for index, location in enumerate(locations):
        if str(index) not in shown:
            raise InputError(
                f"{location} is dropped by the chat template ({template.location}); remove it, or use a model whose "
                "template shows it"
            )


def _arguments_hint(messages: list[dict], template: ChatTemplate) -> str:
    """Names the first call with arguments of a type that the template refuses, for the end of an error message."""
    names = {dict: "an object", str: "JSON text"}
    refused = _refused_argument_types(template)
    for number, message in enumerate(messages, 1):
        for index, call in enumerate(message.get("tool_calls", []), 1):
            if type(call["function"]["arguments"]) in refused:
                (other,) = (name for kind, name in names.items() if kind not in refused)
                return f"; message {number} (assistant): give the arguments of call {index} as {other}"
    return ""


# Probes: two renderings that differ only in one value show whether the template uses it.

PROBE_TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
    }
]


def probe_call(name: str, arguments: str | dict) -> dict:
    """An assistant's message with one call. Some templates check the length of the identifier."""
    call = {"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def probe_result(content: str) -> dict:
    """The result of `probe_call`."""
    return {"role": "tool", "content": content, "name": "f", "tool_call_id": "abcdefghi"}


PROBE_ARGUMENTS = ({}, "{}")  # templates differ in whether arguments must be an object or text
_USER = {"role": "user", "content": "a"}
_VALUES = ("\ue000", "\ue001")


@functools.lru_cache(maxsize=64)
def _absent_content(template: ChatTemplate) -> dict:
    """How a message with calls lacks content: without the field, or with null or '' where the template insists."""
    for content in ({}, {"content": None}, {"content": ""}):
        for arguments in PROBE_ARGUMENTS:
            message = {name: value for name, value in probe_call("f", arguments).items() if name != "content"}
            try:
                template.render([_USER, {**message, **content}], False, PROBE_TOOLS)
            except InputError:
                continue
            return content
    return {}


@functools.lru_cache(maxsize=64)
def _refused_argument_types(template: ChatTemplate) -> frozenset[type]:
    """The types of a call's arguments that the template refuses, if it takes another."""
    refused = set()
    for arguments in PROBE_ARGUMENTS:
        try:
            template.render([_USER, probe_call("f", arguments)], False, PROBE_TOOLS)
        except InputError:
            refused.add(type(arguments))
    return frozenset(refused if len(refused) < len(PROBE_ARGUMENTS) else ())


@functools.lru_cache(maxsize=64)
def _shows_tools(template: ChatTemplate) -> bool:
    return _differ(template, ([_USER], None), ([_USER], PROBE_TOOLS))


@functools.lru_cache(maxsize=1024)
def _shows_field(template: ChatTemplate, role: str, field: str) -> bool:
    """Whether a change of `field` in a message of `role` changes the template's text."""
    results = []
    for arguments in PROBE_ARGUMENTS:
        probes = []
        for value in _VALUES:
            if role == "tool":
                messages = [_USER, probe_call("f", arguments), {**probe_result("b"), field: value}]
            elif field == "tool_calls":
                messages = [_USER, probe_call(f"f{value}", arguments)]
            elif role == "assistant":
                messages = [_USER, {"role": role, "content": "b", field: value}]
            elif role == "user":
                messages = [{**_USER, field: value}]
            else:
                messages = [{"role": role, "content": "b", field: value}, _USER]
            probes.append((messages, None))
        results.append(_differ(template, *probes))
    return any(results)


def _differ(template: ChatTemplate, *probes: tuple[list[dict], list[dict] | None]) -> bool:
    """Whether the probes' texts differ. True also where the template refuses a probe: it looks at the value."""
    try:
        one, other = (template.render(messages, False, tools) for messages, tools in probes)
    except InputError:
        return True
    return one != other
