"""The supervisor, with an engine and an application that are stubs: start, signals, restarts, exit statuses."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from nanoengine.server.config import RestartOptions
from nanoengine.server.restarts import Restarts
from tests.server.running import Running, alive, command_of, until

STUBS = Path(__file__).with_name("stubs.py")


class Stubs:
    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack

    def __call__(self, *, plugin_files: Any = (), engine: Any = (), silence: int = 60, **server: Any) -> Running:
        given = {
            "server": {"port": 0, "drain_timeout": 30.0, **server},
            "engine": {"folder": str(self.folder), **dict(engine)},
            "plugin_files": list(plugin_files),
            "silence": silence,
        }
        return self.stack.enter_context(Running([sys.executable, str(STUBS), "server", json.dumps(given)]))

    def engines(self) -> list[int]:
        """The processes of the engine's runs."""
        file = self.folder / "runs"
        return [int(pid) for pid in file.read_text().split()] if file.exists() else []


@pytest.fixture
def stubs(tmp_path: Path) -> Iterator[Stubs]:
    with ExitStack() as stack:
        yield Stubs(tmp_path, stack)


def https(server: Running) -> list[int]:
    return [pid for pid in server.children() if " http " in command_of(pid)]


def test_probes_answer_while_the_engine_starts(stubs: Stubs) -> None:
    server = stubs(workers=2, engine={"start": "held"})
    until(lambda: server.get("/live") == 200, lambda: server.log)
    for probe in ("/ready", "/health"):
        status, headers, body = server.ask(probe)
        assert (status, headers["retry-after"]) == (503, "5")
        assert json.loads(body)["status"] == "starting"
    until(lambda: json.loads(server.ask("/ready")[2]).get("phase") == "stub weights", lambda: server.log)
    status, headers, body = server.ask("/count?3", body={})
    assert (status, headers["retry-after"]) == (503, "5")
    assert "starting" in json.loads(body)["error"]["message"]
    (stubs.folder / "go").touch()
    server.until_ready()
    assert server.ask("/count")[0] == 200
    assert "INFO supervisor: the engine: stub weights" in server.log
    assert server.logged(r"stub is served at http://127\.0\.0\.1:\d+ seconds=[\d.]+")


def test_a7_sigterm_drains_and_ends_with_status_0(stubs: Stubs) -> None:
    server = stubs(workers=3).until_ready()
    with server.opened(f"/count?{stubs.folder / 'seen'}") as running:
        running.readline()
        for pid in (*server.children(), server.process.pid):  # as a service manager does
            os.kill(pid, signal.SIGTERM)
        _, headers, body = server.until_draining("/count")
        assert (headers["retry-after"], headers["connection"]) == ("1", "close")
        assert "shutting down" in json.loads(body)["error"]["message"]
        assert server.get("/live") == 200
        assert server.get("/health") == 200
        (stubs.folder / "seen").touch()
        numbers = [int(line.split()[1]) for line in running.read().splitlines()]
        assert numbers == list(range(1, len(numbers) + 1))  # it ended as if nothing had happened
    children = server.children()
    assert server.status() == 0
    assert not any(map(alive, children))


def test_a7_a_drain_that_takes_too_long_aborts(stubs: Stubs) -> None:
    server = stubs(drain_timeout=0.3).until_ready()
    with server.opened("/count?100000") as running:
        running.readline()
        server.signal(signal.SIGTERM)
        assert running.read().endswith(b"aborted\n")
    assert server.status() == 0
    assert "are aborted" in server.log


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a7_a_second_signal_ends_at_once(stubs: Stubs, number: signal.Signals, status: int) -> None:
    server = stubs(drain_timeout=1000.0).until_ready()
    children = server.children()
    with server.opened("/count?100000") as running:
        running.readline()
        server.signal(number)
        server.logged(f"{number.name}: requests have 1000 s to end")
        server.signal(number)
        assert server.status() == status
    assert not any(map(alive, children))


