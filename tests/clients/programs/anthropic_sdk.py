"""anthropic: messages, a stream, a tool that must be used with its streamed input, counted tokens, an error."""

from __future__ import annotations

import anthropic
from common import KEY, MESSAGES, MODEL, ROOT, WEATHER, answer

client = anthropic.Anthropic(base_url=ROOT, api_key=KEY, max_retries=0)
short = {"model": MODEL, "max_tokens": 12, "messages": MESSAGES, "extra_body": {"temperature": 0}}
function = WEATHER["function"]
tool = {"name": function["name"], "description": function["description"], "input_schema": function["parameters"]}
forced = {**short, "max_tokens": 60, "tools": [tool], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}

whole = client.messages.create(**short)
with client.messages.stream(**short) as stream:
    parts = list(stream.text_stream)
    last = stream.get_final_message()
used = client.messages.create(**forced)
with client.messages.stream(**forced) as stream:
    kinds = [event.type for event in stream]
    streamed = stream.get_final_message()
[call] = [block for block in used.content if block.type == "tool_use"]
[streamed_call] = [block for block in streamed.content if block.type == "tool_use"]
second = client.messages.create(
    **{
        **short,
        "tools": [tool],
        "tool_choice": {"type": "none"},
        "messages": [
            *MESSAGES,
            {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in used.content]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "It is sunny."}]},
        ],
    }
)
try:
    client.messages.create(**{**short, "model": "nothing"})
except anthropic.NotFoundError as error:
    refused = error.body["error"]["type"]

answer(
    text=whole.content[0].text,
    reason=whole.stop_reason,
    usage=whole.usage.model_dump(exclude_none=True),
    streamed="".join(parts),
    streamed_usage=last.usage.model_dump(exclude_none=True),
    call=[call.name, call.input, used.stop_reason],
    streamed_call=[streamed_call.name, streamed_call.input],
    kinds=sorted(set(kinds)),
    second=bool(second.content),
    counted=client.messages.count_tokens(model=MODEL, messages=MESSAGES).input_tokens,
    refused=refused,
)
