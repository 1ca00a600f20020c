"""What the HTTP process costs: CPU time for each chunk, and how long others wait while it does something long."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from tests.load.driver import Streamed, connected, cpu_seconds, run, stream
from tests.server.mock_server import https_of
from tests.server.running import Running

pytestmark = [pytest.mark.load, pytest.mark.alone, pytest.mark.timeout(1200)]


@pytest.mark.parametrize(("server", "parts", "most"), [("ids", "ids", 15e-6), (1, "text", 25e-6)], indirect=["server"])
def test_http_cpu_a_chunk(server: Running, parts: str, most: float) -> None:
    """`ids`: of a model without a tokenizer; `text`: chat, detokenised and parsed. The best of three, as others use the
    CPU."""
    body: dict[str, Any] = {"max_tokens": 1000, "ignore_eos": True, "temperature": 0}
    if parts == "ids":
        path, body = "/v1/completions", body | {"prompt": [104, 105], "return_token_ids": True}
    else:
        path, body = "/v1/chat/completions", body | {"messages": [{"role": "user", "content": "hi"}]}
    [pid] = https_of(server)

    async def all_of(count: int) -> list[Streamed]:
        return await asyncio.gather(*(stream(server.port, path, body) for _ in range(count)))

    run(all_of(64))
    costs = []
    for _ in range(3):
        before = cpu_seconds(pid)
        found = run(all_of(64))
        assert {(one.status, one.done) for one in found} == {(200, True)}
        chunks = sum(one.chunks for one in found)
        costs.append((cpu_seconds(pid) - before) / chunks)
        print(f"{parts}: {chunks} chunks, {costs[-1] * 1e6:.1f} us each", flush=True)
        assert chunks > 64 * 500, "slow readers' chunks are merged: too few to measure"
    assert min(costs) <= most


@pytest.mark.parametrize("server", [1], indirect=True)
def test_a27_live_answers_while_eight_prompts_of_1_mb_are_tokenised(server: Running) -> None:
    """99 of 100 within 50 ms; so does a stream's next chunk."""
    text = "many words of a prompt " * 45_000  # 1 MB

    async def probe(done: asyncio.Event) -> list[float]:
        waits = []
        async with connected(server.port) as connection:
            while not done.is_set():
                began = time.perf_counter()
                assert (await connection.ask("/live"))[0] == 200
                waits.append(time.perf_counter() - began)
                await asyncio.sleep(0.002)
        return waits

    async def tokenise(path: str, body: bytes) -> int:
        async with connected(server.port) as connection:
            return (await connection.ask(path, body))[0]

    async def both() -> tuple[list[float], list[int]]:
        done = asyncio.Event()
        probing = asyncio.create_task(probe(done))
        prompts = [("/tokenize", json.dumps({"prompt": text}).encode())] * 8
        found = await asyncio.gather(*(tokenise(*prompt) for prompt in prompts))
        done.set()
        return await probing, found

    waits, found = run(both())
    assert found == [200] * 8
    waits.sort()
    worst = waits[int(len(waits) * 0.99)]
    print(
        f"/live: {len(waits)} answers, p50 {waits[len(waits) // 2] * 1e3:.1f} ms, p99 {worst * 1e3:.1f} ms", flush=True
    )
    assert len(waits) > 100
    assert worst < 0.05
