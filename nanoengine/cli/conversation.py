"""A conversation with a model: its messages, streamed answers, and the file that keeps it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nanoengine.api.errors import ConfigError
from nanoengine.api.outputs import RequestOutput
from nanoengine.cli.record import write_whole
from nanoengine.setup.config.prompts import PromptFile, read_prompts

if TYPE_CHECKING:
    from nanoengine.llm import LLM
    from nanoengine.observe.steps import StepRecord
    from nanoengine.params.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer.

    `text`: what was shown. `stopped`: the user stopped it. `output`: the last output; None: stopped before the first.
    """

    text: str
    stopped: bool
    output: RequestOutput | None


class _Stopped(Exception):
    """The user stopped while the prompt was computed."""


@dataclass
class Conversation:
    """A conversation. `messages`: those of the user and the model in turn, without the system prompt."""

    llm: LLM
    params: SamplingParams
    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    answers: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated: int = 0
    file: Path | None = None

    def ask(
        self,
        text: str,
        show: Callable[[str], None],
        stopped: Callable[[], bool],
        reading: Callable[[int, int], None] = lambda done, total: None,
    ) -> Answer:
        """Streams the answer to `show`, piece by piece, until it ends or `stopped` returns true.

        `reading` is called with the prompt tokens that are computed, and all, until the first token is there.

        The part of a stopped answer that was shown stays in the conversation. A message without any answer is removed.

        Raises `RequestError` for a message that cannot be answered; the conversation does not change then.
        """
        asked = {"role": "user", "content": text}
        system = [{"role": "system", "content": self.system}] if self.system else []
        prompt = self.llm.chat_prompt([*system, *self.messages, asked])
        answer = self._answer(prompt, show, stopped, reading)
        if answer.output is not None:
            self._count(answer.output)
        if answer.text or not answer.stopped:
            self.messages += [asked, {"role": "assistant", "content": answer.text}]
        return answer

    def _answer(
        self,
        prompt: list[int],
        show: Callable[[str], None],
        stopped: Callable[[], bool],
        reading: Callable[[int, int], None],
    ) -> Answer:
        shown = ""

        def watch(step: StepRecord) -> None:
            for row in step.rows:
                if not row.sampled:
                    reading(row.start + row.num_tokens, len(prompt))
                    if stopped():
                        raise _Stopped

        with ExitStack() as first, self.llm.stream(prompt, self.params) as stream:
            first.enter_context(self.llm.observe(watch))
            reading(0, len(prompt))
            outputs = iter(stream)
            while True:
                try:
                    output = next(outputs)
                except _Stopped:
                    stream.close()
                    self.llm.engine.apply_inbox()
                    return Answer("", True, None)
                first.close()
                text = output.outputs[0].text
                if len(text) > len(shown):
                    show(text[len(shown) :])
                    shown = text
                if output.finished:
                    return Answer(shown, False, output)
                if stopped():
                    stream.close()
                    self.llm.engine.apply_inbox()  # frees its blocks now
                    return Answer(shown, True, output)

    def _count(self, output: RequestOutput) -> None:
        self.answers += 1
        self.prompt_tokens += len(output.prompt_token_ids)
        self.cached_tokens += output.num_cached_tokens
        self.generated += sum(len(sample.token_ids) for sample in output.outputs)

    @property
    def max_model_len(self) -> int:
        return self.llm.engine.scheduler.config.max_model_len

    def reset(self) -> None:
        """Removes all messages. The system prompt stays."""
        self.messages.clear()

    def save(self) -> None:
        """Writes the conversation to its file, if it has one. Raises `ConfigError`."""
        if self.file is None:
            return
        system = [{"role": "system", "content": self.system}] if self.system else []
        try:
            text = json.dumps({"messages": [*system, *self.messages]}, ensure_ascii=False)
            write_whole(self.file, text.encode("utf-8", "backslashreplace") + b"\n")
        except OSError as error:
            raise ConfigError(f"cannot save the conversation in {self.file}: {error.strerror or error}") from error


def read_conversation(file: Path) -> tuple[str, list[dict[str, str]]]:
    """The system prompt ("": none) and the messages of a saved conversation. Raises `ConfigError`."""
    found = read_prompts(PromptFile(file=str(file), field="messages", format="jsonl"))
    if len(found) > 1 or isinstance(found[0].prompt, str):
        raise ConfigError(f"{file} is not one conversation: it has {len(found)} rows, and needs one with messages")
    messages = [dict(message) for message in found[0].prompt]
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise ConfigError(f"{file}: messages of user and assistant must follow each other, and end with an answer")
    return system, messages
