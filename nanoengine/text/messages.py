"""Checks conversations and tools, and converts them to plain data before a template receives them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from nanoengine.api.errors import RequestError, described, is_failure

REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the same key; templates read the first


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Checks a list of `{"role": str, "content": str | list of parts}`. The template receives other keys unchanged.

    `content` may be None or missing only if there are `tool_calls`. A part is {"type": "text", "text": str}, or a
    string, which is converted to that. `arguments` of a tool call may be JSON text; templates expect an object, so it
    is parsed. Returns new messages; the caller's are not changed. Raises `RequestError("invalid_prompt")` that names
    the index of the message.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise invalid(f"messages must be a list of {{'role', 'content'}} dicts, not {type(messages).__name__}")
    if not messages:
        raise invalid("messages is empty; give at least one, as in [{'role': 'user', 'content': 'Hello'}]")
    return [_check_message(i, message) for i, message in enumerate(messages)]


def _check_message(index: int, message: Any) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise invalid(f"{where} must be a dict with 'role' and 'content', not {type(message).__name__}")
    if not isinstance(message.get("role"), str):
        raise invalid(f"{where} needs 'role', a string such as 'user'; it has {sorted(map(str, message))}")
    content = message.get("content")
    if content is None and not message.get("tool_calls"):
        raise invalid(f"{where} needs 'content', a string; it has {sorted(map(str, message))}")
    if content is not None and not isinstance(content, str | list):
        raise invalid(f"{where}['content'] must be a string or a list of parts, not {type(content).__name__}")
    checked: dict[str, Any] = plain(message, where)
    if isinstance(content, list):
        checked["content"] = [_check_part(f"{where}['content'][{i}]", part) for i, part in enumerate(content)]
    if checked.get("tool_calls") is not None:
        checked["tool_calls"] = _check_tool_calls(f"{where}['tool_calls']", checked["tool_calls"])
    reasoning = next((checked[name] for name in REASONING if checked.get(name) is not None), None)
    if reasoning is not None:
        checked = {"thinking": reasoning, **checked, "reasoning_content": reasoning}
    return checked


def _check_part(where: str, part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise invalid(f"{where} must be a string or a dict with 'type' and 'text', not {type(part).__name__}")
    if part.get("type") != "text":
        raise invalid(f"{where} is of type {part.get('type')!r}: only parts of type 'text' are supported")
    if not isinstance(part.get("text"), str):
        raise invalid(f"{where} needs 'text', a string; it has {sorted(map(str, part))}")
    return dict(part)


def _check_tool_calls(where: str, calls: Any) -> list[Any]:
    if not isinstance(calls, list | tuple):
        raise invalid(f"{where} must be a list of tool calls, not {type(calls).__name__}")
    return [_check_tool_call(f"{where}[{i}]", call) for i, call in enumerate(calls)]


def _check_tool_call(where: str, call: Any) -> dict[str, Any]:
    """A checked `{"type": "function", "function": {"name", "arguments"}}`, or only the keys of the function."""
    if not isinstance(call, dict):
        raise invalid(f"{where} must be a dict with 'function', not {type(call).__name__}")
    if "function" not in call:
        return {**call, **_arguments(where, call)}
    function = call["function"]
    if not isinstance(function, dict):
        raise invalid(f"{where}['function'] must be a dict with 'name' and 'arguments', not {type(function).__name__}")
    return {**call, "function": {**function, **_arguments(f"{where}['function']", function)}}


def _arguments(where: str, function: Mapping[str, Any]) -> dict[str, Any]:
    """The key `arguments` with an object as its value; {} if the key is missing."""
    if "arguments" not in function:
        return {}
    given = function["arguments"]
    where = f"{where}['arguments']"
    if given is None or given == "":
        return {"arguments": {}}
    if isinstance(given, str):
        try:
            given = json.loads(given, parse_constant=_no_number)
        except (ValueError, RecursionError) as error:
            raise invalid(f"{where} is not JSON ({error}): give an object, or its JSON text") from error
    if not isinstance(given, dict):
        raise invalid(f"{where} must be an object or its JSON text, not {type(given).__name__}")
    return {"arguments": given}


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def check_tools(tools: Any) -> list[dict[str, Any]] | None:
    """JSON schemas of tools. transformers makes the schema of a function. Raises `RequestError("invalid_prompt")`."""
    if tools is None:
        return None
    if not isinstance(tools, list | tuple):
        raise invalid(f"tools must be a list of JSON schemas or functions, not {type(tools).__name__}")
    return [_schema(f"tools[{i}]", tool) for i, tool in enumerate(tools)]


def _schema(where: str, tool: Any) -> dict[str, Any]:
    if isinstance(tool, Mapping):
        schema: dict[str, Any] = plain(tool, where)
        return schema
    if not callable(tool):
        raise invalid(f"{where} must be a JSON schema or a function, not {type(tool).__name__}")
    from transformers.utils import get_json_schema

    try:
        found: dict[str, Any] = plain(get_json_schema(tool), where)
    except BaseException as error:
        if not is_failure(error):
            raise
        raise invalid(f"{where}: cannot make a JSON schema of {tool!r}: {described(error)}") from error
    return found


def check_documents(documents: Any) -> list[Any] | None:
    if documents is None:
        return None
    if not isinstance(documents, list | tuple) or not all(isinstance(each, Mapping) for each in documents):
        raise invalid("documents must be a list of dicts, with 'title' and 'text'")
    return [plain(document, f"documents[{i}]") for i, document in enumerate(documents)]


def plain(value: Any, where: str) -> Any:
    """A copy as plain data, which is all that a template receives: None, bool, int, float, str, list, tuple, dict.

    Values of subclasses become plain ones; numpy numbers, dataclasses and pydantic models become their contents. Any
    other object becomes the name of its type in angle brackets, as in transformers. Raises
    `RequestError("invalid_prompt")`.
    """
    try:
        return _plain(value)
    except RecursionError as error:
        raise invalid(f"{where} is nested too deeply, or contains itself") from error
    except BaseException as error:
        if not is_failure(error):
            raise
        raise invalid(f"{where} cannot be read: {described(error)}") from error


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, tuple):
        return tuple(_plain(each) for each in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return _plain(value.item())
    if callable(getattr(value, "model_dump", None)) and not isinstance(value, type):
        return _plain(value.model_dump())
    return f"<{type(value).__name__}>"


def invalid(message: str) -> RequestError:
    return RequestError("invalid_prompt", message)
