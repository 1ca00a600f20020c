"""What a forked program sees is what it would see if it were started."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from forked_programs import Starter

SEES = """
import json, os, sys
json.dump({
    "main": [__name__, sys.modules["__main__"].__dict__ is globals()],
    "words": sys.argv, "path": sys.path, "folder": os.getcwd(), "environment": dict(os.environ),
    "descriptors": sorted(fd for fd in map(int, os.listdir("/proc/self/fd")) if fd < 512),
    "command": open("/proc/self/cmdline").read().rstrip("\\0").split("\\0"),
    "parent": os.getppid(), "group": os.getpgrp() == os.getpid(), "session": os.getsid(0) == os.getpid(),
    "given": sys.stdin.read(),
}, sys.stdout)
print("an error", file=sys.stderr)
"""
FORKED = "import sys; print('torch' in sys.modules)"


def ran(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, **options)


@pytest.mark.parametrize("safe", [[], ["-P"]])
@pytest.mark.parametrize("how", ["code", "script", "module"])
@pytest.mark.parametrize("group", [{}, {"process_group": 0}, {"start_new_session": True}])
def test_a_forked_program_sees_what_a_started_one_does(
    how: str, safe: list[str], group: Any, starter: Starter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sees.py").write_text(SEES)
    words = {"code": ["-c", SEES], "script": [str(tmp_path / "sees.py")], "module": ["-m", "sees"]}[how]
    environment = {**os.environ, "COLOUR": "blue", "PYTHONPATH": str(tmp_path)}
    ours, theirs = socket.socketpair()
    with ours, theirs:
        options = {"cwd": tmp_path, "env": environment, "pass_fds": [theirs.fileno()], "input": "a word", **group}
        started = ran(*safe, *words, "an", "argument", **options)
        monkeypatch.setattr(subprocess, "_fork_exec", starter)
        assert ran("-c", FORKED).stdout == "True\n"
        forked = ran(*safe, *words, "an", "argument", **options)
    assert (forked.returncode, forked.stderr) == (started.returncode, started.stderr) == (0, "an error\n")
    assert json.loads(forked.stdout) == json.loads(started.stdout)


def test_how_a_forked_program_ends(forked: None) -> None:
    assert [ran("-c", f"raise SystemExit({code!r})").returncode for code in (None, 0, 7, "words")] == [0, 0, 7, 1]
    failed = ran("-c", "1 / 0")
    assert failed.returncode == 1
    assert failed.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert ran("-c", f"import os; os.kill(os.getpid(), {int(signal.SIGTERM)})").returncode == -signal.SIGTERM
    ended = ran("-c", "import atexit, threading; atexit.register(print, 2); threading.Timer(0.1, print, [1]).start()")
    assert (ended.returncode, ended.stdout) == (0, "1\n2\n")


def test_what_a_forked_program_starts_is_forked_and_its_child(forked: None) -> None:
    again = "import os, sys; print('torch' in sys.modules, os.getppid())"
    code = f"import os, subprocess, sys; print(os.getpid()); subprocess.run([sys.executable, '-c', {again!r}])"
    parent, child = sorted(ran("-c", code).stdout.splitlines())
    assert child == f"True {parent}"


def test_what_would_import_otherwise_is_started(forked: None) -> None:
    assert ran("-c", FORKED, env={**os.environ, "OMP_NUM_THREADS": "3"}).stdout == "False\n"
    assert ran("-I", "-c", FORKED).stdout == "False\n"
