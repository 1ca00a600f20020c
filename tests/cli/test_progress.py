"""Bars stand on terminals alone; elsewhere are plain lines, and what cannot be written is lost alone."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from nanoengine.cli.chat import _note
from nanoengine.observe import progress
from nanoengine.observe.progress import Progress, can_overwrite


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Broken(Terminal):
    """`error` is raised by all that writes."""

    def __init__(self, error: BaseException, terminal: bool) -> None:
        super().__init__()
        self._error, self._terminal = error, terminal

    def write(self, text: str) -> int:
        raise self._error

    def flush(self) -> None:
        raise self._error

    def isatty(self) -> bool:
        return self._terminal


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def work(bar: Progress, pieces: int = 3) -> None:
    for step in range(pieces):
        bar.update()
        bar.state(step=step)
        with bar.aside(sys.stdout):
            print(step)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with Progress(3, "prompts", "prompt") as bar:
        work(bar)
        assert bar.is_bar
    assert "\r" in sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "3/3" in sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_a_notebook_with_widgets_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bar(progress.tqdm):  # type: ignore[type-arg]
        """tqdm's widget writes nothing to a stream."""

    ipython = SimpleNamespace(get_ipython=lambda: SimpleNamespace(config={"IPKernelApp": {}}))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setattr(progress, "notebook_bar", lambda: Bar)
    for installed, kind in ((None, progress.tqdm), (object(), Bar)):
        monkeypatch.setattr(progress, "find_spec", lambda name, found=installed: found)
        with Progress(3, "prompts", "prompt") as bar:
            work(bar)
            assert (type(bar._bar), bar.is_bar) == (kind, kind is Bar)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))  # it is only imported
    assert not progress.shows_widgets()


def test_no_work_gets_no_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with Progress(0, "prompts", "prompt"):
        pass
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_log_and_a_dumb_terminal_get_plain_lines(monkeypatch: pytest.MonkeyPatch, at_once: None, stream: Any) -> None:
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setenv("TERM", "dumb" if stream is Terminal else "xterm")
    with Progress(4, "prompts", "prompt", done=1) as bar:
        work(bar)
        assert not bar.is_bar
    lines = sys.stderr.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "\r" not in sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert lines[0].startswith("prompts: 2 of 4 after 0 s, ")
    assert lines[0].endswith(" prompts/s")
    assert lines[-1].endswith(", step 2")


def test_what_is_quick_says_nothing_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress(3, "prompts", "prompt") as bar:
        work(bar)
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


def test_none_is_shown_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch, at_once: None) -> None:
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress(3, "prompts", "prompt", shown=False) as bar:
            work(bar)
        assert stream.getvalue() == ""


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "gone"), OSError(28, "full"), ValueError("closed"), SystemExit(3), Unspeakable()]
)
def test_what_cannot_be_written_is_lost_alone(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    at_once: None,
    error: BaseException,
    terminal: bool,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Broken(error, terminal))
    with Progress(3, "prompts", "prompt") as bar:
        work(bar)
    assert capsys.readouterr().out == "0\n1\n2\n"


def test_no_standard_error_at_all(monkeypatch: pytest.MonkeyPatch, at_once: None) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with Progress(3, "prompts", "prompt") as bar:
        work(bar)
    assert not can_overwrite(None)


def test_ctrl_c_goes_through(monkeypatch: pytest.MonkeyPatch, at_once: None) -> None:
    monkeypatch.setattr(sys, "stderr", Broken(KeyboardInterrupt(), False))
    with pytest.raises(KeyboardInterrupt), Progress(3, "prompts", "prompt") as bar:
        work(bar)


@pytest.mark.parametrize("stream", [None, Broken(BrokenPipeError(32, "gone"), False), Broken(SystemExit(3), True)])
def test_a_note_that_cannot_be_written_is_lost_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stream: Any
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    progress.note("fetching")
    assert capsys.readouterr().out == ""  # nor does it land among the answers


@pytest.mark.parametrize(
    ("environ", "terminal", "dim"),
    [
        ({"TERM": "xterm"}, True, True),
        ({"TERM": "xterm"}, False, False),
        ({"TERM": "dumb"}, True, False),
        ({"TERM": "xterm", "NO_COLOR": "1"}, True, False),
        ({"TERM": "xterm", "NO_COLOR": ""}, True, True),
    ],
)
def test_notes_are_dim_only_where_that_is_shown_and_wanted(
    monkeypatch: pytest.MonkeyPatch, environ: dict[str, str], terminal: bool, dim: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
    _note("a\x1b[31mb")
    written = sys.stderr.getvalue()  # type: ignore[attr-defined]
    escaped = "a\\x1b[31mb" if terminal else "a\x1b[31mb"
    assert written == (f"\x1b[2m{escaped}\x1b[0m\n" if dim else f"{escaped}\n")
