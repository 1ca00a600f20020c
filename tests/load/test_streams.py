"""A thousand streams at once: each gets its own tokens to the end, and what is counted is what was sent."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from typing import Any

import pytest

from tests.load.driver import Streamed, run, stream
from tests.server.running import Running, until

STREAMS, TOKENS = 1000, 64


def asked(number: int) -> tuple[str, dict[str, Any]]:
    """Ten kinds of requests; a prompt is one of 50."""
    text = f"{number % 50} once upon a time"
    more: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True, "stream_options": {"include_usage": True}}
    if number % 5 == 1:
        more |= {"temperature": 1.0, "seed": number % 50}
    if number % 5 == 2:
        more |= {"n": 2, "temperature": 1.0, "seed": number % 50}
    if number % 2:
        return "/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **more}
    return "/v1/completions", {"prompt": text, **more}


async def together(port: int, count: int, leaving: int = 0) -> list[Streamed]:
    """The first `count` requests at once; every `leaving`th closes its connection in the middle."""
    work = [
        stream(port, *asked(n), leave_after=1 + n % 20 if leaving and n % leaving == 0 else 0) for n in range(count)
    ]
    return await asyncio.gather(*work)


def counters(server: Running) -> Counter[str]:
    """Metrics, summed over their labels; requests those of streams alone."""
    found: Counter[str] = Counter()
    for name, labels, value in re.findall(
        r"^nanoengine_(\w+)({[^}]*})? (\S+)$", server.ask("/metrics")[2].decode(), re.M
    ):
        if name != "requests_total" or "completions" in labels:
            found[name] += float(value)
    return found


@pytest.mark.load
@pytest.mark.timeout(1200)
def test_1000_streams_are_all_accounted_for(server: Running) -> None:
    load, counted = json.loads(server.ask("/load")[2]), counters(server)
    alone = run(together(server.port, 50))  # each kind of request once
    found = run(together(server.port, STREAMS, leaving=10))
    whole = [one for n, one in enumerate(found) if n % 10]
    assert len(whole) == STREAMS * 9 // 10
    assert [one for one in found if one.status != 200 or one.error] == []
    for number, one in enumerate(found):
        expected, samples = alone[number % 50], 2 if number % 5 == 2 else 1
        if number % 10:
            assert one.done, number
            assert (one.texts, one.reasons) == (expected.texts, expected.reasons), number
            assert set(one.reasons) == set(range(samples))
            assert one.usage is not None
            assert one.usage["completion_tokens"] == TOKENS * samples
            assert one.usage["prompt_tokens"] == expected.usage["prompt_tokens"]
        else:
            assert not one.done
            assert all(expected.texts[index].startswith(text) for index, text in one.texts.items()), number

    def idle() -> bool:
        now = json.loads(server.ask("/load")[2])
        return all(now[name] == load[name] for name in ("running", "waiting", "free_blocks"))

    until(idle, lambda: f"{server.ask('/load')[2]!r} was {load}")

    def increase() -> Counter[str]:
        return counters(server) - counted

    until(lambda: increase()["requests_total"] == STREAMS + 50, lambda: str(increase()))
    sums = {name: sum(one.usage[name] for one in (*alone, *whole)) for name in ("prompt_tokens", "completion_tokens")}
    left = sum(len(one.texts) for one in found) - sum(len(one.texts) for one in whole)
    assert left > 0
    assert increase()["samples_total"] >= sum(len(one.reasons) for one in (*alone, *whole)) + left
    assert increase()["prompt_tokens_total"] >= sums["prompt_tokens"]
    assert sums["completion_tokens"] < increase()["generation_tokens_total"]
    assert increase()["generation_tokens_total"] <= sums["completion_tokens"] + 2 * TOKENS * (STREAMS // 10)
    assert server.get("/health") == 200
