"""Reads a trace strictly, by the rules of "Trace Event Format" (Google, 2016), and gives what it shows."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REQUIRED = {
    "X": {"dur"},
    "B": set(),
    "E": set(),
    "C": {"args"},
    "i": {"s"},
    "M": {"args"},
}
METADATA = {"process_name", "process_sort_index", "thread_name", "thread_sort_index"}


@dataclass(frozen=True)
class Slice:
    """On a track; times in microseconds. args: those of its end laid over those of its beginning."""

    name: str
    start: int
    end: int
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Timeline:
    """about: of the trace. tracks: by name. counters: name -> its values over time."""

    about: Mapping[str, Any]
    tracks: Mapping[str, Sequence[Slice]]
    counters: Mapping[str, Sequence[Mapping[str, float]]]
    instants: Sequence[Mapping[str, Any]]

    @property
    def steps(self) -> Sequence[Slice]:
        return self.tracks["device: steps"]

    def requests(self) -> dict[str, list[Slice]]:
        """By request: its stays in slots, in order."""
        found: dict[str, list[Slice]] = defaultdict(list)
        for name, slices in self.tracks.items():
            for each in slices if name.startswith("slot ") else ():
                if each.name != "decode" and not each.name.startswith("prefill "):
                    found[each.name].append(each)
        return {name: sorted(each, key=lambda stay: stay.start) for name, each in found.items()}

    def inside(self, request: str) -> list[Slice]:
        """What is drawn within the stays of a request."""
        return [
            each
            for name, slices in self.tracks.items()
            if name.startswith("slot ")
            for stay in slices
            if stay.name == request
            for each in slices
            if each.name != request and within(each, stay)
        ]


def within(inner: Slice, outer: Slice) -> bool:
    return outer.start <= inner.start and inner.end <= outer.end


def read(path: Path) -> Timeline:
    """Of a file that was closed."""
    return check(json.loads(path.read_text("utf-8")))


def check(events: Sequence[Mapping[str, Any]], *, cut: bool = False) -> Timeline:
    """Asserts the format's rules. cut: the process was killed, so slices may lack their end."""
    for event in events:
        lacking = ({"ph", "name", "ts", "pid", "tid"} | REQUIRED[event["ph"]]) - event.keys()
        assert not lacking, f"{event} lacks {lacking}"
        assert type(event["ts"]) is type(event.get("dur", 0)) is int, event  # readers add them
        assert event["ts"] >= 0, event
        assert isinstance(event["pid"], int), event
        assert isinstance(event["tid"], int), event
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert {e["name"] for e in events if e["ph"] == "M"} <= METADATA
    processes = {e["pid"] for e in events if e["name"] == "process_name"}
    assert {e["pid"] for e in events} <= processes, "a process without a name"
    tracks: dict[str, list[Slice]] = defaultdict(list)
    counters: dict[str, list[Mapping[str, float]]] = defaultdict(list)
    stacks: dict[tuple[int, int], list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        at = (event["pid"], event["tid"])
        if event["ph"] == "X":
            assert event["dur"] >= 0, event
            tracks[names[at]].append(
                Slice(event["name"], event["ts"], event["ts"] + event["dur"], event.get("args", {}))
            )
        elif event["ph"] == "B":
            stacks[at].append(event)
        elif event["ph"] == "E":
            begun = stacks[at].pop()
            assert begun["name"] == event["name"], f"{event} ends {begun}"
            args = {**begun.get("args", {}), **event.get("args", {})}
            assert begun["ts"] <= event["ts"], f"{event} ends before it begins"
            tracks[names[at]].append(Slice(begun["name"], begun["ts"], event["ts"], args))
        elif event["ph"] == "C":
            assert event["args"]
            assert all(isinstance(value, int | float) for value in event["args"].values()), event
            counters[event["name"]].append(event["args"])
    assert cut or not any(stacks.values()), "slices without an end"
    for name, slices in tracks.items():
        check_nesting(name, slices)
    about = next(event["args"] for event in events if event["name"] == "trace")
    return Timeline(about, tracks, counters, [event for event in events if event["ph"] == "i"])


def check_nesting(name: str, slices: Sequence[Slice]) -> None:
    """On one track slices lie side by side or within each other; a viewer draws no others."""
    open_slices: list[Slice] = []
    for each in sorted(slices, key=lambda s: (s.start, -s.end)):
        while open_slices and open_slices[-1].end <= each.start:
            open_slices.pop()
        if open_slices:
            assert within(each, open_slices[-1]), f"{name}: {each} crosses {open_slices[-1]}"
        open_slices.append(each)
