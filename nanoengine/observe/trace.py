"""A run's steps as a timeline: a file in Chrome's trace event format, which Perfetto (ui.perfetto.dev) opens.

The format: "Trace Event Format", Google, 2016 ("JSON Array Format"). Its closing bracket is optional, so a file that a
killed process leaves behind opens too. Three groups of tracks:

- *engine*: what the engine did (schedule, launch, wait, commit), what the device did (one slice a step), and counters.
- *slots*: one track a slot of the device tables, with the request that owned it; within it its prefill, chunk by chunk,
  and its decoding.

Each event is on a line of its own.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

from nanoengine.observe.files import GrowingFile
from nanoengine.observe.steps import Row, Span, StepRecord

FORMAT = 1
"""Of the events' `args`, which `nanoengine report` reads."""

_ENGINE, _SLOTS = 1, 2  # process ids
_HOST, _DEVICE = 1, 2  # thread ids in _ENGINE
_PHASES = ("schedule", "launch", "wait", "commit")

Event = dict[str, Any]


@dataclass(slots=True)
class _Track:
    """A slot's track. request: its owner, if it has one. last: the time up to which events are drawn, in seconds."""

    request: str | None = None
    decoding: bool = False
    last: float = 0.0
    lost: str = field(default="")  # why its last owner was preempted


