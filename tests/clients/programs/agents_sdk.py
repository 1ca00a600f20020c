"""openai-agents: a tool that must be used and the turn after it, by chat completions and by /v1/responses."""

from __future__ import annotations

import asyncio
import sys
from typing import Literal

import agents
import openai
from common import KEY, MODEL, QUESTION, URL, answer

agents.set_tracing_disabled(True)
client = openai.AsyncOpenAI(base_url=URL, api_key=KEY, max_retries=0)
called: list[tuple[str, str]] = []


@agents.function_tool
def weather(city: str, unit: Literal["celsius", "fahrenheit"]) -> str:
    """The weather of a city."""
    called.append((city, unit))
    return "20 degrees"


KINDS = {"chat": agents.OpenAIChatCompletionsModel, "responses": agents.OpenAIResponsesModel}


async def main(kind: str) -> None:
    model = KINDS[kind](model=MODEL, openai_client=client)
    settings = agents.ModelSettings(temperature=0.0, max_tokens=60)
    plain = agents.Agent(name="plain", model=model, model_settings=settings)
    whole = await agents.Runner.run(plain, QUESTION)
    streamed = agents.Runner.run_streamed(plain, QUESTION)
    events = [event.type async for event in streamed.stream_events()]
    forced = agents.ModelSettings(temperature=0.0, max_tokens=60, tool_choice="required", parallel_tool_calls=False)
    working = agents.Agent(name="working", model=model, model_settings=forced, tools=[weather])
    done = await agents.Runner.run(working, QUESTION, max_turns=3)
    answer(
        text=whole.final_output,
        streamed=streamed.final_output,
        events=sorted(set(events)),
        called=len(called),
        final=type(done.final_output).__name__,
        turns=len(done.raw_responses),
    )


asyncio.run(main(sys.argv[1]))
