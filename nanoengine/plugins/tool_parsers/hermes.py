"""Calls between tags, as Hermes, Qwen 2.5, Qwen 3 and SmolLM write them:

<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nanoengine.api import Tool
from nanoengine.plugins.tool_parsers.calls import JsonCallsParser
from nanoengine.plugins.tool_parsers.constraints import quoted, tagged
from nanoengine.plugins.tool_parsers.scanning import Steps

BEGIN, END = "<tool_call>", "</tool_call>"


class Hermes(JsonCallsParser):
    """One object, or a list of objects, between the tags. A closing tag may be missing."""

    special_tokens = (BEGIN, END)

    @classmethod
    def matches(cls, template: str) -> bool:
        others = ("<function=", "<arg_key>")  # other forms between the same tags
        return BEGIN in template and not any(mark in template for mark in others)

    @classmethod
    def constraint(cls, tools: Sequence[Tool], *, required: bool, parallel: bool) -> Mapping[str, Any] | None:
        tags = [(f'{BEGIN}\n{{"name": {quoted(t.name)}, "arguments": ', t.parameters, f"}}\n{END}") for t in tools]
        return tagged(BEGIN, tags, required=required, parallel=parallel, separator="\n")

    def _read(self) -> Steps[None]:
        yield from self._between(BEGIN, END, self._calls_in)
