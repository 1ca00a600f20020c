"""Runs the command line in this process, with a model that is a few lines of Python."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from typer.testing import CliRunner, Result

from nanoengine.api.errors import RequestError
from nanoengine.api.outputs import CompletionOutput, RequestMetrics, RequestOutput
from nanoengine.api.stats import EngineStats
from nanoengine.cli.app import app
from nanoengine.params.sampling_params import SamplingParams
from nanoengine.setup.config.config import RunConfig
from nanoengine.setup.start.clock import StartClock, StartReport


@dataclass
class FakeEngine:
    """Answers one prompt a step, the last one first; each word is a token."""

    interrupt_after: int | None = None
    waiting: list[tuple[str, Any, str | None]] = field(default_factory=list)
    steps: int = 0
    seeds: dict[str, int] = field(default_factory=dict)

    def add_request(
        self, request_id: str, prompt: Any, params: Any, *, prompt_text: str | None = None, final_only: bool = False
    ) -> None:
        assert params.seed is not None  # by the prompt's place
        assert final_only
        self.seeds[request_id] = params.seed
        self.waiting.append((request_id, prompt, prompt_text))

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list[RequestOutput]:
        if self.interrupt_after == self.steps:
            raise KeyboardInterrupt
        self.steps += 1
        request_id, prompt, text = self.waiting.pop()
        ids = tuple(range(len(prompt.split()))) if isinstance(prompt, str) else tuple(prompt)
        error = RequestError("too_long", "the prompt is too long") if len(ids) > 20 else None
        sample = CompletionOutput(
            index=0, text=f" re: {text} é日", token_ids=(7, 8), finish_reason="stop", stop_reason=2
        )
        now = time.monotonic()
        metrics = RequestMetrics(
            arrival=now - 2, first_scheduled=now - 1.5, first_token=now - 1, finished=now, num_generated=2, longest=2
        )
        return [
            RequestOutput(
                request_id=request_id,
                prompt=text,
                prompt_token_ids=() if error else ids,
                outputs=[] if error else [sample],
                finished=True,
                metrics=metrics,
                num_cached_tokens=0 if error else len(ids) // 2,
                error=error,
            )
        ]


class FakeLLM:
    """Stands in for `LLM`. `made` are those that a command built."""

    made: ClassVar[list[FakeLLM]] = []
    template: ClassVar[bool] = True
    defaults: ClassVar[dict[str, Any]] = {}  # the model's own
    interrupt_after: ClassVar[int | None] = None
    failure: ClassVar[BaseException | None] = None

    def __init__(self, config: RunConfig) -> None:
        self.config, self.text_engine, self.closed = config, FakeEngine(type(self).interrupt_after), False
        self.start_report = StartReport(())
        self.default_params = SamplingParams(**(config.sampler or type(self).defaults))
        self.has_chat_template = type(self).template

    @classmethod
    def from_run_config(cls, config: RunConfig, *, registry: Any, say: Any, clock: StartClock) -> FakeLLM:
        if cls.failure is not None:
            raise cls.failure
        say("fetching the model")
        cls.made.append(cls(config))
        clock.lap("weights")
        cls.made[-1].start_report = clock.report()
        return cls.made[-1]

    def chat_prompt(self, messages: Any) -> list[int]:
        if messages[-1]["content"] == "refuse me":
            raise RequestError("invalid_prompt", "the chat template rejected the messages")
        return [1, *range(10, 10 + sum(len(m["content"].split()) for m in messages)), 2]

    def stats(self) -> Any:
        return EngineStats(running=1, waiting=len(self.text_engine.waiting), steps=self.text_engine.steps)

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeLLM]:
    """A fresh `FakeLLM` class in place of the real one."""
    cls = type("FakeLLM", (FakeLLM,), {"made": []})
    monkeypatch.setattr("nanoengine.llm.LLM", cls)
    return cls


@pytest.fixture
def nanoengine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs `nanoengine ARGUMENTS` in a fresh working directory."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


@pytest.fixture
def rows(tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    """Reads results.jsonl."""
    return lambda: [json.loads(line) for line in (tmp_path / "results.jsonl").read_text("utf-8").splitlines()]
