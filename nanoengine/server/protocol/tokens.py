"""The requests of /tokenize and /detokenize, and of /admin."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from nanoengine.server.protocol.base import RequestModel
from nanoengine.server.protocol.chat import Objects, ToolDefinition
from nanoengine.server.protocol.generate import Ints


class TokenizeRequest(RequestModel):
    """A text, or a conversation. add_special_tokens: default true for a text, false for a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Objects | None = None
    tools: list[ToolDefinition] | None = None
    documents: Objects | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(RequestModel):
    """Token ids."""

    model: str | None = None
    tokens: Ints
    skip_special_tokens: bool | None = None


class DrainRequest(RequestModel):
    """seconds: that the open requests have to end."""

    seconds: float = Field(30.0, ge=0, le=86_400)


class AbortRequest(RequestModel):
    """request_id: as the answer's header X-Request-Id has it."""

    request_id: str


class TraceRequest(RequestModel):
    """seconds: for which the engine's steps are recorded."""

    seconds: float = Field(1.0, gt=0, le=60)
