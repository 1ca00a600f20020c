"""What may wait: bounds by requests, by tokens and by client, and when a refused client is to come back."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanoengine import LLM
from nanoengine.api.errors import ConfigError, RequestError
from nanoengine.service.client import ClientRequest, ServiceStats
from nanoengine.service.limits import QueueLimits
from nanoengine.service.local import LocalClient
from nanoengine.service.options import LimitOptions
from nanoengine.service.parts import service_of
from nanoengine.testing import mock_model
from tests.service.support import pass_deadlines, request, until


class Waiting:
    """A queue without an engine, which checks each request as the service does."""

    def __init__(self, options: LimitOptions) -> None:
        self.now = 1000.0
        self.limits = QueueLimits(options, lambda: self.now)
        self.queue: deque[ClientRequest] = deque()
        self.left: list[ClientRequest] = []
        self.added = 0

    def stats(self) -> ServiceStats:
        by_client: dict[str, int] = {}
        for each in self.queue:
            by_client[each.client] = by_client.get(each.client, 0) + each.params.n
        return ServiceStats(
            queued_requests=sum(each.params.n for each in self.queue),
            queued_tokens=sum(each.params.n * len(each.prompt_token_ids) for each in self.queue),
            queued_by_client=by_client,
            started_requests=sum(each.params.n for each in self.left),
            started_tokens=sum(each.params.n * len(each.prompt_token_ids) for each in self.left),
        )

    def add(self, client: str = "", n: int = 1, tokens: int = 1) -> RequestError | None:
        self.added += 1
        asked = request(f"r{self.added}", [1] * tokens, client=client, n=n)
        try:
            self.limits.check(asked, self.stats())
        except RequestError as error:
            return error
        self.queue.append(asked)
        return None

    def start(self) -> None:
        if self.queue:
            self.left.append(self.queue.popleft())


limit = st.one_of(st.none(), st.integers(1, 12))
options = st.builds(
    LimitOptions,
    max_queued_requests=limit,
    max_queued_tokens=st.one_of(st.none(), st.integers(1, 40)),
    max_queued_per_client=limit,
)
events = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.sampled_from("ab"), st.sampled_from([1, 1, 1, 3]), st.integers(1, 9)),
        st.tuples(st.just("start")),
        st.tuples(st.just("wait"), st.floats(0, 100)),
    ),
    max_size=60,
)


@given(options, events)
def test_a29_a_queue_never_grows_over_its_bounds_and_nothing_is_refused_for_less(
    options: LimitOptions, events: list[Any]
) -> None:
    waiting = Waiting(options)
    for kind, *about in events:
        if kind == "start":
            waiting.start()
        elif kind == "wait":
            waiting.now += about[0]
        else:
            client, n, tokens = about
            before = waiting.stats()
            error = waiting.add(client, n, tokens)
            theirs = before.queued_by_client.get(client, 0)
            fits = (
                not before.queued_requests
                or (
                    below(before.queued_requests + n, options.max_queued_requests)
                    and below(before.queued_tokens + n * tokens, options.max_queued_tokens)
                )
            ) and (not theirs or below(theirs + n, options.max_queued_per_client))
            assert (error is None) == fits
            if error is not None:
                assert error.code == "overloaded"
                assert error.retry_after is not None
                assert 1 <= error.retry_after <= 300


def below(value: int, most: int | None) -> bool:
    return most is None or value <= most


@pytest.mark.parametrize(
    ("limits", "asks"),
    [
        ({"max_queued_requests": 50}, [{}]),
        ({"max_queued_tokens": 500}, [{"tokens": 10}]),
        ({"max_queued_requests": 50}, [{"n": 10}]),
        ({"max_queued_per_client": 25}, [{"client": "a"}, {"client": "b"}]),
    ],
    ids=str,
)
@pytest.mark.parametrize("per_second", [0.5, 2.0, 8.0])
def test_a_refused_client_that_comes_back_in_time_is_taken(
    limits: dict[str, int], asks: list[dict[str, Any]], per_second: float
) -> None:
    """Where the queue goes on as it did: the number of seconds is neither too short nor far too long."""
    none = {"max_queued_requests": None, "max_queued_tokens": None, "max_queued_per_client": None}
    waiting = Waiting(LimitOptions(**{**none, **limits}))
    fill = [{**each, "n": 1} for each in asks]
    for number in range(50):
        assert waiting.add(**fill[number % len(fill)]) is None
    for _ in range(int(20 * per_second)):  # twenty seconds of a full queue
        waiting.now += 1 / per_second
        waiting.start()
        waiting.add(**fill[len(waiting.left) % len(fill)])
    while waiting.add(**fill[-1]) is None:
        pass
    error = waiting.add(**asks[-1])
    assert error is not None
    assert error.retry_after is not None
    needed = 0.0
    while waiting.add(**asks[-1]) is not None:
        waiting.now += 1 / per_second
        needed += 1 / per_second
        waiting.start()
    assert needed / 3 - 2 <= error.retry_after <= 3 * needed + 2


def test_a34_samples_count() -> None:
    waiting = Waiting(LimitOptions(max_queued_requests=10, max_queued_tokens=100))
    assert waiting.add(n=9, tokens=2) is None
    error = waiting.add(n=2, tokens=2)
    assert error is not None
    assert "1 requests" in str(error)
    assert waiting.add(n=1, tokens=80) is None
    error = waiting.add(n=1, tokens=3)
    assert error is not None
    assert "1 tokens of prompts" in str(error)


def test_an_empty_queue_takes_anything() -> None:
    waiting = Waiting(LimitOptions(max_queued_requests=2, max_queued_tokens=2, max_queued_per_client=1))
    assert waiting.add(n=64, tokens=1000) is None
    assert waiting.add() is not None


def test_a_queue_that_stands_still_says_to_wait_at_least_as_long_again() -> None:
    waiting = Waiting(LimitOptions(max_queued_requests=1))
    waiting.add()
    assert waiting.add().retry_after == 1  # type: ignore[union-attr]  # nothing is known yet
    waiting.now += 40
    assert waiting.add().retry_after == 40  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["max_queued_requests", "max_queued_tokens", "max_queued_per_client"])
@pytest.mark.parametrize("value", [0, -1, 2**31])
def test_a_wrong_bound_is_named(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"server.limits.{name} must be from 1"):
        replace(LimitOptions(), **{name: value})


def test_a29_a30_the_service_counts_samples_refuses_and_ends_what_waits_too_long(tmp_path: Any) -> None:
    path = mock_model.write_mock_checkpoint(tmp_path, vocab_size=97, max_position_embeddings=4096)

    async def main(llm: LLM) -> None:
        service = service_of(llm, limits=QueueLimits(LimitOptions(max_queued_requests=4)))
        service.start()
        client = LocalClient(service)
        busy = await client.add(request("busy", [1], max_tokens=3000))
        await until(lambda: service.stats().running == 1)
        await until(lambda: service.stats().queued_requests == 0)
        waiting = await client.add(request("w", [1, 2], n=3, client="ann"))
        late = await client.add(request("late", [1, 2], timeout=50))
        stats = service.stats()
        assert (stats.queued_requests, stats.queued_tokens, stats.queued_by_client) == (4, 8, {"ann": 3, "": 1})
        assert (stats.started_requests, stats.started_tokens) == (1, 1)
        with pytest.raises(RequestError, match="over its limit by 1 requests") as caught:
            await client.add(request("x", [1]))
        assert caught.value.retry_after is not None
        pass_deadlines(service)
        (ended,) = [delta async for delta in late]
        assert ended.error is not None
        assert ended.error.code == "deadline"
        assert ended.num_cached_tokens == 0
        assert (await client.stats()).prompt_tokens == 1  # it never began
        waiting.close()
        busy.close()
        await until(lambda: not service.stats().requests)
        await client.close()
        await asyncio.to_thread(service.stop)

    with LLM(
        path, attention="mock", plugins=[mock_model], load_format="dummy", max_num_seqs=1, spare_slots=0,
        device="cpu", num_gpu_blocks_override=512,
    ) as llm:  # fmt: skip
        asyncio.run(main(llm))
