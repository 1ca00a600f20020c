"""A file that is replaced in one go: what else may stand at its path stays what it is."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

from nanoengine.cli.record import write_whole


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    page, link = tmp_path / "far" / "page.html", tmp_path / "link.html"
    page.write_text("old")
    link.symlink_to(page)
    write_whole(link, "new")
    assert link.is_symlink()
    assert page.read_text() == "new"
    assert sorted(tmp_path.rglob("*")) == sorted([page.parent, page, link])


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    """As a device is: replacing /dev/stdout would break every program of the machine."""
    pipe, read = tmp_path / "pipe", list[str]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    write_whole(pipe, "a page")
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    reader.join(60)
    assert read == ["a page"]
