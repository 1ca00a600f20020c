"""The code blocks of README.md and docs/cli.md, executed: with a tiny model in the place of the one they name."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from nanoengine.cli.app import app
from nanoengine.cli.chat import COMMANDS
from nanoengine.testing.checkpoints import tiny_llama

pytestmark = pytest.mark.usefixtures("forked")

ROOT = Path(__file__).parents[2]
PAGES = {name: (ROOT / name).read_text("utf-8") for name in ("README.md", "docs/cli.md")}
NOT_HERE = ("nanoengine bench", "nanoengine serve")  # takes minutes; runs until it is ended: tests/server
DATE = "2026-11-21_10-30-00"


def blocks(page: str, *languages: str) -> list[str]:
    return [
        text for language, text in re.findall(r"^```(\w+)\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)
        if language in languages
    ]  # fmt: skip


def commands(page: str) -> Iterator[tuple[str, list[str]]]:
    """(file on standard input, arguments) of every `nanoengine` line."""
    for line in "".join(blocks(page, "sh")).splitlines():
        if "nanoengine " in line and not line.startswith(("make", *NOT_HERE)):
            before, _, after = line.rpartition("nanoengine ")
            yield before.removeprefix("cat ").rstrip("| "), shlex.split(after, comments=True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files of the pages, where every model is the tiny one."""
    tiny = tiny_llama(tmp_path / "tiny", with_tokenizer=True, max_position_embeddings=600)
    for home in ("llm", "build"):  # an engine's, and the doctor's
        monkeypatch.setattr(f"nanoengine.{home}.find_model", lambda *arguments: tiny)
    fake = (sys.executable, str(Path(__file__).with_name("fake_process.py")))
    monkeypatch.setattr("nanoengine.lab.cli.multirun._NANOENGINE", fake)
    clock = type("Clock", (), {"now": staticmethod(lambda: type("T", (), {"strftime": lambda self, form: DATE})())})
    monkeypatch.setattr("nanoengine.lab.cli.multirun.datetime", clock)
    (tmp_path / "path/to").mkdir(parents=True)
    (tmp_path / "path/to/folder-or-file.gguf").symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    for page in PAGES:
        for text in blocks(page, "yaml", "text", "python"):
            if name := re.match(r"# (?:file: )?(\S+\.\w+)\n", text):
                (tmp_path / name[1]).write_text(text[name.end() :], "utf-8")
    return tmp_path


@pytest.mark.parametrize("page", PAGES)
def test_commands(page: str, folder: Path) -> None:
    done = []
    for source, arguments in commands(page):
        typed = "hello\n/stats\n" if arguments[0] == "chat" else (folder / source).read_text() if source else None
        result = CliRunner().invoke(app, arguments, input=typed)
        assert result.exit_code == 0, f"{arguments}: {result.stderr}"
        done.append(" ".join(arguments[:1]))
    assert {"run", "chat"} <= set(done)
    assert len(list(folder.glob(f"multirun/{DATE}/*/results.jsonl"))) == 4


def test_python_of_the_readme(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [code] = [text for text in blocks("README.md", "python") if not text.startswith("# ")]
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert "EngineStats(" in capsys.readouterr().out


def test_every_command_of_chat_is_on_the_page() -> None:
    table = re.findall(r"^\| `(/\w+)", PAGES["docs/cli.md"], re.MULTILINE)
    assert sorted(table) == sorted(COMMANDS)
