"""Turns the scheduler's picks into the flat arrays of a `StepPlan`. Arrays are built once a step, from lists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nanoengine.core.request import Request
from nanoengine.core.step import (
    BlockAppends,
    Bool,
    Int32,
    NewSlots,
    ProcessorColumn,
    StepPlan,
    flags,
    i32,
    i64,
    offsets_of,
)

ColumnValues = dict[tuple[str, str], dict[int, npt.NDArray[Any]]]  # (processor, column) -> slot -> values


class Prefill(NamedTuple):
    """A prefill row: tokens [start, end); `sampled`: it reaches the request's last token."""

    request: Request
    start: int
    end: int
    sampled: bool


class Picks(NamedTuple):
    """The rows of a step, those of steady requests aside. A decode row's start is its request's last token."""

    decode: list[Request]
    decode_starts: list[int]
    prefill: list[Prefill]

    def only(self, request: Request) -> Picks:
        """The row of one request."""
        rows = [(r, start) for r, start in zip(self.decode, self.decode_starts, strict=True) if r is request]
        return Picks(
            [r for r, _ in rows], [at for _, at in rows], [row for row in self.prefill if row.request is request]
        )


def advance(picks: Mapping[Request, int], step: int) -> Picks:
    """Books the picked tokens as computed by `step`, and sorts decode rows from prefill rows.

    A decode row continues a generated sequence: its only input is the last token, which may still be in flight.
    """
    decode: list[Request] = []
    decode_starts: list[int] = []
    prefill: list[Prefill] = []
    for request, num_new in picks.items():
        start = request.num_computed
        request.num_computed = end = start + num_new
        request.last_step = step
        sampled = end == request.num_tokens + request.num_in_flight
        if sampled:
            request.num_in_flight += 1
        if num_new == 1 and sampled and end > request.prompt_len:
            decode.append(request)
            decode_starts.append(start)
        else:
            prefill.append(Prefill(request, start, end, sampled))
    return Picks(decode, decode_starts, prefill)


def take_back(picks: Picks, last_step: int) -> None:
    """Undoes `advance`: the step is not launched. `last_step`: the newest in flight, which may hold a row of each."""
    rows = [(request, start, True) for request, start in zip(picks.decode, picks.decode_starts, strict=True)]
    for request, start, sampled in rows + [(row.request, row.start, row.sampled) for row in picks.prefill]:
        request.num_computed, request.last_step = start, last_step
        request.num_in_flight -= sampled


def build_plan(
    step: int,
    picks: Picks,
    new: Mapping[Request, int],
    grown: Mapping[Request, int],
    host_values: ColumnValues,
    steady: tuple[Int32, Int32] | None = None,
) -> StepPlan:
    """The plan of the rows `picks` and `steady`.

    Args:
        new: request that enters the device tables -> its tokens that the prefix cache holds.
        grown: request -> index of its first block that the device's table lacks.
        host_values: columns that host-token processors computed for this step.
        steady: slots and starts of more decode rows, int32 each, in plan order.
    """
    slots, starts = _decode_rows(picks, steady)
    num_decode = len(slots)
    lens = np.ones(num_decode, dtype=np.int32)
    if picks.prefill:
        slots = np.concatenate([slots, i32([row.request.slot for row in picks.prefill])])
        starts = np.concatenate([starts, i32([row.start for row in picks.prefill])])
        lens = np.concatenate([lens, i32([row.end - row.start for row in picks.prefill])])
    logits, rows, sampled, tops = _logits(num_decode, picks.prefill)
    return StepPlan(
        step=step,
        new=_new_slots(new) if new else _NO_SLOTS,
        columns=_processor_columns(new, host_values) if new or host_values else (),
        appends=_appends(grown) if grown else _NO_APPENDS,
        slots=slots,
        num_decode_rows=num_decode,
        query_lens=lens,
        starts=starts,
        logits_index=logits,
        logits_rows=rows,
        sampled=sampled,
        prompt_logprobs=tops,
    )


_NO_SLOTS, _NO_APPENDS = NewSlots(), BlockAppends()  # most steps have none


