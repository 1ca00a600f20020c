"""`nanoengine chat`: a conversation in the terminal, or with a script on standard input.

Answers go to standard output, everything else goes to standard error.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from nanoengine.api.errors import ConfigError, ModelError, RequestError, nearest
from nanoengine.cli.common import (
    FAILED,
    ConfigArgument,
    DebugOption,
    OverridesArgument,
    PluginOption,
    Terminated,
    answer,
    say,
    user_errors,
)
from nanoengine.observe.files import user_path
from nanoengine.observe.progress import can_overwrite
from nanoengine.setup.config.config import RunConfig, load_config
from nanoengine.setup.plugins.discover import discover
from nanoengine.setup.start.clock import StartClock
from nanoengine.setup.start.wake import wake_gpu

if TYPE_CHECKING:
    from nanoengine.api.outputs import RequestOutput
    from nanoengine.cli.conversation import Answer, Conversation
    from nanoengine.llm import LLM
    from nanoengine.params.sampling_params import SamplingParams

COMMANDS = {
    "/system": "TEXT sets the system prompt; without a text it shows it, and with '' it removes it",
    "/reset": "clears the conversation; the system prompt stays",
    "/stats": "shows statistics of the conversation and the engine",
    "/help": "shows this",
    "/exit": "leaves, as Ctrl-D does",
}
_LONG_PROMPT = 256  # tokens
_PASTED = 0.05  # seconds after a line in which the next one of a paste is there
_NEARLY_FULL = 0.8  # of max_model_len; from there on it is said
Kept = tuple[str, list[dict[str, str]]]
_HELP_TAIL = """\
A line that ends with \\ continues in the next one. To begin a message with /, write //.
Ctrl-C stops an answer; the part already shown stays in the conversation."""


def chat(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    plugin: PluginOption = None,
    save: Annotated[
        Path | None,
        typer.Option("--save", metavar="FILE", help="Keep the conversation in a file, as JSON."),
    ] = None,
    go_on: Annotated[
        Path | None,
        typer.Option("--continue", metavar="FILE", help="Go on with a saved conversation, and keep it there."),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Talk with a model. The configuration is that of `nanoengine run`; its prompts and output are ignored."""
    with user_errors(debug):
        clock = StartClock.of_process()
        kept, file = _kept(save, go_on)
        registry = discover(plugin or ())
        composed = load_config(config, overrides or (), registry=registry)
        if not composed.chat:
            where = composed.provenance.get("chat", "configuration")
            raise ConfigError(f"{where}: chat is false, but nanoengine chat needs the chat template; give chat=true")
        clock.lap("plugins")
        say(f"loading {composed.model.source}")
        wake_gpu(composed.engine)
        from nanoengine.llm import LLM

        clock.lap("import")
        with LLM.from_run_config(composed, registry=registry, say=say, clock=clock) as llm:
            say(llm.start_report.line())
            failed = _talk(llm, composed, kept, file)
        if failed and not sys.stdin.isatty():
            raise typer.Exit(FAILED)


def _kept(save: Path | None, go_on: Path | None) -> tuple[Kept, Path | None]:
    """The saved system prompt and messages, and the file to save in. Raises `ConfigError`."""
    from nanoengine.cli.conversation import read_conversation

    source = None if go_on is None else user_path(go_on, "--continue")
    target = source if save is None else user_path(save, "--save")
    if (
        target is not None
        and target != source
        and target.exists()
        and (not target.is_file() or target.stat().st_size > 0)
    ):
        raise ConfigError(f"--save {target} exists already; to go on with it, give --continue {target}")
    found = ("", list[dict[str, str]]()) if source is None else read_conversation(source)
    if target is not None:
        try:  # before a model is loaded
            target.absolute().parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--save {target}: {error.strerror or error}") from error
    return found, target


