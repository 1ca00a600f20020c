"""Calls of Mistral's models: [TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}, and before version 11 of its tokenizer
[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nanoengine.api import Tool
from nanoengine.plugins.tool_parsers.calls import JsonCallsParser
from nanoengine.plugins.tool_parsers.constraints import list_of_calls, tagged
from nanoengine.plugins.tool_parsers.scanning import Steps

BEGIN, CALL_ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"


class Mistral(JsonCallsParser):
    """Reads both forms. [ARGS] may be missing, and the model's own id of the call may come before it."""

    special_tokens = (BEGIN, CALL_ID, ARGUMENTS)

    @classmethod
    def matches(cls, template: str) -> bool:
        return BEGIN in template and ARGUMENTS in template

    @classmethod
    def constraint(cls, tools: Sequence[Tool], *, required: bool, parallel: bool) -> Mapping[str, Any] | None:
        tags = [(f"{BEGIN}{tool.name}{ARGUMENTS}", tool.parameters, "") for tool in tools]
        return tagged(BEGIN, tags, required=required, parallel=parallel)

    def _read(self) -> Steps[None]:
        while (yield from self._until(BEGIN)):
            char = yield from self._space()
            if not (yield from (self._calls_in() if char and char in "[{" else self._named())):
                self._reject(len(BEGIN))

    def _named(self) -> Steps[bool]:
        """Reads a call of the new form and reports it. Returns False, with the text held, if it is none."""
        name = yield from self._while(_of_name)
        yield from self._space()
        marker = yield from self._literal(CALL_ID, ARGUMENTS)
        if marker == CALL_ID:
            yield from self._while(_of_name)
            marker = yield from self._literal(ARGUMENTS)
        if not name or (yield from self._space()) != "{":
            return False
        self._begin(name)
        yield from self._json(self._arguments)
        return True


class MistralList(Mistral):
    """The old form is what constrained output has; it reads both as well."""

    @classmethod
    def matches(cls, template: str) -> bool:
        return BEGIN in template and ARGUMENTS not in template

    @classmethod
    def constraint(cls, tools: Sequence[Tool], *, required: bool, parallel: bool) -> Mapping[str, Any] | None:
        tag = (f"{BEGIN} ", list_of_calls(tools, "arguments", parallel=parallel), "")
        return tagged(BEGIN, [tag], required=required, parallel=False)


def _of_name(char: str) -> bool:
    return char.isalnum() or char in "_-."
