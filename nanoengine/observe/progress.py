"""How far a long piece of work is: a bar on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from nanoengine.api.errors import is_failure

LINE_SECONDS = 10.0  # between two plain lines


class Progress:
    """Of `total` pieces, to standard error. It raises nothing: where it cannot be written, it alone is lost.

    A bar overwrites its line, which only a terminal can show; a log gets lines of their own, and none for what takes
    less than `LINE_SECONDS`.
    """

    def __init__(self, total: int, what: str, unit: str, *, done: int = 0, shown: bool = True) -> None:
        self._out = _Unbreakable(sys.stderr)
        self._what, self._total, self._unit, self._shown = what, total, unit, shown
        self._done, self._done_before, self._state = done, done, ""
        self._began = self._said = time.monotonic()
        self._bar: tqdm[Any] = tqdm(
            total=total,
            initial=done,
            desc=what,
            unit=unit,
            file=self._out,
            dynamic_ncols=True,
            disable=not (shown and can_overwrite(sys.stderr)),
        )
        self._out.is_wrapped = True

    @property
    def is_bar(self) -> bool:
        return not self._bar.disable

    def update(self, count: int = 1) -> None:
        """So many more pieces are done."""
        self._done += count
        self._bar.update(count)
        self._line()

    def state(self, **values: object) -> None:
        """What goes on meanwhile, behind the count."""
        self._state = "".join(f", {name} {value}" for name, value in values.items())
        self._bar.set_postfix({name: str(value) for name, value in values.items()})
        self._line()

    @contextmanager
    def aside(self, file: Any) -> Iterator[None]:
        """Within, lines may be written to `file`, which may be the bar's terminal."""
        with self._bar.external_write_mode(file=file):
            yield

    def close(self) -> None:
        self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _line(self) -> None:
        now = time.monotonic()
        if self.is_bar or not self._shown or now - self._said < LINE_SECONDS:
            return
        self._said, seconds = now, now - self._began
        rate = (self._done - self._done_before) / seconds
        text = f"{self._what}: {self._done} of {self._total} after {seconds:.0f} s, {rate:.2f} {self._unit}s/s"
        self._out.write(f"{text}{self._state}\n")
        self._out.flush()


def note(text: str) -> None:
    """A line on standard error, next to the program's own output; lost alone where that cannot be written."""
    out = _Unbreakable(sys.stderr)
    out.write(f"{text}\n")
    out.flush()


def can_overwrite(stream: Any) -> bool:
    """Whether a line that was written can be written over: on a terminal that is not as dumb as it says."""
    try:
        return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # it is closed
        return False


class _Unbreakable:
    """A stream whose failures are no one's: a pipe whose reader has gone, a full disk, a closed or foreign object.

    `is_wrapped`: it equals the stream, for tqdm then clears a bar on it before other lines; but whoever makes a bar on
    standard error sees tqdm flush that itself, which may raise.
    """

    def __init__(self, stream: Any) -> None:
        self._wrapped, self.is_wrapped = stream, False

    def __getattr__(self, name: str) -> Any:  # encoding, fileno, isatty
        return getattr(self._wrapped, name)

    def __eq__(self, other: object) -> bool:
        return self.is_wrapped and self._wrapped is getattr(other, "_wrapped", other)

    __hash__ = None  # type: ignore[assignment]

    def write(self, text: str) -> None:
        self._quietly("write", text)

    def flush(self) -> None:
        self._quietly("flush")

    def _quietly(self, name: str, *arguments: Any) -> None:
        try:
            if self._wrapped is not None:
                getattr(self._wrapped, name)(*arguments)
        except BaseException as error:
            if not is_failure(error):
                raise