def _talk(llm: LLM, config: RunConfig, kept: Kept, file: Path | None) -> int:
    """Runs the conversation. Returns the number of messages that could not be answered."""
    from nanoengine.cli.conversation import Conversation

    if not llm.has_chat_template:
        llm.get_tokenizer()  # raises another error if the model has no tokenizer
        raise ModelError(
            f"{config.model.source} has no chat template, so it cannot chat; take an instruct model, or complete texts "
            "with nanoengine run"
        )
    talk = Conversation(llm, chat_params(llm.default_params, config), *kept, file=file)
    if talk.messages:
        _note(f"{len(talk.messages)} messages of {file}; the last: {talk.messages[-1]['content']}")
    if not sys.stdin.isatty():
        return _Session(talk, _NoInterrupts()).run()
    pasted_at_once = _edit_lines()
    _note(f"{config.model.source}: /help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
    with _Interrupts.taken() as interrupts:
        return _Session(talk, interrupts, pasted_at_once).run()


def _edit_lines() -> bool:
    """Gives `input()` editing and history, if readline can be imported. Returns whether a paste is one line for it.

    It is not where readline is editline (as in some builds of Python), and on a terminal without that feature.
    """
    try:
        import readline
    except ImportError:
        return False
    if "libedit" in (readline.__doc__ or "") or getattr(readline, "backend", "readline") != "readline":
        return False
    readline.parse_and_bind("set enable-bracketed-paste on")
    return os.environ.get("TERM") != "dumb"


def chat_params(params: SamplingParams, config: RunConfig) -> SamplingParams:
    """The configured parameters. Without `max_tokens`, only max_model_len limits an answer."""
    if params.core.n != 1:
        where = config.provenance.get("sampler.n", "sampler")
        raise ConfigError(
            f"{where}: sampler.n is {params.core.n}, but a conversation continues from one answer; give n=1"
        )
    given = config.sampler is not None and "max_tokens" in config.sampler
    return params if given else params.replace(max_tokens=None)


class _NoInterrupts:
    """The handling of Ctrl-C with a script: it ends the program."""

    stopped = False

    @contextmanager
    def reading(self) -> Iterator[None]:
        yield


class _Interrupts(_NoInterrupts):
    """The handling of Ctrl-C at a terminal.

    While a line is read, it raises. Otherwise it sets `stopped`, so that no step of the engine is interrupted.
    """

    _reading = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        if self._reading:
            self._reading = False  # a second Ctrl-C must not interrupt what follows
            raise KeyboardInterrupt
        self.stopped = True

    @contextmanager
    def reading(self) -> Iterator[None]:
        self._reading = True
        try:
            yield
        finally:
            self._reading = self.stopped = False

    @classmethod
    @contextmanager
    def taken(cls) -> Iterator[_Interrupts]:
        found = cls()
        before = signal.signal(signal.SIGINT, found.handle)
        try:
            yield found
        finally:
            signal.signal(signal.SIGINT, before)


@dataclass
class _Session:
    """Reads lines, and answers them or runs the commands in them."""

    talk: Conversation
    interrupts: _NoInterrupts
    pasted_at_once: bool = True
    failed: int = 0

    def run(self) -> int:
        while True:
            try:
                with self.interrupts.reading():
                    line = _read(self.pasted_at_once)
                if line is None or line.strip() == "/exit":
                    return self.failed
                self._line(line)
            except Terminated:
                raise
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                _note("\nCtrl-D or /exit leaves")

    def _line(self, line: str) -> None:
        text = line.strip()
        if text.startswith("/") and not text.startswith("//"):
            self._command(*text.split(maxsplit=1))
        elif text:
            self._ask(text.removeprefix("/") if text.startswith("//") else text)

    def _ask(self, text: str) -> None:
        start, reading = time.perf_counter(), _Reading()
        try:
            answer = self.talk.ask(text, _shown_after(reading), lambda: self.interrupts.stopped, reading)
        except RequestError as error:
            reading.clear()
            self.failed += 1
            hint = "; /reset begins a new conversation" if error.code in ("too_long", "does_not_fit") else ""
            _note(f"no answer ({error.code}): {error}{hint}")
            return
        reading.clear()
        if answer.output is None:
            _note("[stopped before the first word, the message is removed]")
            return
        _show("\n")
        _note(_closing(answer, answer.output, self.talk, time.perf_counter() - start))
        try:
            self.talk.save()
        except ConfigError as error:  # the conversation goes on
            self.failed += 1
            _note(f"error: {error}")

    def _command(self, name: str, rest: str = "") -> None:
        if name == "/system":
            self._system(rest)
        elif name == "/reset":
            self.talk.reset()
            _note("a new conversation begins" + (", with the system prompt" if self.talk.system else ""))
        elif name == "/stats":
            _note(_stats(self.talk))
        elif name == "/help":
            _note("\n".join([*(f"{name:<9}{what}" for name, what in COMMANDS.items()), _HELP_TAIL]))
        else:
            self.failed += not sys.stdin.isatty()
            _note(f"no command {name}; {nearest(name, COMMANDS)}. To begin a message with /, write //")

    def _system(self, text: str) -> None:
        if text:
            self.talk.system = "" if text in ("''", '""') else text
        _note(f"system prompt: {self.talk.system}" if self.talk.system else "no system prompt")


def _read(pasted_at_once: bool = True) -> str | None:
    """Reads a message. None at the end of the input.

    If a paste is not one line, lines that are there at once after the first one belong to it.
    """
    lines: list[str] = []
    while True:
        try:
            line = _input("> " if not lines else ". ")
            while not pasted_at_once and select.select([sys.stdin], [], [], _PASTED)[0]:
                line += f"\n{_input('. ')}"
        except EOFError:
            if sys.stdin.isatty():
                _note("")  # so that the shell's prompt is on a new line
            return "\n".join(lines) if lines else None
        if not line.endswith("\\"):
            return "\n".join([*lines, line])
        lines.append(line[:-1])


def _input(prompt: str) -> str:
    if not sys.stdin.isatty():
        return input()
    if sys.stdout.isatty():
        return input(prompt)
    with suppress(OSError, ValueError):  # standard output is for answers; the prompt is not essential
        print(prompt, end="", file=sys.stderr, flush=True)
    return input()


class _Reading:
    """A line that shows how much of a long prompt is computed. It is removed when the answer begins."""

    def __init__(self) -> None:
        self._shown = False

    def __call__(self, done: int, total: int) -> None:
        if can_overwrite(sys.stderr) and (total >= _LONG_PROMPT or self._shown):
            self._write(f"\rreading the prompt: {done:,} of {total:,} tokens")
            self._shown = True

    def clear(self) -> None:
        if self._shown:
            self._shown = False
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        with suppress(OSError, ValueError):  # it is not essential
            print(text, end="", file=sys.stderr, flush=True)


def _shown_after(reading: _Reading) -> Callable[[str], None]:
    def show(text: str) -> None:
        reading.clear()
        _show(text)

    return show


def _show(text: str) -> None:
    answer(text, end="")


def _note(text: str) -> None:
    """Writes a line to standard error. It is dim if the terminal supports it and the user allows it (no-color.org)."""
    say(text, style=_dim if can_overwrite(sys.stderr) and not os.environ.get("NO_COLOR") else None)


def _dim(text: str) -> str:
    return typer.style(text, dim=True)


def _closing(answer: Answer, output: RequestOutput, talk: Conversation, seconds: float) -> str:
    sample, metrics, params = output.outputs[0], output.metrics, talk.params
    count, limit = len(sample.token_ids), talk.max_model_len
    used = len(output.prompt_token_ids) + count
    parts = [
        f"{count} token{'' if count == 1 else 's'}",
        *([f"{count / seconds:.1f} tokens/s"] if count > 1 else []),
        *([f"first after {1000 * metrics.ttft:.0f} ms"] if metrics.ttft is not None else []),
        f"{output.num_cached_tokens} of {len(output.prompt_token_ids)} prompt tokens from the prefix cache",
    ]
    if used >= _NEARLY_FULL * limit:
        parts.append(f"the conversation has {used:,} of max_model_len={limit:,} tokens")
    if not answer.text.strip() and not answer.stopped:
        parts.insert(0, "no answer: the model ended it at once" if sample.finish_reason == "stop" else "no text")
    if answer.stopped:
        parts.insert(0, "stopped" if answer.text else "stopped before the first word, the message is removed")
    elif sample.finish_reason == "length":
        cut = params.core.max_tokens is not None and count >= params.core.max_tokens
        parts.insert(
            0, f"cut at sampler.max_tokens={count}" if cut else "cut at max_model_len; /reset begins a new conversation"
        )
    return f"[{', '.join(parts)}]"


def _stats(talk: Conversation) -> str:
    stats = talk.llm.stats()
    drafts = f"; {stats.accepted} of {stats.drafted} drafts accepted" if stats.drafted else ""
    return "\n".join(
        [
            f"conversation: {len(talk.messages)} messages; in total {talk.answers} answers, {talk.generated} tokens, "
            f"{talk.cached_tokens} of {talk.prompt_tokens} prompt tokens from the prefix cache "
            f"({100 * talk.cached_tokens / (talk.prompt_tokens or 1):.1f}%)",
            f"engine: {stats.steps} steps, {stats.preemptions} preemptions, {stats.running} running, {stats.waiting} "
            f"waiting, {stats.num_blocks - stats.free_blocks} of {stats.num_blocks} KV blocks used{drafts}",
        ]
    )
