"""`nanoengine serve` with real processes on the mock model: health, restarts, drain, several HTTP processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanoengine.testing.mock_model import mark
from tests.server.mock_plugin import DIES, HANGS
from tests.server.mock_server import MockServer, engine_of, events, https_of, metric, mock_server
from tests.server.running import Running, alive, until

DEADLINE = 2.0  # health_deadline of the servers here
PROMPT = "Once upon a time"
SCHEMA = {
    "type": "object",
    "properties": {"numbers": {"type": "array", "items": {"enum": [1, 22, 333]}, "minItems": 30, "maxItems": 30}},
    "required": ["numbers"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "numbers", "schema": SCHEMA, "strict": True}}
STREAMS: Sequence[tuple[str, dict[str, Any]]] = (
    ("/v1/completions", {"prompt": PROMPT, "temperature": 0}),
    ("/v1/completions", {"prompt": f"2 {PROMPT}", "temperature": 1.5, "seed": 7, "n": 2}),
    ("/v1/completions", {"prompt": f"3 {PROMPT}", "temperature": 1.0, "seed": 8, "presence_penalty": 0.5}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": PROMPT}], "temperature": 1.0, "seed": 9}),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": PROMPT}], "response_format": FORM, "max_tokens": 4000},
    ),
)
"""Requests whose bytes must be the same if their engine dies in the middle of them."""


def start(folder: Path, workers: int) -> MockServer:
    options = (f"workers={workers}", f"health_deadline={DEADLINE}", "restart.backoff=0.1", "drain_timeout=0.5")
    return mock_server(folder, *(f"server.{each}" for each in options), slow=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MockServer]:
    with start(tmp_path_factory.mktemp("two"), 2) as running:
        running.until_ready()
        yield running


def stream(
    server: Running, path: str, body: Any, at: int = 0, act: Callable[[], Any] | None = None
) -> list[dict[str, Any]]:
    """The events of a stream without what differs between two equal requests. After `at` of them, `act` is called."""
    whole = {"max_tokens": 300, "ignore_eos": "response_format" not in body, "stream": True} | body
    found = []
    with server.opened(path, whole | {"stream_options": {"include_usage": True}}) as response:
        assert response.status == 200, response.read()
        for number, event in enumerate(events(response)):
            assert "error" not in event, event
            found.append({key: value for key, value in event.items() if key not in ("id", "created")})
            if act is not None and number == at:
                act()
    return found


def answers(found: Sequence[dict[str, Any]]) -> dict[int, tuple[str, str | None]]:
    """(text, finish reason) of each sample."""
    texts, reasons = dict[int, str](), dict[int, str | None]()
    for choice in (choice for event in found for choice in event["choices"]):
        text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
        texts[choice["index"]] = texts.get(choice["index"], "") + text
        reasons[choice["index"]] = choice["finish_reason"] or reasons.get(choice["index"])
    return {index: (text, reasons[index]) for index, text in texts.items()}


def completion(server: Running, **body: Any) -> Any:
    status, _, text = server.ask("/v1/completions", {"prompt": PROMPT, "max_tokens": 16, "ignore_eos": True, **body})
    assert status == 200, text
    return json.loads(text)


def streams_over_a_death(server: MockServer) -> None:
    """A4, A6, A45: the engine is killed while streams of all kinds run; they go on, and health says what happens."""
    with ThreadPoolExecutor(len(STREAMS)) as threads:
        plain = [answers(found) for found in threads.map(lambda each: stream(server, *each), STREAMS)]
    server.steps_take(0.1)  # a stream takes half a minute: it is open when its engine is killed
    threads, running = ThreadPoolExecutor(len(STREAMS)), threading.Barrier(len(STREAMS) + 1)
    going_on = [threads.submit(stream, server, path, body, 1, running.wait) for path, body in STREAMS]
    running.wait()
    pid = engine_of(server)
    os.kill(pid, signal.SIGKILL)
    server.steps_take(0)
    with server.one_process() as ask:
        until(lambda: ask("/health")[0] == 503, lambda: server.log)  # at once: the next engine is there in seconds
        assert (ask("/live")[0], ask("/ready")[0]) == (200, 503)
        status, headers, body = ask("/v1/completions", {"prompt": PROMPT, "max_tokens": 4})
        assert (status, json.loads(body)["error"]["code"]) == (503, "unavailable")
        assert int(headers["retry-after"]) >= 1
    found = [each.result() for each in going_on]
    threads.shutdown()
    server.until_ready()
    assert engine_of(server) != pid
    assert "the engine has ended: killed by SIGKILL" in server.log
    assert json.loads(server.ask("/load")[2])["prompt_tokens"] > 0  # of the new engine: streams have gone on there
    assert list(map(answers, found)) == plain
    assert len(json.loads(plain[-1][0][0])["numbers"]) == 30
    for number in range(len(STREAMS) - 1):
        assert found[number][-1]["usage"]["completion_tokens"] == 300 * len(plain[number])


def test_a4_a6_a45_streams_go_on_when_the_engine_dies_with_several_processes(server: MockServer) -> None:
    streams_over_a_death(server)


def test_a4_health_is_503_within_the_deadline_of_a_stopped_engine(server: Running) -> None:
    for path in ("/live", "/ready", "/health"):
        until(lambda path=path: server.get(path) == 200, lambda: server.log)  # type: ignore[misc]
    pid = engine_of(server)
    os.kill(pid, signal.SIGSTOP)
    try:
        for path in ("/health", "/ready"):  # another HTTP process may know it a little later
            until(lambda path=path: server.get(path) == 503, lambda: server.log)  # type: ignore[misc]
        assert server.get("/live") == 200
    finally:
        os.kill(pid, signal.SIGCONT)
    server.until_ready()
    assert engine_of(server) == pid


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a1_a_closed_connection_ends_its_request_in_the_engine(server: Running, path: str, stream: bool) -> None:
    def load() -> tuple[int, bool]:
        found = json.loads(server.ask("/load")[2])
        return found["requests"], found["free_blocks"] == found["num_blocks"]

    given = {"prompt": PROMPT} if path == "/v1/completions" else {"messages": [{"role": "user", "content": PROMPT}]}
    body = {**given, "max_tokens": 100_000, "ignore_eos": True, "stream": stream}
    text = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
        connection.sendall(head.encode() + text)
        if stream:
            assert b" 200 " in connection.recv(4096)
        until(lambda: load()[0] == 1, lambda: f"{load()} {server.log}")
    until(lambda: load() == (0, True), lambda: f"{load()} {server.log}")


def test_a35_metrics_of_any_process_are_the_whole(server: Running) -> None:
    def counted() -> float:
        status, _, body = server.ask("/metrics")
        assert status == 200
        return metric(body.decode(), "nanoengine_generation_tokens_total")

    before = counted()
    for _ in range(6):  # each with a connection of its own: they spread over the processes
        completion(server, max_tokens=5)
    until(lambda: counted() == before + 30, lambda: f"{before} {counted()}")
    assert {counted() for _ in range(9)} == {before + 30}


def test_an_http_process_that_dies_frees_its_requests(server: Running) -> None:
    body = {"prompt": PROMPT, "max_tokens": 100_000, "ignore_eos": True, "stream": True}
    with server.opened("/v1/completions", body) as response:
        response.readline()
        assert json.loads(server.ask("/load")[2])["requests"] == 1
        victims = https_of(server)
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        until(lambda: len(set(https_of(server)) - set(victims)) == len(victims), lambda: server.log)
        server.until_ready()
    until(lambda: json.loads(server.ask("/load")[2])["requests"] == 0, lambda: server.ask("/load")[2])


def test_one_process_survives_its_engine_and_a7_aborts_what_does_not_end_in_time(tmp_path: Path) -> None:
    with start(tmp_path, 1) as server:
        server.until_ready()
        streams_over_a_death(server)
        children = server.children()
        body = {"prompt": PROMPT, "max_tokens": 100_000, "ignore_eos": True, "stream": True}
        with server.opened("/v1/completions", body) as response:
            response.readline()
            server.signal(signal.SIGTERM)
            rest = response.read()
        assert b'"error":{"message":"the server is shutting down"' in rest
        assert server.status() == 0
        assert "requests still run after 0.5 s (server.drain_timeout) and are aborted" in server.log
        assert not any(map(alive, children))


def test_a6_an_engine_that_dies_and_is_not_started_again_ends_the_server_and_its_streams(tmp_path: Path) -> None:
    with mock_server(tmp_path, "server.restart.policy=never") as server:
        server.until_ready()
        children = server.children()
        body = {"prompt": PROMPT, "max_tokens": 100_000, "ignore_eos": True, "stream": True}
        with server.opened("/v1/completions", body) as response:
            response.readline()
            os.kill(engine_of(server), signal.SIGKILL)
            rest = response.read()
        assert b'"error":{"message":"the engine has ended, and is not started again' in rest
        assert b"killed by SIGKILL" in rest
        assert server.status() == 1
        assert server.logged(r"error: the engine has ended, and is not started again.*killed by SIGKILL")
        assert not any(map(alive, children))


def test_a5_a_long_prefill_is_healthy_and_a7_sigterm_drains(tmp_path: Path) -> None:
    with mock_server(tmp_path, "server.health_deadline=2", "server.workers=2", slow=True) as server:
        server.until_ready()
        server.steps_take(0.06)
        children, seen = server.children(), list[int]()
        prompt = [1 + n % 200 for n in range(100_000)]
        answered = list[int]()
        thread = threading.Thread(
            target=lambda: answered.append(server.ask("/v1/completions", {"prompt": prompt, "max_tokens": 1})[0])
        )
        began = time.monotonic()
        thread.start()
        while thread.is_alive():
            seen.append(server.get("/health"))
            time.sleep(0.05)
        thread.join()
        assert time.monotonic() - began > 2.8  # 49 steps without an output, longer than the deadline
        assert (answered, set(seen)) == ([200], {200})

        def drain() -> None:
            server.signal(signal.SIGTERM)
            _, headers, _ = server.until_draining("/v1/completions", {"prompt": PROMPT, "max_tokens": 4})
            assert "retry-after" in headers
            assert server.get("/health") == 200
            server.steps_take(0)

        server.steps_take(0.2)  # the stream is open until it has been seen that the server drains
        found = stream(server, "/v1/completions", {"prompt": PROMPT, "max_tokens": 60}, at=3, act=drain)
        assert found[-1]["usage"]["completion_tokens"] == 60
        assert server.status() == 0
        assert not any(map(alive, children))


@pytest.mark.slow
def test_a_request_that_ends_or_hangs_its_engine_fails_alone(tmp_path: Path) -> None:
    options = ("health_deadline=1", "restart.hang_timeout=1", "restart.backoff=0.01", "workers=2")
    with mock_server(tmp_path, *(f"server.{each}" for each in options), slow=True) as server:
        path, body = STREAMS[1]
        plain = answers(stream(server.until_ready(), path, body))
        found = list[dict[str, Any]]()
        server.steps_take(0.01)  # it runs when the engine dies
        thread = threading.Thread(target=lambda: found.extend(stream(server, path, body)))
        thread.start()
        status, _, text = server.ask("/v1/completions", {"prompt": [DIES, 1, 2], "max_tokens": 4})
        assert (status, json.loads(text)["error"]["code"]) == (503, "unavailable")
        assert "engines have ended while this request ran" in json.loads(text)["error"]["message"]
        thread.join()
        assert answers(found) == plain
        died = "the engine has ended: killed by SIGSEGV"
        until(lambda: server.log.count(died) >= 4, lambda: server.log)  # a stream may end before the last is logged
        assert server.log.count(died) == 4

        server.until_ready()
        pid = engine_of(server)
        with server.opened("/v1/completions", {"prompt": [HANGS, 1], "stream": True}, wait=False):
            until(lambda: server.get("/health") == 503, lambda: server.log)
            assert server.get("/live") == 200
        until(lambda: not alive(pid), lambda: server.log)  # the client is gone: its request is not tried again
        assert completion(server.until_ready(), prompt=[1, 2, 3])
        assert "it made no progress for 1 s (server.restart.hang_timeout)" in server.log


def test_a_model_that_is_not_there_ends_the_command_with_status_2(tmp_path: Path) -> None:
    with mock_server(tmp_path, f"model={tmp_path}/nothing") as server:
        assert server.status() == 2
        last = server.log.splitlines()[-1]
        assert last.startswith("error: ")
        assert "nothing" in last


def test_embeddings_and_scores_are_those_of_the_models_hidden_states(server: Running) -> None:
    """In each of the HTTP processes, in steps beside streams."""

    def hidden(ids: Sequence[int]) -> list[int]:
        """Of the last token: see `MockModel`."""
        history = int(mark(torch.tensor(ids), torch.arange(len(ids))).sum()) % (1 << 40)
        return [history >> 20, history % (1 << 20)]

    given = [[1, 2, 3], [4, 5], [6] * 3000]
    for _ in range(6):
        status, _, data = server.ask("/v1/embeddings", {"input": given, "normalize": False})
        assert status == 200, data
        found = json.loads(data)
        assert [each["embedding"] for each in found["data"]] == [hidden(ids) for ids in given]
        assert found["usage"]["prompt_tokens"] == 3005
    status, _, data = server.ask("/v1/score", {"text_1": given[0], "text_2": given[1:]})
    assert status == 200, data
    a, *others = (np.array(hidden(ids), np.float64) for ids in given)
    want = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for b in others]
    assert [each["score"] for each in json.loads(data)["data"]] == pytest.approx(want, abs=1e-6)
