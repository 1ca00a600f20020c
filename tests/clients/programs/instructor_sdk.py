"""instructor: an object by each of its modes, and a partial one from a stream."""

from __future__ import annotations

from typing import Literal

import instructor
import openai
from common import KEY, MESSAGES, MODEL, URL, answer
from pydantic import BaseModel, Field


class City(BaseModel, extra="forbid"):
    """A city."""

    name: str = Field(max_length=20)
    size: Literal["small", "large"]


found = {}
for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
    client = instructor.from_openai(openai.OpenAI(base_url=URL, api_key=KEY, max_retries=0), mode=mode)
    city = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, response_model=City, max_retries=0, temperature=0, max_tokens=60
    )
    found[mode.value] = city.model_dump()

client = instructor.from_openai(openai.OpenAI(base_url=URL, api_key=KEY), mode=instructor.Mode.TOOLS)
partial = list(
    client.chat.completions.create_partial(
        model=MODEL, messages=MESSAGES, response_model=City, max_retries=0, temperature=0, max_tokens=60
    )
)
answer(found=found, partial=partial[-1].model_dump(), parts=len(partial))
