"""Chat messages as typed values, parsed from OpenAI-style dictionaries.

`router.prompt` hands in what a client sent; `router.prompt.encoder` renders the result. Every error is an
InvalidRequest that names the field as the client wrote it (`messages[2].content[0].type`). Keys that do not
reach the prompt (`name`, `mask`, `refusal`, ...) are ignored. Nothing here knows how a prompt looks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from rorqual.errors import InvalidRequest

JsonObject = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool", "developer", "latest_reminder")
TASKS = ("action", "query", "authority", "domain", "title", "read_url")

_PART_SEPARATOR = "\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    content: str = ""
    tools: tuple[JsonObject, ...] = ()  # the `function` objects alone, keys in the client's order
    response_format: JsonObject | None = None  # a JSON schema
    task: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Developer:
    """Speaks like a user, carries tools like a system message."""

    content: str
    tools: tuple[JsonObject, ...] = ()
    response_format: JsonObject | None = None
    task: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    content: str
    call_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """After merging, a user turn also carries the results of the tools called before it."""

    parts: tuple[str | ToolResult, ...]
    task: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reminder:
    content: str
    task: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    name: str
    arguments: str  # JSON text, as the model wrote it
    call_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assistant:
    content: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    unfinished: bool = False  # no end-of-sentence: the model goes on with this very turn
    task: str | None = None


Message = System | User | Developer | Assistant | Reminder | ToolResult


def parse_messages(raw: object, *, field: str = "messages") -> tuple[Message, ...]:
    """Check and type a list of message dictionaries. Raises InvalidRequest naming the field."""
    entries = _list(raw, field)
    if not entries:
        raise InvalidRequest(f"{field} must not be empty", field=field)
    return tuple(_parse_message(entry, f"{field}[{index}]") for index, entry in enumerate(entries))


def parse_tools(raw: object, *, field: str = "tools") -> tuple[JsonObject, ...]:
    """The `function` objects of OpenAI-style tools; None gives none."""
    if raw is None:
        return ()
    return tuple(_parse_tool(entry, f"{field}[{index}]") for index, entry in enumerate(_list(raw, field)))


def parse_response_format(raw: object, *, field: str = "response_format") -> JsonObject | None:
    """The JSON schema an answer must follow; None and an empty object give none."""
    if raw is None:
        return None
    return _object(raw, field) or None


def _parse_message(raw: object, field: str) -> Message:
    entry = _object(raw, field)
    role = entry.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRequest(
            f"{field}.role must be one of {', '.join(ROLES)}, not {role!r}", field=f"{field}.role"
        )
    task = _parse_task(entry, field)
    if role == "user":
        return User(parts=_content_parts(entry, field), task=task)
    if role == "assistant":
        return _parse_assistant(entry, field, task)
    if role == "tool":
        call_id = _optional_string(entry, "tool_call_id", field)
        return ToolResult(content=_content(entry, field), call_id=call_id)
    if role == "latest_reminder":
        return Reminder(content=_content(entry, field), task=task)
    tools = parse_tools(entry.get("tools"), field=f"{field}.tools")
    response_format = parse_response_format(entry.get("response_format"), field=f"{field}.response_format")
    if role == "system":
        content = "" if entry.get("content") is None else _content(entry, field)
        return System(content=content, tools=tools, response_format=response_format, task=task)
    content = _content(entry, field)
    if not content:
        raise InvalidRequest(
            f"{field}.content of a developer message must not be empty", field=f"{field}.content"
        )
    return Developer(content=content, tools=tools, response_format=response_format, task=task)


def _parse_assistant(entry: JsonObject, field: str, task: str | None) -> Assistant:
    unfinished = entry.get("wo_eos", False)
    if not isinstance(unfinished, bool):
        raise InvalidRequest(f"{field}.wo_eos must be true or false", field=f"{field}.wo_eos")
    raw_calls = entry.get("tool_calls")
    calls = [] if raw_calls is None else _list(raw_calls, f"{field}.tool_calls")
    return Assistant(
        content="" if entry.get("content") is None else _content(entry, field),
        reasoning=_optional_string(entry, "reasoning_content", field),
        calls=tuple(_parse_call(call, f"{field}.tool_calls[{index}]") for index, call in enumerate(calls)),
        unfinished=unfinished,
        task=task,
    )


def _parse_call(raw: object, field: str) -> ToolCall:
    entry = _object(raw, field)
    _check_function_type(entry, field)
    function = _object(entry.get("function"), f"{field}.function")
    return ToolCall(
        name=_required_string(function, "name", f"{field}.function"),
        arguments=_required_string(function, "arguments", f"{field}.function"),
        call_id=_optional_string(entry, "id", field),
    )


def _parse_tool(raw: object, field: str) -> JsonObject:
    entry = _object(raw, field)
    _check_function_type(entry, field)
    function = _object(entry.get("function"), f"{field}.function")
    if not _required_string(function, "name", f"{field}.function"):
        raise InvalidRequest(f"{field}.function.name must not be empty", field=f"{field}.function.name")
    return function


def _check_function_type(entry: JsonObject, field: str) -> None:
    kind = entry.get("type", "function")
    if kind != "function":
        raise InvalidRequest(f"{field}.type must be 'function', not {kind!r}", field=f"{field}.type")


def _parse_task(entry: JsonObject, field: str) -> str | None:
    task = entry.get("task")
    if task is not None and task not in TASKS:
        raise InvalidRequest(
            f"{field}.task must be one of {', '.join(TASKS)}, not {task!r}", field=f"{field}.task"
        )
    return task


def _content(entry: JsonObject, field: str) -> str:
    return _PART_SEPARATOR.join(_content_parts(entry, field))


def _content_parts(entry: JsonObject, field: str) -> tuple[str, ...]:
    """A string, or a list of text parts."""
    content = entry.get("content")
    if isinstance(content, str):
        return (content,)
    if not isinstance(content, list):
        raise InvalidRequest(
            f"{field}.content must be a string or a list of text parts, not {_kind(content)}",
            field=f"{field}.content",
        )
    parts = cast("list[object]", content)
    if not parts:
        raise InvalidRequest(f"{field}.content must have at least one part", field=f"{field}.content")
    return tuple(_text_part(part, f"{field}.content[{index}]") for index, part in enumerate(parts))


def _text_part(raw: object, field: str) -> str:
    part = _object(raw, field)
    kind = part.get("type")
    if kind != "text":
        raise InvalidRequest(f"{field}.type must be 'text', not {kind!r}", field=f"{field}.type")
    return _required_string(part, "text", field)


def _required_string(entry: JsonObject, key: str, field: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str):
        raise InvalidRequest(f"{field}.{key} must be a string, not {_kind(value)}", field=f"{field}.{key}")
    return value


def _optional_string(entry: JsonObject, key: str, field: str) -> str:
    return "" if entry.get(key) is None else _required_string(entry, key, field)


def _object(raw: object, field: str) -> JsonObject:
    if not isinstance(raw, Mapping):
        raise InvalidRequest(f"{field} must be an object, not {_kind(raw)}", field=field)
    return cast("JsonObject", raw)


def _list(raw: object, field: str) -> Sequence[object]:
    if not isinstance(raw, list | tuple):
        raise InvalidRequest(f"{field} must be a list, not {_kind(raw)}", field=field)
    return cast("Sequence[object]", raw)


def _kind(value: object) -> str:
    """A JSON value's type in JSON's own words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a string"
    return "an object" if isinstance(value, Mapping) else "a list"