class TraceFile:
    """An observer that writes each step's record to a file: `with TraceFile("out.json") as t, llm.observe(t): ...`.

    Args:
        path: of the file. A file that is already there is replaced with the first step.
        about: what the trace says about itself: model, versions.

    Raises `OSError` where the file cannot be opened. A write that fails (a full disk) ends the trace after the last
    complete step; the run goes on. `close` then raises the `OSError`, and so it does where the file is gone.
    """

    def __init__(self, path: str | Path, about: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.path = Path(path).expanduser()
        self.failure: OSError | None = None
        self._file = GrowingFile(self.path)
        self._closed = False
        self._origin = time.monotonic()  # the timeline's zero
        self._tracks: dict[int, _Track] = {}  # by slot
        self._seats: dict[str, int] = {}  # request -> its slot
        self._gone: set[str] = set()  # requests that ended with the last step; the next one may have a row of them
        args = {"format": FORMAT, "clock": time.time(), **about}
        self._write("[\n", [_event("i", "trace", 0, _ENGINE, _HOST, s="g", args=args), *_names()])

    def __call__(self, record: StepRecord) -> None:
        if not self._closed and self.failure is None:
            self._write("", [*self._engine(record), *self._counters(record), *self._slots(record)])

    def close(self) -> None:
        """End what is open, and the file. Idempotent. Raises the `OSError` of a write that failed."""
        if self._closed:
            return
        self._closed = True
        if self.failure is None:
            open_tracks = [(slot, track) for slot, track in self._tracks.items() if track.request is not None]
            now = time.monotonic()
            events = [event for slot, track in open_tracks for event in self._end(slot, track, now, "not seen")]
            self._write("", [*events, _event("i", "end", self._at(now), _ENGINE, _HOST, s="g")], "\n]\n")
        try:
            self._file.close()
        except OSError as error:
            self.failure = self.failure or error
        if self.failure is not None:
            raise self.failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _at(self, moment: float) -> int:
        """Microseconds since the trace began. Whole ones: where one slice ends the next begins, and a reader that adds
        start and duration must get exactly that number, or the slices would cross."""
        return math.floor(1e6 * (moment - self._origin))

    def _write(self, before: str, events: list[Event], after: str = ",\n") -> None:
        """All of it, or nothing: half a step would be wrong."""
        text = before + ",\n".join([json.dumps(event, separators=(",", ":")) for event in events]) + after
        try:
            self._file.write(text.encode())
            if after == ",\n" and not before:  # a step
                self._file.settle()
        except OSError as error:
            self.failure = error

    # -- the engine's tracks -----------------------------------------------------------------------------------------

    def _engine(self, record: StepRecord) -> list[Event]:
        spans = (record.schedule, record.launch, record.wait, record.commit)
        events = [
            self._slice(name, span, _ENGINE, _HOST, {"step": record.step})
            for name, span in zip(_PHASES, spans, strict=True)
        ]
        return [*events, self._slice(_title(record), record.execution, _ENGINE, _DEVICE, _facts(record), cat="step")]

    def _counters(self, record: StepRecord) -> list[Event]:
        at, blocks = self._at(record.schedule.end), record.blocks
        counters = {
            "KV blocks": {"used": blocks.used, "shared": blocks.shared, "cached": blocks.cached},
            "requests": {"running": record.running, "waiting": record.waiting},
            "rows": {"decode": len(record.decode_rows), "prefill": len(record.prefill_rows)},
            "tokens": {"computed": sum(row.num_tokens for row in record.rows), "new": record.new_tokens},
        }
        drafted, accepted = record.drafts
        if drafted:
            counters["drafts"] = {"accepted": sum(accepted), "rejected": sum(drafted) - sum(accepted)}
        return [_event("C", name, at, _ENGINE, _HOST, args=values) for name, values in counters.items()]

    def _slice(
        self, name: str, span: Span, pid: int, tid: int, args: Mapping[str, Any], *, cat: str = "engine"
    ) -> Event:
        start = self._at(span.start)
        return _event("X", name, start, pid, tid, dur=self._at(span.end) - start, cat=cat, args=args)

    # -- the slots' tracks -------------------------------------------------------------------------------------------

    def _slots(self, record: StepRecord) -> list[Event]:
        """Events of the slots, in the order of time; of what happened while the step ran, at the step's end."""
        events: list[Event] = []
        for lost in record.preempted:
            slot = self._seats.get(lost.request)
            if slot is not None:
                args = {"computed": lost.computed, "why": lost.why}
                events += self._end(slot, self._tracks[slot], record.schedule.start, "preempted", args)
        for new in record.admitted:
            args = {"tokens": new.num_tokens, "cached": new.cached, "resumed": new.resumed}
            events += self._begin(new.slot, new.request, record.schedule.end, args)
        for row in record.decode_rows:
            track = self._tracks.get(row.slot)
            if track is not None and track.decoding and track.request == row.request:  # nearly all of them
                track.last = record.execution.end
            else:
                events += self._row(row, record, decode=True)
        for row in record.prefill_rows:
            events += self._row(row, record, decode=False)
        self._gone.clear()
        for gone in record.ended:
            self._gone.add(gone.request)
            slot = self._seats.get(gone.request)
            if slot is not None:
                events += self._end(slot, self._tracks[slot], gone.at, gone.reason)
        return events

    def _row(self, row: Row, record: StepRecord, *, decode: bool) -> list[Event]:
        if row.request in self._gone:  # it ended while this step ran
            return []
        events: list[Event] = []
        if self._seats.get(row.request) != row.slot:  # it ran before the trace began
            events += self._begin(row.slot, row.request, record.execution.start, {"seen": "late"})
        track, span = self._tracks[row.slot], record.execution
        if not decode:
            name = f"prefill {row.start}–{row.start + row.num_tokens}"
            args = {"step": record.step, "chunk": not row.sampled}
            events.append(self._slice(name, span, _SLOTS, row.slot + 1, args, cat="request"))
        elif not track.decoding:
            track.decoding = True
            args = {"step": record.step}
            events.append(_event("B", "decode", self._at(span.start), _SLOTS, row.slot + 1, cat="request", args=args))
        track.last = span.end
        return events

    def _begin(self, slot: int, request: str, moment: float, args: Mapping[str, Any]) -> list[Event]:
        events: list[Event] = []
        if slot not in self._tracks:
            self._tracks[slot] = _Track()
            events += _name("thread", f"slot {slot}", slot + 1, _SLOTS, slot + 1)
        track = self._tracks[slot]
        if track.request is not None:
            events += self._end(slot, track, moment, "not seen")
        track.request, self._seats[request] = request, slot
        track.last = max(track.last, moment)
        at = self._at(track.last)
        return [*events, _event("B", request, at, _SLOTS, slot + 1, cat="request", args=args)]

    def _end(
        self, slot: int, track: _Track, moment: float, reason: str, args: Mapping[str, Any] = MappingProxyType({})
    ) -> list[Event]:
        track.last = max(track.last, moment)
        at, tid = self._at(track.last), slot + 1
        events = [_event("E", "decode", at, _SLOTS, tid, cat="request")] if track.decoding else []
        assert track.request is not None
        events.append(_event("E", track.request, at, _SLOTS, tid, cat="request", args={"ended": reason, **args}))
        if reason == "preempted":
            events.append(_event("i", "preempted", at, _SLOTS, tid, s="t", args={"request": track.request, **args}))
        self._seats.pop(track.request, None)
        track.request, track.decoding = None, False
        return events


def _event(ph: str, name: str, ts: int, pid: int, tid: int, **more: Any) -> Event:
    return {"ph": ph, "name": name, "ts": ts, "pid": pid, "tid": tid, **more}


def _names() -> list[Event]:
    return [
        *_name("process", "engine", 1, _ENGINE),
        *_name("thread", "engine: schedule, launch, wait, commit", 1, _ENGINE, _HOST),
        *_name("thread", "device: steps", 2, _ENGINE, _DEVICE),
        *_name("process", "slots", 2, _SLOTS),
    ]


def _name(kind: str, name: str, order: int, pid: int, tid: int = 0) -> list[Event]:
    """Metadata: the name of a process or thread, and its place in the order."""
    return [
        _event("M", f"{kind}_name", 0, pid, tid, args={"name": name}),
        _event("M", f"{kind}_sort_index", 0, pid, tid, args={"sort_index": order}),
    ]


def _title(record: StepRecord) -> str:
    decode, prefill = len(record.decode_rows), record.prefill_rows
    tokens = sum(row.num_tokens for row in prefill)
    parts = [f"decode {decode}"] if decode else []
    parts += [f"prefill {len(prefill)} ({tokens} tokens)"] if prefill else []
    return " + ".join(parts) + (" failed" if record.error else "")


def _facts(record: StepRecord) -> dict[str, Any]:
    """Everything in a step's record except its rows, which the slots' tracks show."""
    prefill = record.prefill_rows
    return {
        "step": record.step,
        "decode_rows": len(record.decode_rows),
        "prefill_rows": len(prefill),
        "prefill_tokens": sum(row.num_tokens for row in prefill),
        "chunked": [row.request for row in prefill if not row.sampled],
        "new_tokens": record.new_tokens,
        "drafts": record.drafts._asdict(),
        "graph": record.graph,
        "admitted": [new._asdict() for new in record.admitted],
        "preempted": [lost._asdict() for lost in record.preempted],
        "ended": [{"request": gone.request, "reason": gone.reason} for gone in record.ended],
        "blocks": record.blocks._asdict(),
        "running": record.running,
        "waiting": record.waiting,
        "seconds": {
            name: round(span.end - span.start, 9)
            for name, span in zip(_PHASES, (record.schedule, record.launch, record.wait, record.commit), strict=True)
        },
        "error": record.error,
    }
