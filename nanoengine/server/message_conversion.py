"""A request for a message, of Anthropic's shape, as one for a chat completion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanoengine.server.conversations import kind_of, only, part_text, texts_of, wrong_kind
from nanoengine.server.errors import invalid
from nanoengine.server.field_names import Converted, Renames
from nanoengine.server.protocol.messages import CountRequest, MessagesRequest

_SCHEMA, _FORMAT = r"response_format\.json_schema(?:\.schema)?", "response_format"
_NAMES = {
    "stop": "stop_sequences",
    "user": "metadata.user_id",
    "reasoning_effort": "output_config.effort",
    r"tools\[(\d+)\]\.function\.parameters": r"tools[\1].input_schema",
    r"tools\[(\d+)\]\.function": r"tools[\1]",
    r"tool_choice\.function": "tool_choice",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    r"chat_template_kwargs\.enable_thinking|include_reasoning": "thinking",
    "continue_final_message|add_generation_prompt": "messages",
}
_TEXT = ("text",)
_USER = ("text", "tool_result")
_ASSISTANT = ("text", "tool_use", "thinking")


def as_chat(body: CountRequest) -> Converted:
    """As a `ChatRequest`. Raises `ApiError`."""
    messages, origins = _messages(body)
    fields: dict[str, Any] = {"messages": messages, **_tools(body)}
    if body.messages[-1].get("role") == "assistant":  # the answer goes on with this text
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    thinking, config = body.thinking, body.output_config
    if thinking is not None and thinking.type != "adaptive":
        fields["chat_template_kwargs"] = {"enable_thinking": thinking.type == "enabled"}
    if thinking is not None and (thinking.type == "disabled" or thinking.display == "omitted"):
        fields["include_reasoning"] = False
    if config is not None and config.effort is not None:
        fields["reasoning_effort"] = "xhigh" if config.effort == "max" else config.effort
    wanted = body.output_format or (config.format if config is not None else None)
    if wanted is not None:
        fields["response_format"] = {"type": "json_schema", "json_schema": {"schema": wanted.schema_}}
    if isinstance(body, MessagesRequest):
        fields |= _sampling(body)
    place = "output_format" if body.output_format is not None else "output_config.format"
    return Converted(fields, Renames({**_NAMES, _SCHEMA: f"{place}.schema", _FORMAT: place}, origins))


def _sampling(body: MessagesRequest) -> dict[str, Any]:
    names = {"stream": "stream", "max_tokens": "max_tokens", "stop_sequences": "stop"}
    names |= {name: name for name in ("temperature", "top_p", "top_k")}
    fields = {new: getattr(body, old) for old, new in names.items() if getattr(body, old) is not None}
    if body.metadata is not None and body.metadata.user_id is not None:
        fields["user"] = body.metadata.user_id
    return fields


def _tools(body: CountRequest) -> dict[str, Any]:
    if not body.tools:
        if body.tool_choice is not None and body.tool_choice.type in ("any", "tool"):
            raise invalid("tool_choice needs tools, and there are none", "tool_choice")
        return {}
    functions = [
        {"name": t.name, "parameters": t.input_schema, **({"description": t.description} if t.description else {})}
        for t in body.tools
    ]
    fields: dict[str, Any] = {"tools": [{"type": "function", "function": function} for function in functions]}
    choice = body.tool_choice
    if choice is None:
        return fields
    if choice.disable_parallel_tool_use is not None:
        fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    if (choice.type == "tool") != (choice.name is not None):
        raise invalid("tool_choice.name is for, and needed by, tool_choice.type 'tool'", "tool_choice.name")
    named = {"type": "function", "function": {"name": choice.name}}
    fields["tool_choice"] = {"any": "required", "tool": named}.get(choice.type, choice.type)
    return fields


def _messages(body: CountRequest) -> tuple[list[dict[str, Any]], list[str]]:
    """The messages, and of each which field it comes from."""
    if not body.messages:
        raise invalid("messages is empty; give at least one", "messages")
    found, origins = list[dict[str, Any]](), list[str]()
    if body.system is not None:
        origins.append("system")
        found.append({"role": "system", "content": texts_of(body.system, "system", _TEXT)})
    names: dict[str, str] = {}  # of the functions that were called, by the ids of the calls
    for index, message in enumerate(body.messages):
        where = f"messages[{index}]"
        role, content = message.get("role"), message.get("content")
        only(message, where, {"role": str}, ("content",))
        if role == "system":
            found.append({"role": "system", "content": texts_of(content, f"{where}.content", _TEXT)})
        elif role == "user":
            found += _of_user(content, f"{where}.content", names)
        elif role == "assistant":
            found.append(_of_assistant(content, f"{where}.content", names))
        else:
            raise invalid(f"{where}.role must be 'user' or 'assistant', not {role!r:.100}", f"{where}.role")
        origins += [where] * (len(found) - len(origins))
    return found, origins


def _of_user(content: Any, where: str, names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Results of tools become messages of their own, before the text that the user added."""
    if isinstance(content, str):
        return [{"role": "user", "content": content}]
    texts: list[dict[str, str]] = []
    results: list[dict[str, Any]] = []
    for i, block in enumerate(_list(content, where)):
        here = f"{where}[{i}]"
        kind = kind_of(block, here)
        if kind == "text":
            texts.append({"type": "text", "text": part_text(block, here, _TEXT)})
        elif kind == "tool_result":
            only(block, here, {"tool_use_id": str}, ("content", "is_error", "cache_control"))
            called = block["tool_use_id"]
            if called not in names:
                raise invalid(f"{here}: no earlier message has a tool_use with the id {called!r:.100}", here)
            failed, given = block.get("is_error"), block.get("content")
            if not isinstance(failed, bool | None):
                raise invalid(f"{here}.is_error must be true or false", f"{here}.is_error")
            text = "" if given is None else texts_of(given, f"{here}.content", _TEXT)
            text = f"Error: {text}" if failed else text
            results.append({"role": "tool", "tool_call_id": called, "name": names[called], "content": text})
        else:
            raise wrong_kind(kind, here, _USER)
    return [*results, *([{"role": "user", "content": texts}] if texts or not results else [])]


def _of_assistant(content: Any, where: str, names: dict[str, str]) -> dict[str, Any]:
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    texts, thoughts, calls = list[str](), list[str](), list[dict[str, Any]]()
    for i, block in enumerate(_list(content, where)):
        here = f"{where}[{i}]"
        kind = kind_of(block, here)
        if kind == "text":
            texts.append(part_text(block, here, _TEXT))
        elif kind == "thinking":
            only(block, here, {"thinking": str}, ("signature",))
            thoughts.append(block["thinking"])
        elif kind == "tool_use":
            only(block, here, {"id": str, "name": str, "input": Mapping}, ("cache_control", "caller"))
            names[block["id"]] = block["name"]
            function = {"name": block["name"], "arguments": block["input"]}
            calls.append({"id": block["id"], "type": "function", "function": function})
        else:
            raise wrong_kind(kind, here, _ASSISTANT)
    found: dict[str, Any] = {"role": "assistant"}
    if texts or not calls:
        found["content"] = "".join(texts)
    if thoughts:
        found["reasoning_content"] = "".join(thoughts)
    return found | ({"tool_calls": calls} if calls else {})


def _list(content: Any, where: str) -> list[Any]:
    if not isinstance(content, list):
        raise invalid(f"{where} must be text or a list of blocks", where)
    return content
