"""Turns a draft into the flat arrays of a `StepPlan`. Arrays are built once a step, from lists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from nanoengine.core.request import Request
from nanoengine.core.scheduling.draft import ColumnValues, Draft, Prefill
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

_NO_SLOTS, _NO_APPENDS = NewSlots(), BlockAppends()  # most steps have none


def build_plan(draft: Draft) -> StepPlan:
    """Decode rows come first, the longest first, then by slot: a device that starts with what takes longest is not left
    with one at the end. Prefill rows follow as they were picked."""
    slots, starts = i32(draft.slots), i32(draft.starts)
    order = np.lexsort((slots, -starts))
    slots, starts = slots[order], starts[order]
    num_decode = len(slots)
    lens = np.ones(num_decode, dtype=np.int32)
    if draft.prefill:
        slots = np.concatenate([slots, i32([row.request.slot for row in draft.prefill])])
        starts = np.concatenate([starts, i32([row.start for row in draft.prefill])])
        lens = np.concatenate([lens, i32([row.end - row.start for row in draft.prefill])])
    logits, rows, sampled, tops = _logits(num_decode, draft.prefill)
    return StepPlan(
        step=draft.step,
        new=_new_slots(draft.new) if draft.new else _NO_SLOTS,
        columns=_processor_columns(draft.new, draft.host_values) if draft.new or draft.host_values else (),
        appends=_appends(draft.grown) if draft.grown else _NO_APPENDS,
        slots=slots,
        num_decode_rows=num_decode,
        query_lens=lens,
        starts=starts,
        logits_index=logits,
        logits_rows=rows,
        sampled=sampled,
        prompt_logprobs=tops,
    )


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
