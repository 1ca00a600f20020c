"""Streams: clients that leave or read slowly, pings, progress, and what is left behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from nanoengine.api.deltas import RequestDelta, SampleDelta
from nanoengine.service.client import ClientRequest, DeltaBox, RequestStream
from nanoengine.testing.fake_engine import Answer
from server.asgi import Connection, until
from server.support import Server

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
LONG = "x" * 5000


def run(use: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(use(), 60)

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"), [("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": ["a", "b"]})]
)
def test_a1_a_client_that_leaves_ends_its_requests(path: str, body: dict[str, Any], stream: bool) -> None:
    server = Server(LONG)
    fields = {"max_tokens": 4000, "n": 2, "stream": stream}

    async def use() -> None:
        for at in (0, 1, 50):  # queued, at the first token, in the middle
            before = len(server.engine.aborted)
            connection = Connection(server, path, {**body, **fields})
            await until(lambda before=before: len(server.engine._open) == len(body.get("prompt", "a")))  # type: ignore[misc]
            for _ in range(at):
                await asyncio.sleep(0)
            connection.leave()
            await connection.task
            assert server.engine._open == {}
            ended = {request_id for request_id, sample in server.engine.aborted[before:] if sample is None}
            assert len(ended) == len(body.get("prompt", "a"))
            assert b"[DONE]" not in b"".join(connection.chunks)
            assert server.engine.usages[-1].status == 499
            assert set(server.engine.usages[-1].finish_reasons) == {"abort"}

    run(use)


@pytest.mark.parametrize("stream", [False, True])
def test_a1_a_client_that_leaves_while_the_engine_takes_its_request(stream: bool) -> None:
    server = Server(LONG)
    plain, gate = server.engine.add, asyncio.Event()

    async def slow(request: ClientRequest) -> RequestStream:
        found = await plain(request)
        await gate.wait()
        return found

    server.engine.add = slow  # type: ignore[method-assign]

    async def use() -> None:
        body = {"prompt": ["a", "b"], "stream": stream, "max_tokens": 4000}
        connection = Connection(server, "/v1/completions", body)
        await until(lambda: server.engine._open)
        connection.leave()
        for _ in range(5):
            await asyncio.sleep(0)
        gate.set()
        await connection.task
        assert server.engine._open == {}
        assert len(server.engine.added) == 1  # the second prompt is not even begun

    run(use)


def test_a2_one_that_leaves_changes_nothing_for_the_others() -> None:
    server = Server(
        lambda request: Answer(samples=[[97 + request.prompt_token_ids[0] % 20] * 30], finish_reason="length")
    )

    async def use() -> None:
        several = [
            Connection(server, "/v1/completions", {"prompt": [i], "max_tokens": 30, "stream": True}) for i in range(60)
        ]
        await until(lambda: len(server.engine._open) == 60)
        for index in range(0, 60, 7):
            several[index].leave()
        await asyncio.gather(*(each.task for each in several))
        for index, each in enumerate(several):
            if index % 7:
                lines = [line.removeprefix("data: ") for line in each.text.split("\n\n")[:-2]]
                text = "".join(json.loads(line)["choices"][0]["text"] for line in lines)
                assert text == chr(97 + index % 20) * 30
                assert each.text.endswith("data: [DONE]\n\n")

    run(use)


def test_a3_many_that_leave_anywhere_leave_nothing_behind() -> None:
    server = Server("some words", delay=0)

    async def use() -> None:
        for wave in range(20):
            some = [
                Connection(server, "/v1/completions", {"prompt": "ab", "stream": bool(i % 2), "n": 1 + i % 3})
                for i in range(20)
            ]
            for turn, each in enumerate(some):
                for _ in range((turn * 7 + wave) % 23):
                    await asyncio.sleep(0)
                each.leave()
            await asyncio.gather(*(each.task for each in some))
        assert server.engine._open == {}
        assert len(asyncio.all_tasks()) == 1 + 1  # this one, and that of wait_for

    run(use)
    assert len(server.engine.usages) == len(server.engine.added) == 400


def test_a_slow_reader_gets_fewer_chunks_with_the_same_text() -> None:
    server = Server("abcdefghij" * 30)

    async def use() -> None:
        connection = Connection(server, "/v1/completions", {"prompt": "a", "stream": True, "max_tokens": 400})
        await until(lambda: len(connection.messages) > 5)
        connection.reading.clear()
        await until(lambda: not server.engine._open)  # all tokens have come
        connection.reading.set()
        await connection.task
        lines = [line.removeprefix("data: ") for line in connection.text.split("\n\n")[:-2]]
        texts = [json.loads(line)["choices"][0]["text"] for line in lines]
        assert "".join(texts) == "abcdefghij" * 30
        assert len(texts) < 20
        assert max(map(len, texts)) > 250

    run(use)


class Held:
    """An engine whose deltas come when the test says so."""

    def __init__(self, server: Server) -> None:
        self.boxes: dict[str, DeltaBox] = {}
        server.engine.add = self.add  # type: ignore[method-assign]

    async def add(self, request: ClientRequest) -> RequestStream:
        box = self.boxes[request.request_id] = DeltaBox()
        self.request = request
        return RequestStream(request.request_id, box, lambda index: None)

    def put(self, **fields: Any) -> None:
        for request_id, box in self.boxes.items():
            box.put(RequestDelta(request_id, **fields))


def test_pings_come_while_nothing_comes_and_only_then() -> None:
    server = Server(config={"ping_seconds": 0.01})
    held = Held(server)

    async def use() -> None:
        connection = Connection(server, "/v1/completions", {"prompt": "a", "stream": True})
        await until(lambda: held.boxes)
        assert connection.status is None  # an error could still have a status of its own
        while len(connection.chunks) < 2:
            await asyncio.sleep(0.005)
        assert connection.status == 200
        assert {*connection.chunks} == {b": ping\n\n"}
        held.put(samples=(SampleDelta(0, (104, 105), None, "stop"),), finished=True)
        await connection.task
        assert connection.text.endswith("data: [DONE]\n\n")

    run(use)


def test_a44_the_first_token_waits_for_no_timer() -> None:
    server = Server(config={"ping_seconds": 3600.0})
    held = Held(server)

    async def use() -> None:
        loop, timers = asyncio.get_running_loop(), []
        plain = loop.call_at
        connection = Connection(server, "/v1/completions", {"prompt": "a", "stream": True})
        await until(lambda: held.boxes)
        await asyncio.sleep(0)
        loop.call_at = lambda *args, **more: timers.append(args) or plain(*args, **more)  # type: ignore[func-returns-value, method-assign]
        held.put(samples=(SampleDelta(0, (104,)),))
        turns = 0
        while not connection.chunks:
            await asyncio.sleep(0)
            turns += 1
        assert turns < 10
        assert timers == []
        connection.leave()
        await connection.task

    run(use)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_prefill_progress_is_shown_if_asked_for(path: str) -> None:
    server = Server()
    held = Held(server)

    async def use(asked: bool) -> str:
        held.boxes.clear()
        body = {"prompt": "abcdef"} if path == "/v1/completions" else CHAT
        connection = Connection(server, path, {**body, "stream": True, "return_progress": asked})
        await until(lambda: held.boxes)
        assert held.request.progress == asked
        held.put(num_computed_tokens=2, num_cached_tokens=1)
        for _ in range(10):
            await asyncio.sleep(0)
        held.put(num_computed_tokens=4, num_cached_tokens=1)
        for _ in range(10):
            await asyncio.sleep(0)
        held.put(samples=(SampleDelta(0, (104,), None, "length"),), finished=True, num_cached_tokens=1)
        await connection.task
        return connection.text

    async def both() -> None:
        found = [json.loads(line.removeprefix("data: ")) for line in (await use(True)).split("\n\n")[:-2]]
        progress = [each["prompt_progress"] for each in found if "prompt_progress" in each]
        total = len(held.request.prompt_token_ids)
        assert progress == [{"total": total, "cache": 1, "processed": done} for done in (2, 4)]
        assert "prompt_progress" not in await use(False)

    run(both)


def test_an_aborted_request_ends_with_its_reason() -> None:
    server = Server(LONG)

    async def use() -> None:
        connection = Connection(
            server, "/v1/completions", {"prompt": ["a", "b"], "stream": True, "request_id": "r1", "max_tokens": 4000}
        )
        await until(lambda: len(connection.chunks) > 3)
        admin = Connection(server, "/admin/abort", {"request_id": "r1"})
        await admin.task
        assert json.loads(admin.text) == {"aborted": 2}
        await connection.task
        last = json.loads(connection.text.split("\n\n")[-3].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] == "abort"
        again = Connection(server, "/admin/abort", {"request_id": "r1"})
        await again.task
        assert again.status == 404

    run(use)


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_dies_ends_streams_with_an_error(stream: bool) -> None:
    server = Server(LONG)

    async def use() -> None:
        connection = Connection(server, "/v1/completions", {"prompt": "a", "stream": stream, "max_tokens": 4000})
        await until(lambda: server.engine._open)
        if stream:
            await until(lambda: len(connection.chunks) > 3)
        server.engine.die("it was killed")
        await connection.task
        assert "it was killed" in connection.text
        assert connection.status == (200 if stream else 503)
        assert '"finish_reason":"' not in connection.text

    run(use)
