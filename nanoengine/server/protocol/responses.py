"""The request of /v1/responses, which keeps nothing."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from nanoengine.server.protocol.base import FIRST_ERROR, Name, RequestModel
from nanoengine.server.protocol.chat import Objects

Includable = Literal["reasoning.encrypted_content"]


class ResponseTool(RequestModel):
    """A function that the model may call. parameters: the JSON schema of its arguments."""

    not_supported: ClassVar = {
        "defer_loading": "all tools are given",
        "allowed_callers": "tools are called by the client",
    }

    type: Literal["function"]
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(RequestModel):
    """This function must be called."""

    type: Literal["function"]
    name: str


class TextFormat(RequestModel):
    """What the answer must be: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(RequestModel):
    """What the answer's text is."""

    not_supported: ClassVar = {"verbosity": "say it in the instructions"}

    format: TextFormat | None = None


class ReasoningOptions(RequestModel):
    """effort: given to the template. The reasoning itself is shown; a summary is not made."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponseStreamOptions(RequestModel):
    """Events are sent as they are."""

    include_obfuscation: bool | None = None


class ResponsesRequest(RequestModel):
    """OpenAI's request for a response, stateless: the whole conversation is in `input`."""

    not_supported: ClassVar = {
        "context_management": "send the items that count",
        "moderation": "text is not judged",
        "messages": "its name is input",
        "max_tokens": "its name is max_output_tokens",
        "response_format": "use text.format",
        "n": "one answer is made; use /v1/chat/completions",
        "stop": "use /v1/chat/completions",
    }

    model: str | None = None
    input: str | Objects
    instructions: str | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: Annotated[list[ResponseTool], FIRST_ERROR, Field(max_length=1024)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[Includable] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    background: bool | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    max_tool_calls: int | None = None
    top_logprobs: int | None = None
    metadata: dict[str, str] | None = None
    client_metadata: dict[str, str] | None = None
    user: Name | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: Literal["auto", "default"] | None = None
