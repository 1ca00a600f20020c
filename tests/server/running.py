"""A server in a process of its own, for tests."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SOURCE = "forked_programs.py"
SECONDS = 60.0  # until something must have happened, on a machine with much else to do


class Running:
    """A server's process. Its log goes to a file."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        self.log_file = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as this object
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.log_file,
            start_new_session=True,
            env={**os.environ, **(env or {})},
        )

    @property
    def log(self) -> str:
        self.log_file.flush()
        data = os.pread(self.log_file.fileno(), 1 << 20, 0)
        return data.decode(errors="replace")

    def logged(self, pattern: str) -> re.Match[str]:
        """Waits for a line of the log."""
        return until(lambda: re.search(pattern, self.log), lambda: f"no {pattern!r} in the log:\n{self.log}")

    @property
    def port(self) -> int:
        return int(self.logged(r"http://(?:\[?[\w:.]+\]?):(\d+)")[1])

    def ask(
        self, path: str, body: Any = None, headers: Mapping[str, str] | None = None, timeout: float = SECONDS
    ) -> tuple[int, Mapping[str, str], bytes]:
        """(status, headers in lower case, body) of one request with a connection of its own."""
        with self.opened(path, body, headers, timeout) as response:
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()

    def get(self, path: str) -> int:
        """The status of a probe; 0 if it cannot connect."""
        try:
            return self.ask(path)[0]
        except OSError:
            return 0

    @contextlib.contextmanager
    def opened(
        self,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = SECONDS,
        *,
        wait: bool = True,
    ) -> Iterator[http.client.HTTPResponse]:
        """A request, closed at the end; without `wait`, its answer is not waited for."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            given = {"content-type": "application/json", **(headers or {})}
            text = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", path, text, given)
            yield connection.getresponse() if wait else http.client.HTTPResponse(connection.sock)
        finally:
            connection.close()

    @contextlib.contextmanager
    def one_process(self) -> Iterator[Callable[..., tuple[int, Mapping[str, str], bytes]]]:
        """`ask` on one connection: all answers are of the same HTTP process. Another may know later what that knows."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        connection.connect()
        connection.auto_open = 0  # a connection that the server closes is an error: the next might be another process'

        def ask(path: str, body: Any = None) -> tuple[int, Mapping[str, str], bytes]:
            text = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", path, text, {"content-type": "application/json"})
            response = connection.getresponse()
            return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()

        with contextlib.closing(connection):
            yield ask

    def until_ready(self) -> Running:
        until(lambda: self.get("/ready") == 200 or self.process.poll() is not None, lambda: self.log)
        assert self.process.poll() is None, self.log
        return self

    def until_draining(self, path: str, body: Any = None) -> tuple[int, Mapping[str, str], bytes]:
        """The first 503 that such a request is answered with: one HTTP process may be told to drain before another."""
        until(lambda: self.get("/ready") == 503, lambda: self.log)
        answer: tuple[int, Mapping[str, str], bytes] = until(
            lambda: refused if (refused := self.ask(path, body))[0] == 503 else None, lambda: self.log
        )
        return answer

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def status(self) -> int:
        return self.process.wait(SECONDS)

    def children(self) -> list[int]:
        """The processes that the server has started, and theirs."""
        return descendants(self.process.pid)

    def end(self) -> None:
        """Kills it, and all that it has started."""
        pids = [self.process.pid, *self.children()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.log_file.close()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def until(condition: Any, why: Any, seconds: float = SECONDS) -> Any:
    """Waits until the condition holds; returns what it gave."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, why()
        time.sleep(0.01)
    return found


def descendants(pid: int) -> list[int]:
    """Without those that only wait to be forked; each ends with its parent."""
    parents = dict[int, list[int]]()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, left = list[int](), [pid]
    while left:
        below = [each for each in parents.get(left.pop(), []) if SOURCE not in command_of(each)]
        found += below
        left += below
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""
