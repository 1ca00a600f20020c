"""Outputs on their way to clients: in order, each once, whatever a client does; and ids on their way in."""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from nanoengine.api.errors import RequestError
from nanoengine.core.delivery import START, OpenRequests
from nanoengine.core.outputs import ALL
from nanoengine.params.preparation import Preparations

Sink = Any


class Requests(OpenRequests):
    """Outputs are queued and delivered, never looked at: names stand for them."""

    def start(self, name: str, sink: Sink) -> Any:
        state: Any = SimpleNamespace(given=SimpleNamespace(request_id=name), sink=sink, task=None)
        self.add(state)
        return state

    def put(self, name: str, sink: Sink, *, finished: bool = True) -> None:
        """An output of the request `name`, which `sink` gets."""
        if name not in self.known:
            self.start(name, sink)
        output: Any = SimpleNamespace(request_id=name, finished=finished)
        self.publish([(self.known[name], output)])


@pytest.fixture
def requests() -> Requests:
    return Requests(Preparations(1, 1.0))


class Got(list[str]):
    def sink(self, output: Any) -> None:
        self.append(output.request_id)

    def take(self, record: str) -> None:
        self.append(record)


def test_outputs_and_records_come_in_order_and_once(requests: Requests) -> None:
    got = Got()
    requests.put("a", got.sink)
    requests.put_records([(got.append, "record")])
    requests.put("b", got.sink)
    assert got == []
    requests.deliver()
    requests.deliver()
    assert got == ["a", "record", "b"]


def test_outputs_without_a_sink_wait_to_be_taken(requests: Requests) -> None:
    requests.put("a", None)
    requests.deliver()
    assert [output.request_id for output in requests.ready] == ["a"]
    assert [output.request_id for output in requests.take_ready()] == ["a"]
    assert requests.take_ready() == requests.ready == []


def test_a_sink_that_raises_keeps_nothing_from_the_others(requests: Requests, caplog: pytest.LogCaptureFixture) -> None:
    got = Got()

    def fail(output: Any) -> None:
        raise ValueError(output.request_id)

    state = requests.start("a", fail)
    requests.put("a", fail, finished=False)
    requests.put("b", got.sink)
    requests.put("c", fail)
    requests.deliver()
    assert got == ["b"]
    assert [message.partition(";")[0] for message in caplog.messages] == [
        f"the sink of request {name!r} raised ValueError: {name}" for name in "ac"
    ]
    entries = list(requests.inbox)
    assert entries[-1] == (state, ALL)  # the one that goes on is aborted
    assert (state, ALL) not in entries[:-1]
    requests.put("a", fail)  # its last output: the sink is not called again
    requests.deliver()
    assert len(caplog.messages) == 2


def test_a_sink_that_raises_over_the_last_output_harms_no_request_that_uses_its_id(requests: Requests) -> None:
    """A client that goes on with a conversation under the same id, and then raises."""

    def add_again(output: Any) -> None:
        second.append(requests.start("a", got.sink))
        raise ValueError

    got, second = Got(), list[Any]()
    requests.put("a", add_again)
    requests.deliver()
    assert (second[0], ALL) not in requests.inbox
    requests.put("a", got.sink)
    requests.deliver()
    assert got == ["a"]


def test_a_sink_that_raised_is_not_called_again(requests: Requests, caplog: pytest.LogCaptureFixture) -> None:
    """Nor for an output that was there already: of several samples, two may end at different moments of one step."""
    calls: list[bool] = []

    def fail(output: Any) -> None:
        calls.append(output.finished)
        raise ValueError

    requests.put("a", fail, finished=False)
    requests.put("a", fail)
    requests.deliver()
    assert calls == [False]
    assert len(caplog.messages) == 1


def test_what_an_observer_raises_is_raised_after_all_deliveries(
    requests: Requests, caplog: pytest.LogCaptureFixture
) -> None:
    got = Got()

    def fail(record: Any) -> None:
        raise ValueError("an observer's")

    requests.put_records([(fail, "record"), (got.append, "record")])
    requests.put("b", got.sink)
    with pytest.raises(ValueError, match="an observer's"):
        requests.deliver()
    assert got == ["record", "b"]
    assert caplog.messages == []


