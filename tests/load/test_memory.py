"""A38: the memory of each process stays as it is over 200,000 requests."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.load.driver import connected, rss, run
from tests.server.mock_server import https_of
from tests.server.running import Running

REQUESTS, ROUNDS, AT_ONCE = 200_000, 8, 64
MOST = 8 << 20  # bytes that a process may grow by in four rounds: 84 for each request


async def ask(port: int, count: int, offset: int) -> None:
    """`count` requests over `AT_ONCE` connections that are kept; prompts, names and clients differ."""

    async def some(number: int) -> None:
        async with connected(port) as connection:
            for n in range(offset + number, offset + count, AT_ONCE):
                body = {"prompt": f"{n} of many", "max_tokens": 2, "user": f"user {n}", "request_id": f"r{n}"}
                status, answer = await connection.ask("/v1/completions", body)
                assert status == 200, answer
                assert json.loads(answer)["usage"]["completion_tokens"] in (1, 2)

    await asyncio.gather(*map(some, range(AT_ONCE)))


@pytest.mark.load
@pytest.mark.timeout(3600)
def test_a38_memory_is_flat_over_200_000_requests(server: Running) -> None:
    pids = [server.process.pid, *server.children()]
    seen: list[dict[int, int]] = []
    for number in range(ROUNDS):
        each = REQUESTS // ROUNDS
        run(ask(server.port, each, number * each))
        seen.append({pid: rss(pid) for pid in pids})
        print([f"{size / 1e6:.1f}" for size in seen[-1].values()], flush=True)
    # The least of three, as what the allocator keeps for a while goes up and down by more than a leak would. HTTP
    # processes are alike, and one that had few connections at first is where the others were by the end.
    first, last = ({pid: min(each[pid] for each in part) for pid in pids} for part in (seen[1:4], seen[-3:]))
    most = max(first[pid] for pid in https_of(server))
    begun = {pid: most if pid in https_of(server) else first[pid] for pid in pids}
    assert [pid for pid in pids if last[pid] - begun[pid] > MOST] == [], seen
    assert server.get("/health") == 200
