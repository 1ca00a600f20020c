"""Progress of long work: a bar on a terminal and in a notebook, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from nanoengine.api.errors import is_failure

LINE_SECONDS = 10.0  # between two plain lines


class Progress:
    """Progress over `total` pieces, on standard error. Where that cannot be written, nothing is raised.

    A terminal shows a bar, which overwrites its own line; a notebook with ipywidgets shows a widget. A log gets plain
    lines, and none for work that takes less than `LINE_SECONDS`.
    """

    def __init__(self, total: int, what: str, unit: str, *, done: int = 0, shown: bool = True) -> None:
        self._out = _Unbreakable(sys.stderr)
        self._what, self._total, self._unit, self._shown = what, total, unit, shown
        self._done, self._done_before, self._state = done, done, ""
        self._began = self._shown_at = time.monotonic()
        widget = shows_widgets()
        bar: type[tqdm[Any]] = notebook_bar() if widget else tqdm
        self._bar: tqdm[Any] = bar(
            total=total,
            initial=done,
            desc=what,
            unit=unit,
            file=self._out,
            dynamic_ncols=True,
            disable=not (shown and total > 0 and (widget or can_overwrite(sys.stderr))),
        )
        self._out.is_wrapped = True

    @property
    def is_bar(self) -> bool:
        return not self._bar.disable

    def update(self, count: int = 1) -> None:
        """`count` more pieces are done."""
        self._done += count
        self._bar.update(count)
        self._line()

    def state(self, **values: object) -> None:
        """Values to show after the count."""
        self._state = "".join(f", {name} {value}" for name, value in values.items())
        self._bar.set_postfix({name: str(value) for name, value in values.items()})
        self._line()

    @contextmanager
    def aside(self, file: Any) -> Iterator[None]:
        """Within a `with`, lines may be written to `file`, even if it is the bar's terminal."""
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
        if self.is_bar or not self._shown or now - self._shown_at < LINE_SECONDS:
            return
        self._shown_at, seconds = now, now - self._began
        rate = (self._done - self._done_before) / seconds
        text = f"{self._what}: {self._done} of {self._total} after {seconds:.0f} s, {rate:.2f} {self._unit}s/s"
        self._out.write(f"{text}{self._state}\n")
        self._out.flush()


def note(text: str) -> None:
    """Write a line to standard error. Where that cannot be written, nothing is raised."""
    out = _Unbreakable(sys.stderr)
    out.write(f"{text}\n")
    out.flush()


def can_overwrite(stream: Any) -> bool:
    """Whether a written line can be overwritten: on a terminal, unless TERM=dumb."""
    try:
        return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # it is closed
        return False


def shows_widgets() -> bool:
    """Whether this is a notebook that can show a bar as a widget: IPython's kernel, with ipywidgets installed."""
    ipython = sys.modules.get("IPython")  # a kernel has imported it
    shell = ipython.get_ipython() if ipython is not None else None
    return "IPKernelApp" in getattr(shell, "config", ()) and find_spec("ipywidgets") is not None


def notebook_bar() -> type[tqdm[Any]]:
    from tqdm.notebook import tqdm_notebook

    return tqdm_notebook


class _Unbreakable:
    """A stream whose failures are ignored: a pipe without a reader, a full disk, a closed or foreign object.

    `is_wrapped`: it compares equal to the stream, so that tqdm clears a bar on it before other lines. Not while the bar
    is made: tqdm would then flush standard error itself, which may raise.
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
