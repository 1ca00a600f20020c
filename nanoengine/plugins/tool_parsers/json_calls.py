"""Calls as plain JSON: the whole output is {"name": "get_weather", "arguments": {"city": "Paris"}}, or a list of such
objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nanoengine.api import Tool
from nanoengine.plugins.tool_parsers.calls import JsonCallsParser
from nanoengine.plugins.tool_parsers.constraints import list_of_calls
from nanoengine.plugins.tool_parsers.scanning import Steps


class JsonCalls(JsonCallsParser):
    """For models without a form of their own. An output that does not begin with a call is content."""

    @classmethod
    def constraint(cls, tools: Sequence[Tool], *, required: bool, parallel: bool) -> Mapping[str, Any] | None:
        return {"json": list_of_calls(tools, "arguments", parallel=parallel)} if required else None

    def _read(self) -> Steps[None]:
        yield from self._space()
        if not (yield from self._calls_in(bare=True)):
            self._back()
        yield from self._rest()
