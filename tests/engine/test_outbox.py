"""Outputs on their way out: in order, to everyone, whatever a client does."""

from __future__ import annotations

from typing import Any

import pytest

from nanoengine.core.delivery import Outbox

failed: list[Any] = []


@pytest.fixture
def outbox() -> Any:  # outputs are handed on, never looked at
    failed.clear()
    return Outbox(lambda output, error: failed.append((output, str(error))))


def test_news_come_in_order_and_once(outbox: Any) -> None:
    got: list[Any] = []
    outbox.put("a", got.append)
    outbox.put_records([(got.append, "record")])
    outbox.put("b", got.append)
    assert got == []
    outbox.deliver()
    outbox.deliver()
    assert got == ["a", "record", "b"]


def test_outputs_without_a_sink_wait_to_be_taken(outbox: Any) -> None:
    outbox.put("a", None)
    outbox.deliver()
    assert outbox.ready == ["a"]
    assert outbox.take_ready() == ["a"]
    assert outbox.take_ready() == outbox.ready == []


def test_a_client_that_raises_keeps_nothing_from_the_others(outbox: Any) -> None:
    got: list[Any] = []

    def fail(news: Any) -> None:
        raise ValueError(news)

    outbox.put("a", fail)
    outbox.put("b", got.append)
    outbox.put("c", fail)
    outbox.deliver()
    assert got == ["b"]
    assert failed == [("a", "a"), ("c", "c")]
    outbox.deliver()  # nothing is left
    assert len(failed) == 2


def test_what_an_observer_raises_is_raised_once_all_are_served(outbox: Any) -> None:
    got: list[Any] = []
    record = object()

    def fail(news: Any) -> None:
        raise ValueError("an observer's")

    outbox.put_records([(fail, record), (got.append, record)])
    outbox.put("b", got.append)
    with pytest.raises(ValueError, match="an observer's"):
        outbox.deliver()
    assert got == [record, "b"]
    assert failed == []


def test_an_interrupt_leaves_the_rest_for_the_next_time(outbox: Any) -> None:
    got: list[Any] = []

    def interrupted(news: Any) -> None:
        raise KeyboardInterrupt

    outbox.put("a", interrupted)
    outbox.put("b", got.append)
    with pytest.raises(KeyboardInterrupt):
        outbox.deliver()
    assert got == []
    outbox.deliver()
    assert got == ["b"]


def test_what_a_client_brings_about_is_delivered_too(outbox: Any) -> None:
    got: list[Any] = []
    outbox.put("a", lambda news: outbox.put(news + "!", got.append))
    outbox.deliver()
    assert got == ["a!"]
