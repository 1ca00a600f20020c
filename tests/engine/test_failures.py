"""What counts as a failure of foreign code, and how any exception is put into words."""

from __future__ import annotations

import asyncio
import types

import pytest

from nanoengine.api.errors import described, is_failure, text_of

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
    @property
    def __notes__(self) -> list[str]:
        raise OSError


@pytest.mark.parametrize(
    "error", [ValueError(), SystemExit(3), PanicException("index out of bounds"), RecursionError()]
)
def test_foreign_failures(error: BaseException) -> None:
    assert is_failure(error)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError(), BaseException()])
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
