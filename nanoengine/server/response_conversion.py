"""A request for a response as one for a chat completion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanoengine.server.conversations import kind_of, only, texts_of, wrong_kind
from nanoengine.server.errors import ApiError, invalid
from nanoengine.server.field_names import Converted, Renames
from nanoengine.server.protocol.responses import FunctionChoice, ResponsesRequest

# What clients send for nothing, and what to do instead of anything else.
_REFUSED: Mapping[str, tuple[Any, str]] = {
    "store": (False, "responses are not stored; send false, or leave it out"),
    "previous_response_id": (None, "responses are not stored; send the whole conversation as input"),
    "conversation": (None, "conversations are not stored; send the whole conversation as input"),
    "prompt": (None, "prompts are not stored; send their text as instructions"),
    "background": (False, "an answer is made while its request is open"),
    "truncation": ("disabled", "nothing is left out of the input; send fewer items"),
    "max_tool_calls": (None, "tools are called by the client"),
    "top_logprobs": (0, "use /v1/chat/completions"),
}
_NAMES = {
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    r"response_format\.json_schema(?:\.schema)?": "text.format.schema",
    "response_format": "text.format",
    r"tools\[(\d+)\]\.function": r"tools[\1]",
    r"tool_choice\.function": "tool_choice",
    "messages": "input",
}
_ITEMS = ("message", "function_call", "function_call_output", "reasoning")
_PARTS = ("input_text", "output_text", "text", "refusal")
_ROLES = ("user", "assistant", "system", "developer")


def as_chat(body: ResponsesRequest) -> Converted:
    """As a `ChatRequest`. Raises `ApiError`."""
    for name, (allowed, advice) in _REFUSED.items():
        if body.given(name) and getattr(body, name) != allowed:
            raise ApiError(400, f"{name} is not supported: {advice}", "not_supported", name)
    turns = _turns(body)
    fields: dict[str, Any] = {"messages": turns.found, **_tools(body)}
    names = {"stream": "stream", "max_output_tokens": "max_tokens", "temperature": "temperature", "top_p": "top_p"}
    names |= {"user": "user"}
    fields |= {new: getattr(body, old) for old, new in names.items() if getattr(body, old) is not None}
    if body.reasoning is not None and body.reasoning.effort is not None:
        fields["reasoning_effort"] = body.reasoning.effort
    wanted = body.text.format if body.text is not None else None
    if wanted is not None and wanted.type == "json_schema" and wanted.schema_ is None:
        raise invalid("text.format.schema is missing: give a JSON schema", "text.format.schema")
    if wanted is not None and wanted.type != "text":
        schema = {"json_schema": {"schema": wanted.schema_}} if wanted.type == "json_schema" else {}
        fields["response_format"] = {"type": wanted.type, **schema}
    return Converted(fields, Renames(_NAMES, turns.origins))


def _tools(body: ResponsesRequest) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if body.tools:
        fields["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "parameters": tool.parameters or {},
                    **({"description": tool.description} if tool.description else {}),
                },
            }
            for tool in body.tools
        ]
        if body.parallel_tool_calls is not None:
            fields["parallel_tool_calls"] = body.parallel_tool_calls
    choice = body.tool_choice
    if isinstance(choice, FunctionChoice):
        fields["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    elif choice is not None and (body.tools or choice == "required"):
        fields["tool_choice"] = choice
    return fields


def _turns(body: ResponsesRequest) -> _Turns:
    turns = _Turns()
    if body.instructions is not None:
        turns.add({"role": "system", "content": body.instructions}, "instructions")
    if isinstance(body.input, str):
        turns.add({"role": "user", "content": body.input}, "input")
        return turns
    if not body.input:
        raise invalid("input is empty: give a text, or at least one item", "input")
    for index, item in enumerate(body.input):
        turns.read(item, f"input[{index}]")
    turns.close()
    return turns


class _Turns:
    """Messages made of items. What the model said in one turn (reasoning, text, calls) becomes one message.

    Attributes:
        found: the messages. origins: of each, the field that it comes from; of a turn of several items, the first.
    """

    def __init__(self) -> None:
        self.found, self.origins = list[dict[str, Any]](), list[str]()
        self._turn: dict[str, Any] = {}  # of the model, which may still grow
        self._began = ""  # where it did
        self._names: dict[str, str] = {}  # of the functions that were called, by the ids of the calls

    def add(self, message: dict[str, Any], origin: str) -> None:
        self.close()
        self.found.append(message)
        self.origins.append(origin)

    def close(self) -> None:
        """The model's turn is over."""
        turn, self._turn = self._turn, {}
        if "content" in turn or "tool_calls" in turn:  # reasoning alone is no message
            self.found.append({"role": "assistant", **turn})
            self.origins.append(self._began)

    def read(self, item: Mapping[str, Any], where: str) -> None:
        """Raises `ApiError`."""
        kind = kind_of({"type": "message", **item}, where)
        if kind == "item_reference":
            raise ApiError(400, f"{where}: items are not stored; send the item itself", "not_supported", where)
        if kind not in _ITEMS:
            raise wrong_kind(kind, where, _ITEMS)
        getattr(self, f"_{kind}")(item, where)
        self._began = self._began if len(self._turn) > 1 else where

    def _message(self, item: Mapping[str, Any], where: str) -> None:
        only(item, where, {"role": str}, ("content", "id", "status", "phase"))
        role, text = item["role"], texts_of(item.get("content"), f"{where}.content", _PARTS)
        if role not in _ROLES:
            raise invalid(f"{where}.role must be one of {', '.join(_ROLES)}, not {role!r:.100}", f"{where}.role")
        if role != "assistant":
            self.add({"role": role, "content": text}, where)
            return
        if "content" in self._turn or "tool_calls" in self._turn:
            self.close()
        self._turn["content"] = text

    def _reasoning(self, item: Mapping[str, Any], where: str) -> None:
        only(item, where, {}, ("id", "summary", "content", "encrypted_content", "status"))
        if "content" in self._turn or "tool_calls" in self._turn:
            self.close()
        for key, kinds in (("content", ("reasoning_text",)), ("summary", ("summary_text",))):
            if item.get(key) not in (None, [], ""):
                self._turn["reasoning_content"] = texts_of(item[key], f"{where}.{key}", kinds)
                return

    def _function_call(self, item: Mapping[str, Any], where: str) -> None:
        only(item, where, {"call_id": str, "name": str, "arguments": str}, ("id", "status"))
        self._names[item["call_id"]] = item["name"]
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        self._turn.setdefault("tool_calls", []).append(call)

    def _function_call_output(self, item: Mapping[str, Any], where: str) -> None:
        only(item, where, {"call_id": str}, ("output", "id", "status", "name"))
        call = item["call_id"]
        if call not in self._names:
            raise invalid(f"{where}: no earlier item is a function_call with the call_id {call!r:.100}", where)
        text = texts_of(item.get("output"), f"{where}.output", _PARTS)
        self.add({"role": "tool", "tool_call_id": call, "name": self._names[call], "content": text}, where)
