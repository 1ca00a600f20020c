"""lm-eval on tasks of our own, over /v1/completions with the server's tokenizer, or over chat completions."""

from __future__ import annotations

import os
import sys
from typing import Any

from common import KEY, MODEL, URL, answer

os.environ["OPENAI_API_KEY"] = KEY
import lm_eval
from lm_eval.tasks import TaskManager

kind, batch, *tasks = sys.argv[1:]
arguments = {"model": MODEL, "num_concurrent": 1, "max_retries": 1, "auth_token": KEY}
if kind == "local-completions":
    arguments |= {"base_url": f"{URL}/completions", "tokenizer_backend": "remote"}
else:
    arguments |= {"base_url": f"{URL}/chat/completions"}
found = lm_eval.simple_evaluate(
    model=kind,
    model_args=arguments,
    tasks=tasks,
    task_manager=TaskManager(include_path=".", include_defaults=False),
    batch_size=int(batch),
    apply_chat_template=kind == "local-chat-completions",
    log_samples=True,
    bootstrap_iters=0,
)
samples: dict[str, list[list[Any]]] = {}
for task, rows in found["samples"].items():
    pairs = (pair for row in rows for pair in zip(row["arguments"], row["resps"], strict=True))
    samples[task] = [[list(given), replies[0]] for given, replies in pairs]
answer(samples=samples)