def _decode_rows(picks: Picks, steady: tuple[Int32, Int32] | None) -> tuple[Int32, Int32]:
    """Slots and starts, int32 each: the longest first, then by slot."""
    if steady is not None and not picks.decode:
        return steady
    slots, starts = i32([request.slot for request in picks.decode]), i32(picks.decode_starts)
    if steady is not None:
        slots, starts = np.concatenate([steady[0], slots]), np.concatenate([steady[1], starts])
    order = longest_first(starts, slots)
    return slots[order], starts[order]


def longest_first(lengths: npt.NDArray[Any], slots: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """The order of decode rows: a device that starts with what takes longest is not left with one at the end."""
    return np.argsort(slots - (lengths.astype(np.int64) << 32), kind="stable")


def _logits(num_decode: int, prefill: Sequence[Prefill]) -> tuple[Int32, Int32, Bool, Int32]:
    """logits_index, logits_rows, sampled, prompt_logprobs: int32, int32, bool, int32, each [L]."""
    if not prefill:
        every = np.arange(num_decode, dtype=np.int32)
        return every, every, np.ones(num_decode, dtype=np.bool_), np.zeros(num_decode, dtype=np.int32)
    at = num_decode
    index, rows, drawn, tops = list(range(at)), list(range(at)), [True] * at, [0] * at
    for row, (request, start, end, sampled) in enumerate(prefill, start=at):
        top = request.params.prompt_logprobs
        if top is not None:  # logits at j tell the log-prob of prompt token j + 1
            wanted = range(max(start, request.prompt_logprobs_done - 1), min(end, request.prompt_len - 1))
            index += [at + j - start for j in wanted]
            rows += [row] * len(wanted)
            drawn += [False] * len(wanted)
            tops += [top] * len(wanted)
        at += end - start
        if sampled:
            index.append(at - 1)
            rows.append(row)
            drawn.append(True)
            tops.append(0)
    return i32(index), i32(rows), flags(drawn), i32(tops)


def _new_slots(new: Mapping[Request, int]) -> NewSlots:
    outputs = [i32(request.output_token_ids) for request in new]
    prompts = [np.frombuffer(request.prompt_bytes, dtype=np.int32) for request in new]
    stops = [sorted(request.stop_set) for request in new]
    logprobs = [request.params.logprobs for request in new]
    return NewSlots(
        slots=i32([request.slot for request in new]),
        token_ids=np.concatenate([part for pair in zip(prompts, outputs, strict=True) for part in pair]),
        token_offsets=offsets_of([request.num_tokens for request in new]),
        prompt_lens=i32([request.prompt_len for request in new]),
        num_computed=i32(list(new.values())),
        seeds=i64([request.seed for request in new]),
        sample_index=i32([request.sample_index for request in new]),
        greedy=flags([request.params.greedy for request in new]),
        min_lens=i32([request.min_len for request in new]),
        stop_ids=i32([token for ids in stops for token in ids]),
        stop_offsets=offsets_of([len(ids) for ids in stops]),
        num_logprobs=i32([-1 if k is None else k for k in logprobs]),
    )


def _processor_columns(new: Iterable[Request], host_values: ColumnValues) -> tuple[ProcessorColumn, ...]:
    """One message a column: the packed values of new slots, and over them what host-token processors computed."""
    table: ColumnValues = {}
    for request in new:
        for processor in request.params.processors:
            for column, value in processor.columns.items():
                table.setdefault((processor.name, column), {})[request.slot] = value
    for key, values in host_values.items():
        table.setdefault(key, {}).update(values)
    return tuple(
        ProcessorColumn(
            processor=processor,
            column=column,
            slots=i32(list(values)),
            values=np.concatenate([np.atleast_1d(value) for value in values.values()]),
            offsets=offsets_of([np.size(value) for value in values.values()]),
        )
        for (processor, column), values in table.items()
    )


def _appends(grown: Mapping[Request, int]) -> BlockAppends:
    groups: list[int] = []
    slots: list[int] = []
    indices: list[int] = []
    blocks: list[int] = []
    for request, first in grown.items():
        for group, table in enumerate(request.block_ids):
            added = table[first:]
            groups += [group] * len(added)
            slots += [request.slot] * len(added)
            indices += range(first, len(table))
            blocks += added
    return BlockAppends(group=i32(groups), slot=i32(slots), index=i32(indices), block=i32(blocks))
