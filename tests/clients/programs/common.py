"""What every program is given, and how it answers: one JSON object as the last line of its output."""

from __future__ import annotations

import json
import os
from typing import Any

ROOT = os.environ["SERVER"]  # http://127.0.0.1:PORT
URL = f"{ROOT}/v1"
KEY = os.environ["SERVER_KEY"]
MODEL = os.environ["SERVER_MODEL"]
QUESTION = "Tell me the capital of France."
MESSAGES: Any = [{"role": "user", "content": QUESTION}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


def answer(**fields: Any) -> None:
    print(json.dumps(fields))
