"""llm, the command-line tool: a prompt with and without a stream, and a schema. LLM_USER_PATH has its configuration."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from common import MODEL, QUESTION, URL, answer

folder = Path(os.environ["LLM_USER_PATH"])
(folder / "extra-openai-models.yaml").write_text(
    f"- model_id: ours\n  model_name: {MODEL}\n  api_base: {URL}\n  api_key_name: ours\n  supports_schema: true\n"
)
(folder / "keys.json").write_text(json.dumps({"ours": os.environ["SERVER_KEY"]}))


def llm(*arguments: str) -> str:
    command = [sys.executable, "-m", "llm", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


options = ("-m", "ours", "-o", "temperature", "0", "-o", "max_tokens", "60")
streamed = llm("prompt", *options, QUESTION)
whole = llm("prompt", *options, "--no-stream", QUESTION)
schema = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 20}, "size": {"enum": ["small", "large"]}},
    "required": ["city", "size"],
    "additionalProperties": False,
}
answer(
    text=whole,
    streamed=streamed,
    schema=json.loads(llm("prompt", *options, "--schema", json.dumps(schema), QUESTION)),
)
