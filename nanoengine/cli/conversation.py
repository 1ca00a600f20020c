"""A conversation with a model: its messages, and streamed answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nanoengine.api.outputs import RequestOutput

if TYPE_CHECKING:
    from nanoengine.llm import LLM
    from nanoengine.params.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer. `text`: what was shown. `stopped`: the user stopped it. `output`: the last output of the engine."""

    text: str
    stopped: bool
    output: RequestOutput


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

    def ask(self, text: str, show: Callable[[str], None], stopped: Callable[[], bool]) -> Answer:
        """Streams the answer to `show`, piece by piece, until it ends or `stopped` returns true.

        The part of a stopped answer that was shown stays in the conversation. A message without any answer is removed.

        Raises `RequestError` for a message that cannot be answered; the conversation does not change then.
        """
        asked = {"role": "user", "content": text}
        system = [{"role": "system", "content": self.system}] if self.system else []
        prompt = self.llm.chat_prompt([*system, *self.messages, asked])
        answer = self._answer(prompt, show, stopped)
        self._count(answer.output)
        if answer.text or not answer.stopped:
            self.messages += [asked, {"role": "assistant", "content": answer.text}]
        return answer

    def _answer(self, prompt: list[int], show: Callable[[str], None], stopped: Callable[[], bool]) -> Answer:
        shown = ""
        with self.llm.stream(prompt, self.params) as stream:
            for output in stream:
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
        raise AssertionError("a stream ends with a finished output")

    def _count(self, output: RequestOutput) -> None:
        self.answers += 1
        self.prompt_tokens += len(output.prompt_token_ids)
        self.cached_tokens += output.num_cached_tokens
        self.generated += sum(len(sample.token_ids) for sample in output.outputs)

    def reset(self) -> None:
        """Removes all messages. The system prompt stays."""
        self.messages.clear()
