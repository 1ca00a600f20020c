"""litellm: chat, a stream with usage, tools, text completions, embeddings; what it counts."""

from __future__ import annotations

import json

import litellm
from common import KEY, MESSAGES, MODEL, URL, WEATHER, answer

litellm.telemetry = False
given = {"model": f"openai/{MODEL}", "api_base": URL, "api_key": KEY, "temperature": 0, "max_tokens": 12}

whole = litellm.completion(messages=MESSAGES, **given)
chunks = list(litellm.completion(messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **given))
rebuilt = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
tools = litellm.completion(
    messages=MESSAGES, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, **{**given, "max_tokens": 60}
)
call = tools.choices[0].message.tool_calls[0]
text = litellm.text_completion(
    model=f"text-completion-openai/{MODEL}", api_base=URL, api_key=KEY, prompt="One, two,", max_tokens=3, temperature=0
)
vectors = litellm.embedding(
    model=f"openai/{MODEL}", api_base=URL, api_key=KEY, input=["Paris"], encoding_format="float"
)
try:
    litellm.completion(messages=MESSAGES, **{**given, "temperature": -1})
except litellm.exceptions.BadRequestError as error:
    refused = type(error).__name__
else:
    refused = ""

answer(
    text=whole.choices[0].message.content,
    usage=[whole.usage.prompt_tokens, whole.usage.completion_tokens],
    streamed=rebuilt.choices[0].message.content,
    streamed_usage=[rebuilt.usage.prompt_tokens, rebuilt.usage.completion_tokens],
    reason=rebuilt.choices[0].finish_reason,
    call=[call.function.name, json.loads(call.function.arguments), tools.choices[0].finish_reason],
    completion=text.choices[0].text,
    vector=len(vectors.data[0]["embedding"]),
    refused=refused,
)