def test_a_signal_while_the_engine_starts_ends(stubs: Stubs) -> None:
    server = stubs(engine={"start": 1000.0})
    until(lambda: server.get("/live") == 200, lambda: server.log)
    server.signal(signal.SIGTERM)
    assert server.status() == 0


@pytest.mark.parametrize("stopped", [False, True])
def test_a_killed_supervisor_leaves_no_process(stubs: Stubs, stopped: bool) -> None:
    server = stubs(workers=2).until_ready()
    children = server.children()
    assert len(children) == 3
    if stopped:
        for pid in children:
            os.kill(pid, signal.SIGSTOP)
    server.process.kill()
    until(lambda: not any(map(alive, children)), lambda: f"{[command_of(pid) for pid in children]}")


def test_an_http_process_that_dies_is_started_again(stubs: Stubs) -> None:
    server = stubs(workers=2).until_ready()
    first = https(server)
    os.kill(first[0], signal.SIGKILL)
    server.logged("HTTP process . has ended: killed by SIGKILL")
    until(lambda: len(https(server)) == 2 and first[0] not in https(server), lambda: server.log)
    os.kill(first[1], signal.SIGKILL)  # now only the new one answers, with the same engine
    assert server.until_ready().ask("/count")[0] == 200
    assert len(stubs.engines()) == 1


def test_an_http_process_whose_connection_breaks_gets_another_to_the_same_engine(stubs: Stubs) -> None:
    server = stubs().until_ready()
    server.ask("/break")
    server.logged(r"http 0 has lost its connection to the engine, and gets another")
    server.until_ready()
    assert server.get("/health") == 200
    assert len(stubs.engines()) == 1


def test_a6_an_engine_that_is_killed_is_started_again(stubs: Stubs) -> None:
    server = stubs(workers=3, restart={"backoff": 0.1}).until_ready()
    before = https(server)
    with server.opened(f"/count?{stubs.folder / 'seen'}") as running:
        running.readline()
        os.kill(stubs.engines()[0], signal.SIGKILL)
        server.logged(r"the engine has ended: killed by SIGKILL.*starting it again in 0\.1 s")
        until(lambda: len(stubs.engines()) == 2, lambda: server.log)
        server.until_ready()
        (stubs.folder / "seen").touch()
        numbers = [int(line.split()[1]) for line in running.read().splitlines()]
        assert numbers == list(range(1, len(numbers) + 1))
    assert https(server) == before
    server.signal(signal.SIGTERM)
    assert server.status() == 0


@pytest.mark.parametrize(
    ("restart", "die", "runs", "starts", "says"),
    [
        (
            {"policy": "never"},
            3,
            [0],
            1,
            r"not started again \(server.restart: policy never.*the stub was asked to die",
        ),
        ({"policy": "on-failure"}, 0, [0], 1, "not started again"),
        ({"policy": "on-failure", "max_restarts": 2, "backoff": 0.01}, 3, [0, 1, 2], 3, "at most 2 in 600 s"),
        ({"policy": "always", "max_restarts": 0}, 0, [0], 1, "at most 0"),
    ],
)
def test_a6_an_engine_that_is_not_started_again_ends_the_server_with_status_1(
    stubs: Stubs, restart: Any, die: int, runs: list[int], starts: int, says: str
) -> None:
    server = stubs(restart=restart, engine={"die": die, "runs": runs})
    assert server.status() == 1
    assert server.logged(f"error: the engine has ended.*{says}")
    assert len(stubs.engines()) == starts


def test_the_policy_always_starts_an_engine_again_that_ended_with_status_0(stubs: Stubs) -> None:
    server = stubs(restart={"policy": "always", "backoff": 0.01}, engine={"die": 0, "runs": [0, 1]})
    until(lambda: len(stubs.engines()) == 3, lambda: server.log)
    server.until_ready()


