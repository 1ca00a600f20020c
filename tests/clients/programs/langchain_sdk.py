"""langchain-openai: invoke, stream, batch, bound tools, structured output by JSON schema and by function calling."""

from __future__ import annotations

from typing import Literal

from common import KEY, MODEL, QUESTION, URL, answer
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field


class City(BaseModel, extra="forbid"):
    """A city."""

    name: str = Field(max_length=20)
    size: Literal["small", "large"]


@tool
def weather(city: str, unit: Literal["celsius", "fahrenheit"]) -> str:
    """The weather of a city."""
    return f"{city}: 20 {unit}"


chat = ChatOpenAI(model=MODEL, base_url=URL, api_key=KEY, temperature=0, max_tokens=60, max_retries=0)
whole = chat.invoke(QUESTION)
chunks = list(chat.stream(QUESTION, stream_usage=True))
total = chunks[0]
for chunk in chunks[1:]:
    total = total + chunk
batch = chat.batch([QUESTION, QUESTION])

bound = chat.bind_tools([weather], tool_choice="weather", parallel_tool_calls=False)
asked = bound.invoke(QUESTION)
[call] = asked.tool_calls
result = weather.invoke(call)
assert isinstance(result, ToolMessage)
final = chat.bind_tools([weather], tool_choice="none").invoke([HumanMessage(QUESTION), asked, result])

answer(
    text=whole.content,
    usage=[whole.usage_metadata["input_tokens"], whole.usage_metadata["output_tokens"]],
    streamed=total.content,
    streamed_usage=[total.usage_metadata["input_tokens"], total.usage_metadata["output_tokens"]],
    reason=total.response_metadata["finish_reason"],
    batch=[one.content for one in batch],
    call=[call["name"], sorted(call["args"])],
    final=bool(final.content),
    schema=chat.with_structured_output(City, method="json_schema").invoke(QUESTION).model_dump(),
    function=chat.with_structured_output(City, method="function_calling").invoke(QUESTION).model_dump(),
    completion=OpenAI(model=MODEL, base_url=URL, api_key=KEY, temperature=0, max_tokens=3).invoke("One, two,"),
    vectors=[
        len(vector)
        for vector in OpenAIEmbeddings(
            model=MODEL, base_url=URL, api_key=KEY, check_embedding_ctx_length=False
        ).embed_documents(["Paris", "London"])
    ],
)
