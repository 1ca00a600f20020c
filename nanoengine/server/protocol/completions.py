"""The request of /v1/completions."""

from __future__ import annotations

from typing import Any, ClassVar

from nanoengine.server.protocol.generate import GenerateRequest


class CompletionRequest(GenerateRequest):
    """OpenAI's completion request, with vLLM's fields."""

    not_supported: ClassVar = {
        **GenerateRequest.not_supported,
        "suffix": "the model only continues a text",
        "messages": "send them to /v1/chat/completions",
        "max_completion_tokens": "here it is called max_tokens",
        "prompt_embeds": "prompts are text or token ids",
    }

    prompt: Any = None  # checked by hand: a union of lists would report an error for each of a million ids
    echo: bool | None = None
    logprobs: int | None = None
    add_special_tokens: bool | None = None
