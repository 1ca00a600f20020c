"""The request of /v1/chat/completions."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from nanoengine.server.protocol.base import FIRST_ERROR, OnlyFalse, RequestModel
from nanoengine.server.protocol.generate import GenerateRequest

Objects = Annotated[list[dict[str, Any]], FIRST_ERROR]


class Function(RequestModel):
    """A function that the model may call. parameters: the JSON schema of its arguments."""

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(RequestModel):
    """A tool: a function."""

    type: Literal["function"] = "function"
    function: Function


class NamedFunction(RequestModel):
    """The name of a function."""

    name: str


class NamedTool(RequestModel):
    """`tool_choice`: this function must be called."""

    type: Literal["function"] = "function"
    function: NamedFunction


class ChatRequest(GenerateRequest):
    """OpenAI's chat completion request, with vLLM's fields."""

    not_supported: ClassVar = {
        **GenerateRequest.not_supported,
        "functions": "use tools",
        "function_call": "use tool_choice",
        "audio": "answers are text",
        "prediction": "drafts are the engine's option speculation",
        "web_search_options": "nothing is fetched",
        "verbosity": "say it in a message",
        "prompt": "send it to /v1/completions, or as messages",
        "echo": "a conversation is not repeated",
    }

    messages: Objects
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Annotated[list[ToolDefinition], FIRST_ERROR, Field(max_length=1024)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    include_reasoning: bool | None = None
    add_special_tokens: OnlyFalse | None = None  # the template writes them
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: Objects | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = None
    store: OnlyFalse | None = None
    service_tier: Literal["auto", "default"] | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
