"""openai: chat, streams, tools, structured outputs, completions with log-probs, embeddings, models, errors."""

from __future__ import annotations

import json
from typing import Literal

import openai
from common import KEY, MESSAGES, MODEL, URL, WEATHER, answer
from pydantic import BaseModel, Field


class City(BaseModel, extra="forbid"):
    name: str = Field(max_length=20)
    size: Literal["small", "large"]


client = openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0)
short = {"model": MODEL, "max_tokens": 12, "temperature": 0}

whole = client.chat.completions.create(messages=MESSAGES, **short)
with client.chat.completions.create(
    messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **short
) as stream:
    chunks = list(stream)

logged = client.chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=3, **short)
found = logged.choices[0].logprobs.content

named = client.chat.completions.create(
    model=MODEL, messages=MESSAGES, temperature=0, max_completion_tokens=60, tools=[WEATHER],
    tool_choice={"type": "function", "function": {"name": "weather"}},
)  # fmt: skip
call = named.choices[0].message.tool_calls[0]
with client.chat.completions.create(
    model=MODEL, messages=MESSAGES, temperature=0, max_completion_tokens=60, tools=[WEATHER], tool_choice="required",
    parallel_tool_calls=False, stream=True,
) as stream:  # fmt: skip
    deltas = [choice.delta for chunk in stream for choice in chunk.choices]
streamed = [call for delta in deltas for call in delta.tool_calls or ()]

second = client.chat.completions.create(
    messages=[
        *MESSAGES,
        named.choices[0].message,
        {"role": "tool", "tool_call_id": call.id, "content": "Paris is sunny."},
    ],
    tools=[WEATHER],
    tool_choice="none",
    **short,
)
parsed = client.chat.completions.parse(
    model=MODEL, messages=MESSAGES, temperature=0, max_completion_tokens=60, response_format=City
)
echoed = client.completions.create(
    model=MODEL, prompt="The capital of France is Paris", echo=True, max_tokens=0, logprobs=1
)
several = client.completions.create(model=MODEL, prompt=["One, two,", "A, B,"], n=2, max_tokens=3, seed=1)
vectors = client.embeddings.create(model=MODEL, input=["Paris", "London"])
floats = client.embeddings.create(model=MODEL, input="Paris", encoding_format="float")

errors = {}
for name, bad in {"model": {"model": "nothing"}, "temperature": {"temperature": -1}, "unknown": {}}.items():
    more = {"extra_body": {"temprature": 1}} if name == "unknown" else {}
    try:
        client.chat.completions.create(**{**short, "messages": MESSAGES, **bad, **more})
    except openai.APIStatusError as error:
        errors[name] = [type(error).__name__, error.status_code, error.code, error.param]
try:
    openai.OpenAI(base_url=URL, api_key="wrong", max_retries=0).models.list()
except openai.AuthenticationError as error:
    errors["key"] = [type(error).__name__, error.status_code, error.code, error.param]

answer(
    models=[model.id for model in client.models.list()],
    text=whole.choices[0].message.content,
    reason=whole.choices[0].finish_reason,
    usage=whole.usage.model_dump(exclude_none=True),
    streamed="".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
    streamed_usage=chunks[-1].usage.model_dump(exclude_none=True),
    usages=sum(chunk.usage is not None for chunk in chunks),
    logged="".join(token.token for token in found),
    logged_tokens=len(found),
    top=[len(token.top_logprobs) for token in found],
    named=[call.function.name, json.loads(call.function.arguments), named.choices[0].finish_reason],
    streamed_call=[
        "".join(call.function.name or "" for call in streamed),
        json.loads("".join(call.function.arguments or "" for call in streamed)),
    ],
    second=second.choices[0].message.content,
    parsed=parsed.choices[0].message.parsed.model_dump(),
    echoed=echoed.choices[0].text,
    echoed_logprobs=echoed.choices[0].logprobs.token_logprobs,
    several=[choice.text for choice in several.choices],
    vectors=[len(vector.embedding) for vector in vectors.data],
    same=max(abs(a - b) for a, b in zip(vectors.data[0].embedding, floats.data[0].embedding, strict=True)),
    errors=errors,
)
