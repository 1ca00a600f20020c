"""What counts as a failure of foreign code, and how any exception is put into words."""

from __future__ import annotations

import asyncio
import re
import types
from typing import Any

import pytest

from nanoengine.api.errors import EngineClosed, PluginError, WorkerError, described, forget_locals, is_failure, text_of
from nanoengine.api.plugin_calls import plugin_call, plugin_step

PanicException = types.new_class(
    "PanicException", (BaseException,), exec_body=lambda body: body.update(__module__="pyo3_runtime")
)


class Wordless(Exception):
    def __init__(self, raised: BaseException) -> None:
        self.raised = raised

    def __str__(self) -> str:
        raise self.raised


class NotText(Exception):
    def __str__(self) -> str:
        return 3  # type: ignore[return-value]


class BadNotes(Exception):
    raised: type[BaseException] = OSError

    @property
    def __notes__(self) -> list[str]:
        raise self.raised


class NotesThatExit(BadNotes):
    raised = SystemExit


class NotesTuple(Exception):
    __notes__ = ("a",)  # type: ignore[assignment]


class NoNote(Exception):
    def add_note(self, note: str) -> None:
        raise SystemExit


class Hides(Exception):
    def __getattribute__(self, name: str) -> Any:
        if name in ("__traceback__", "__cause__", "__context__"):
            raise SystemExit(name)
        return super().__getattribute__(name)


class HidesCode(SystemExit):
    @property
    def code(self) -> int:  # type: ignore[override]
        raise ValueError


class NoWords:
    def __repr__(self) -> str:
        raise SystemExit


@pytest.mark.parametrize(
    "error",
    [
        ValueError(),
        SystemExit(3),
        PanicException("index out of bounds"),
        RecursionError(),
        BaseExceptionGroup("g", [SystemExit(1), BaseExceptionGroup("h", [PanicException(), ValueError()])]),
    ],
)
def test_foreign_failures(error: BaseException) -> None:
    assert is_failure(error)


INTERRUPTS = [KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError(), BaseException()]


@pytest.mark.parametrize("error", [*INTERRUPTS, BaseExceptionGroup("g", [ValueError(), KeyboardInterrupt()])])
def test_the_callers_own_exceptions_pass_every_seam(error: BaseException) -> None:
    assert not is_failure(error)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("x"), "ValueError: x"),
        (ValueError(), "ValueError"),
        (SystemExit(3), "SystemExit: 3"),
        (Wordless(ValueError()), "Wordless: its __str__ raised ValueError"),
        (Wordless(SystemExit()), "Wordless: its __str__ raised SystemExit"),
        (Wordless(PanicException()), "Wordless: its __str__ raised PanicException"),
        (NotText(), "NotText: its __str__ raised TypeError"),
        (BadNotes("x"), "BadNotes: x (its __notes__ raised OSError)"),
        (NotesThatExit("x"), "NotesThatExit: x (its __notes__ raised SystemExit)"),
        (ValueError("half \ud800"), "ValueError: half \\ud800"),
    ],
)
def test_any_exception_is_put_into_words(error: BaseException, words: str) -> None:
    assert described(error) == words
    described(error).encode()


def test_notes_are_put_into_words() -> None:
    error = ValueError("x")
    error.add_note("in step 3")
    assert described(error) == "ValueError: x (in step 3)"
    error.__notes__.append(NotText())
    assert described(error) == "ValueError: x (in step 3) (its __str__ raised TypeError)"


def test_an_interrupt_is_no_word() -> None:
    with pytest.raises(KeyboardInterrupt):
        text_of(Wordless(KeyboardInterrupt()))


class Processor:
    """A plugin's."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (NotesTuple("x"), "Processor.apply raised NotesTuple: x (a), "),
        (NotesThatExit("x"), "Processor.apply raised NotesThatExit: x (its __notes__ raised SystemExit), "),
        (NoNote("x"), "Processor.apply raised NoNote: x, "),
        (HidesCode(3), "Processor.apply called sys.exit(3), "),
        (SystemExit(), "Processor.apply called sys.exit(), "),
        (SystemExit(NoWords()), "Processor.apply called sys.exit(a value of type NoWords), "),
        (WorkerError(0, 1, "step 3", "x"), "Processor.apply raised WorkerError: rank 0 of 1 failed (step 3): x, "),
        (EngineClosed("x"), "Processor.apply raised EngineClosed: x, "),
    ],
    ids=lambda given: type(given).__name__,
)
def test_what_takes_no_note_or_means_an_engine_is_a_plugins_error(error: BaseException, words: str) -> None:
    with pytest.raises(PluginError, match=re.escape(words)) as caught, plugin_step("Processor.apply", Processor):
        raise error
    assert caught.value.__cause__ is error
    assert f"{__file__}, line " in str(caught.value)


def test_an_exception_that_hides_its_traceback_is_read_all_the_same() -> None:
    error = Hides("x")
    with pytest.raises(BaseException) as caught, plugin_step("Processor.apply", Processor):  # noqa: PT011
        raise error
    assert caught.value is error
    assert described(error).startswith("Hides: x (in Processor.apply)")
    forget_locals(error)


def test_an_exception_that_is_raised_again_has_its_note_once() -> None:
    error = ValueError("x")

    def apply() -> None:
        raise error

    for _ in range(2):
        with pytest.raises(ValueError, match="x"), plugin_step("Processor.apply", Processor):
            apply()
    assert error.__notes__.count("in Processor.apply") == 1
    forget_locals(error)


@pytest.mark.parametrize("error", [WorkerError(0, 1, "step 3", "x"), EngineClosed("x")])
def test_no_plugin_says_that_an_engine_has_ended(error: BaseException) -> None:
    words = f"Processor.pack failed: {type(error).__name__}"
    with pytest.raises(PluginError, match=words), plugin_call("Processor.pack failed", Processor):
        raise error


def test_a_plugins_error_without_its_name_gets_it() -> None:
    with pytest.raises(PluginError) as caught, plugin_step("Processor.apply", Processor):
        raise PluginError("no column")
    assert described(caught.value).startswith("PluginError: no column (in Processor.apply)")


@pytest.mark.parametrize("error", [asyncio.CancelledError(), GeneratorExit(), BaseException("x")])
def test_what_a_plugins_own_line_raises_is_no_interrupt(error: BaseException) -> None:
    """This file is the plugin's."""
    words = f"Processor.apply raised {type(error).__name__}"
    with pytest.raises(PluginError, match=words), plugin_step("Processor.apply", Processor):
        raise error


def handler(source: str, error: BaseException) -> None:
    """Raises the error by a line of another file."""
    exec(compile("raise error", source, "exec"), {"error": error})


@pytest.mark.parametrize("error", INTERRUPTS)
def test_what_a_handler_of_the_callers_raises_in_a_plugin_is_an_interrupt(error: BaseException) -> None:
    with pytest.raises(type(error)), plugin_step("Processor.apply", Processor):
        handler("caller.py", error)
    with pytest.raises(KeyboardInterrupt), plugin_step("Processor.apply", Processor):
        raise KeyboardInterrupt
