"""The built-in tool parsers, one form of calls per file."""

from __future__ import annotations

from nanoengine.api import API_VERSION, ToolParserSpec, hookimpl

_HERE = "nanoengine.plugins.tool_parsers"
_TARGETS = {
    "hermes": "hermes:Hermes",
    "json": "json_calls:JsonCalls",
    "llama3": "llama3:Llama3",
    "mistral": "mistral:Mistral",
    "mistral_list": "mistral:MistralList",
    "pythonic": "pythonic:Pythonic",
    "qwen3_coder": "qwen3_coder:Qwen3Coder",
}


@hookimpl
def register_tool_parsers() -> list[ToolParserSpec]:
    return [ToolParserSpec(name=name, target=f"{_HERE}.{target}", api=API_VERSION) for name, target in _TARGETS.items()]
