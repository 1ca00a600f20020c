"""Calls of Llama 3.1, 3.2 and 3.3: the output is {"name": "get_weather", "parameters": {"city": "Paris"}}, or has it
after <|python_tag|>. Several follow each other with ";" between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nanoengine.api import Tool
from nanoengine.plugins.tool_parsers.calls import JsonCallsParser
from nanoengine.plugins.tool_parsers.constraints import one_call
from nanoengine.plugins.tool_parsers.scanning import Steps

TAG = "<|python_tag|>"


class Llama3(JsonCallsParser):
    """What follows the tag and is no object (code for an interpreter) is content."""

    special_tokens = (TAG,)

    @classmethod
    def matches(cls, template: str) -> bool:
        others = ("<tool_call>", "<TOOLCALL>", "[func_name1(")  # models made of Llama with a form of their own
        marked = TAG in template or '"parameters": ' in template
        return "<|start_header_id|>" in template and marked and not any(mark in template for mark in others)

    @classmethod
    def constraint(cls, tools: Sequence[Tool], *, required: bool, parallel: bool) -> Mapping[str, Any] | None:
        return {"json": one_call(tools, "parameters")} if required else None

    def _read(self) -> Steps[None]:
        yield from self._space()
        if not (yield from self._calls_in(";", bare=True)):
            self._back()
        while (yield from self._until(TAG)):
            yield from self._space()
            if not (yield from self._calls_in(";")):
                self._reject(len(TAG))