def test_an_engine_that_cannot_start_ends_the_server_with_status_2(stubs: Stubs) -> None:
    server = stubs(engine={"fail": "no such model"})
    assert server.status() == 2
    assert server.log.endswith("error: no such model\n")
    assert len(stubs.engines()) == 1


def test_an_engine_that_starts_for_too_long_ends_the_server(stubs: Stubs) -> None:
    server = stubs(startup_timeout=1.0, engine={"start": 1000.0})
    assert server.status() == 2
    assert "error: it was not ready after 1 s (server.startup_timeout), in the phase '" in server.log
    assert not any(map(alive, stubs.engines()))


def test_a_restart_that_fails_counts_as_one(stubs: Stubs) -> None:
    server = stubs(restart={"max_restarts": 3, "backoff": 0.01}, engine={"fail": "no memory", "runs": [1, 2, 3]})
    server.until_ready()
    os.kill(stubs.engines()[0], signal.SIGKILL)
    assert server.status() == 1
    assert len(stubs.engines()) == 4
    assert "no memory" in server.log


@pytest.mark.parametrize(("file", "model"), [("unfit", ""), ("unfit later", " model")])
def test_a_configuration_that_the_http_process_cannot_serve_ends_the_server(
    stubs: Stubs, file: str, model: str
) -> None:
    server = stubs(plugin_files=[file])
    assert server.status() == 2
    assert server.log.endswith(f"error: the stub cannot serve this{model}\n")


def test_a6_an_engine_that_hangs_is_killed_and_started_again(stubs: Stubs) -> None:
    server = stubs(
        workers=2, plugin_files=["hanging"], restart={"hang_timeout": 2.0, "max_restarts": 1, "backoff": 0.1}
    )
    until(lambda: len(stubs.engines()) == 2, lambda: server.log)
    assert not alive(stubs.engines()[0])
    server.logged(r"the engine has ended: it made no progress for 2 s \(server.restart.hang_timeout\)")


def test_an_http_process_that_hangs_is_killed_and_started_again(stubs: Stubs) -> None:
    server = stubs(workers=2, silence=3).until_ready()
    first = https(server)
    os.kill(first[0], signal.SIGSTOP)
    server.logged("HTTP process . has ended: it did nothing for 3 s")
    until(lambda: len(https(server)) == 2 and first[0] not in https(server), lambda: server.log)
    server.until_ready()


def test_a_port_in_use_is_an_error_that_says_what_to_do(stubs: Stubs) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = stubs(port=port)
        assert server.status() == 2
        assert f"error: cannot bind 127.0.0.1:{port}: another program uses port {port}" in server.log
    assert stubs.engines() == []


def test_log_lines_are_json_objects_where_asked(stubs: Stubs) -> None:
    server = stubs(log_format="json").until_ready()
    server.signal(signal.SIGTERM)
    assert server.status() == 0
    lines = [json.loads(line) for line in server.log.splitlines()]
    assert {"time", "level", "process", "message"} <= lines[0].keys()
    assert [line["process"] for line in lines] == ["supervisor"] * len(lines)


def test_restarts_wait_longer_each_time_and_are_forgiven_after_the_window() -> None:
    restarts = Restarts(RestartOptions(max_restarts=3, window=100.0, backoff=1.0))
    assert [restarts.delay(1, now) for now in (0.0, 1.0, 2.0, 3.0)] == [1.0, 2.0, 4.0, None]
    assert restarts.delay(1, 101.5) == 2.0  # that of 2.0 still counts
    assert restarts.delay(0, 300.0) is None  # on-failure


def test_an_http_process_may_have_more_files_than_the_usual_limit() -> None:
    code = (
        "import resource\n"
        "from nanoengine.server.http_process import raise_file_limit\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))\n"
        "raise_file_limit()\n"
        "soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]\n"
        "assert soft == (65536 if hard == resource.RLIM_INFINITY else min(65536, hard)), soft\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