def test_an_interrupt_leaves_the_rest_for_the_next_time(requests: Requests) -> None:
    """A client that it comes into is called again, once."""
    calls, got = [], Got()

    def interrupted(output: Any) -> None:
        calls.append(output)
        raise KeyboardInterrupt

    requests.put("a", interrupted)
    requests.put_records([(interrupted, "record")])
    requests.put("b", got.sink)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            requests.deliver()
        assert got == []
    requests.deliver()
    assert [getattr(each, "request_id", each) for each in calls] == ["a", "a", "record", "record"]
    assert got == ["b"]


def interrupts(work: Callable[[], None], function: Callable[..., Any]) -> Iterator[int]:
    """Do `work` again and again, with Ctrl-C at the first, the second ... line of `function` that it comes to. Yields
    the line where that was; ends when `work` comes to an end."""
    for at in itertools.count():
        lines, hit = itertools.count(), None

        def trace(frame: Any, event: str, _: Any, at: int = at, lines: Iterator[int] = lines) -> Any:
            nonlocal hit
            if frame.f_code is not function.__code__:
                return None
            if event == "line" and next(lines) == at:
                hit = frame.f_lineno
                raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            work()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        if hit is None:
            return
        yield hit


def test_ctrl_c_at_any_line_of_deliver_loses_no_output() -> None:
    """Also between taking an output and calling its sink."""
    made, places = list[tuple[Requests, Got]](), set[int]()

    def work() -> None:
        requests, got = Requests(Preparations(1, 1.0)), Got()
        made.append((requests, got))
        requests.put("a", got.sink)
        requests.put_records([(got.take, "record")])
        requests.put("b", got.sink)
        requests.deliver()

    for line in interrupts(work, OpenRequests.deliver):
        places.add(line)
        requests, got = made[-1]
        requests.deliver()
        assert got == ["a", "record", "b"]
    assert len(places) >= 7


def test_ctrl_c_at_any_line_of_publish_loses_no_output() -> None:
    """The engine ends what is known after an interrupt: a request may get two last outputs, but never none."""
    made = list[tuple[Requests, Got]]()

    def work() -> None:
        requests, got = Requests(Preparations(1, 1.0)), Got()
        made.append((requests, got))
        requests.put("a", got.sink)

    for _ in interrupts(work, OpenRequests.publish):
        requests, got = made[-1]
        known: Any = requests.known.items()
        requests.publish([(state, SimpleNamespace(request_id=name, finished=True)) for name, state in known])
        requests.deliver()
        assert got in (["a"], ["a", "a"])
        assert not requests.known


def test_a_sink_may_deliver_itself(requests: Requests) -> None:
    """As one does that makes a step: what it is called with is not delivered again."""
    got = Got()

    def nested(output: Any) -> None:
        requests.deliver()
        got.sink(output)

    requests.put("a", nested)
    requests.put("b", got.sink)
    requests.deliver()
    assert got == ["b", "a"]


def test_what_a_sink_brings_about_is_delivered_too(requests: Requests) -> None:
    got = Got()
    requests.put("a", lambda output: requests.put("b", got.sink))
    requests.deliver()
    assert got == ["b"]


def test_an_id_is_free_after_the_last_output(requests: Requests) -> None:
    first = requests.start("a", None)
    requests.put("a", None, finished=False)
    with pytest.raises(RequestError, match="request 'a' is still running; give another id"):
        requests.start("a", None)
    requests.put("a", None)
    second = requests.start("a", None)
    assert (first.ordinal, second.ordinal) == (0, 1)
    requests.abort("a")
    requests.abort("unknown")
    assert list(requests.inbox) == [(first, START), (second, START), (second, ALL)]


def test_a_request_whose_adding_is_interrupted_is_not_known_for_ever(requests: Requests) -> None:
    class Interrupted(deque[Any]):
        def append(self, entry: Any) -> None:
            super().append(entry)
            if entry[1] == START:
                raise KeyboardInterrupt

    requests.inbox = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        requests.start("a", None)
    state = requests.known["a"]
    assert list(requests.inbox) == [(state, START), (state, ALL)], "it is aborted when the inbox is read"


def test_a_request_that_comes_while_the_inbox_is_cleared_is_kept(requests: Requests) -> None:
    early = requests.start("a", None)
    assert requests.clear_inbox() == [early]
    late = requests.start("b", None)
    assert list(requests.inbox) == [(late, START)]
    assert requests.known == {"a": early, "b": late}
