"""pydantic-ai: an agent's text, its streamed text, an output type by a required tool, one by the response format."""

from __future__ import annotations

import asyncio
from typing import Literal

from common import KEY, MODEL, QUESTION, URL, answer
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class City(BaseModel, extra="forbid"):
    """A city."""

    name: str = Field(max_length=20)
    size: Literal["small", "large"]


model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key=KEY))
settings = {"temperature": 0.0, "max_tokens": 60}


async def main() -> None:
    plain = Agent(model, model_settings=settings)
    whole = await plain.run(QUESTION)
    async with plain.run_stream(QUESTION) as stream:
        parts = [part async for part in stream.stream_text(delta=True, debounce_by=None)]
        usage = stream.usage
        usage = usage() if callable(usage) else usage
    tool = await Agent(model, output_type=ToolOutput(City), model_settings=settings).run(QUESTION)
    native = await Agent(model, output_type=NativeOutput(City), model_settings=settings).run(QUESTION)
    answer(
        text=whole.output,
        streamed="".join(parts),
        streamed_usage=[usage.input_tokens, usage.output_tokens],
        tool=tool.output.model_dump(),
        native=native.output.model_dump(),
    )


asyncio.run(main())
