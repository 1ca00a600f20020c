"""The requests of /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from nanoengine.server.protocol.base import FIRST_ERROR, Name, RequestModel
from nanoengine.server.protocol.chat import Objects
from nanoengine.server.protocol.generate import Stops


class CacheControl(RequestModel):
    """Accepted and ignored: the engine finds prefixes in its cache by itself."""

    type: Literal["ephemeral"]
    ttl: str | None = None
    scope: str | None = None


class MessageTool(RequestModel):
    """A function that the model may call. input_schema: the JSON schema of its arguments."""

    not_supported: ClassVar = {
        "allowed_callers": "tools are called by the client",
        "defer_loading": "all tools are given",
    }

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = None


class ToolChoice(RequestModel):
    """Whether a tool must be called: auto, any of them, the named one, or none."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(RequestModel):
    """Whether the model reasons, where its template lets that be chosen. budget_tokens: checked, but not enforced."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1)
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(RequestModel):
    """A JSON schema that the answer matches."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(RequestModel):
    """effort: given to the template. format: what the answer must match."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class ContextEdit(RequestModel):
    """An edit that removes nothing: all reasoning is kept."""

    type: Literal["clear_thinking_20251015"]
    keep: Literal["all"]


class ContextManagement(RequestModel):
    """What is left out of the conversation: nothing. Claude Code asks for that by name."""

    edits: list[ContextEdit] | None = None


class Metadata(RequestModel):
    """Who asks."""

    user_id: Name | None = None


class CountRequest(RequestModel):
    """A conversation in Anthropic's shape."""

    not_supported: ClassVar = {
        "container": "no code is run",
        "mcp_servers": "nothing is fetched",
        "inference_geo": "there is one place",
        "speed": "there is one speed",
        "n": "one answer is made; use /v1/chat/completions",
        "stop": "its name is stop_sequences",
        "max_completion_tokens": "its name is max_tokens",
        "response_format": "use output_config.format",
    }

    model: str | None = None
    messages: Objects
    system: str | Objects | None = None
    tools: Annotated[list[MessageTool], FIRST_ERROR, Field(max_length=1024)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    cache_control: CacheControl | None = None
    context_management: ContextManagement | None = None


class MessagesRequest(CountRequest):
    """Anthropic's request for a message."""

    max_tokens: int
    stream: bool | None = None
    stop_sequences: Stops | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
