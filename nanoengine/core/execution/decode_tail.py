"""The end of a decode step on a GPU: the rows' columns, the draw, and each token to its slot, captured with the graphs.

It serves the rows whose stages are all standard operations; what else a row may ask (log-probs, penalties, a plugin's
stage) goes the eager way, step by step. One graph a size and `Tail`: per-row parameters tell the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nanoengine.core.execution.graphs import captured
from nanoengine.core.execution.sampler import Sampler
from nanoengine.core.execution.slots import ScalarTable, SlotTables
from nanoengine.core.execution.step_inputs import StepBuffers
from nanoengine.core.setup.specs import StandardOp
from nanoengine.core.step import Int32

_TRUNCATIONS = (StandardOp.TOP_K, StandardOp.TOP_P, StandardOp.MIN_P)


@dataclass(frozen=True, slots=True)
class TailResult:
    """Static buffers: token_ids int64 [rows], failed int32 [rows]; valid until the next replay."""

    token_ids: Tensor
    failed: Tensor


class DecodeTail:
    """Captured after the decode graphs, over their logits."""

    def __init__(self, sampler: Sampler, tables: SlotTables, buffers: StepBuffers) -> None:
        from nanoengine.kernels import sampling_triton, step_inputs_triton

        self._kernels, self._inputs = sampling_triton, step_inputs_triton
        self._sampler, self._tables, self._buffers = sampler, tables, buffers
        rows, device = buffers.limits.max_rows, tables.device
        self._tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._failed = torch.zeros(rows, dtype=torch.int32, device=device)
        self._columns: Mapping[StandardOp, ScalarTable] = {
            op: table
            for op, (stage, column) in sampler.standard_columns().items()
            if isinstance(table := tables.columns[stage][column], ScalarTable)
        }
        self._stages = frozenset(stage for stage, _ in sampler.standard_columns().values())
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    def capture(self, logits: Mapping[int, Tensor]) -> None:
        """`logits`: the decode graphs' outputs by size, each [size, V]."""
        pool = torch.cuda.graph_pool_handle()
        for size, values in sorted(logits.items(), reverse=True):
            for tail in self._kernels.Tail:
                self._graphs[size, tail], _ = captured(partial(self._run, size, tail, values), pool)

    def kind(self, slots: Int32, active: frozenset[str]) -> int | None:
        """The tail that serves these rows; None: the eager way. `active`: stages that some row wants."""
        tables = self._tables
        asks_more = (tables.host_num_logprobs[slots] >= 0).any() or tables.host_min_tokens[slots].any()
        if asks_more or not active <= self._stages or tables.keeps_history:
            return None
        if tables.host_greedy[slots].all():
            return int(self._kernels.Tail.GREEDY)
        truncates = any(stage in active for stage in self._truncating())
        return int(self._kernels.Tail.TRUNCATION if truncates else self._kernels.Tail.TEMPERATURE)

    def _truncating(self) -> list[str]:
        columns = self._sampler.standard_columns()
        return [columns[op][0] for op in _TRUNCATIONS if op in columns]

    def replay(self, size: int, tail: int) -> TailResult:
        self._graphs[size, tail].replay()
        return TailResult(self._tokens[:size], self._failed[:size])

    def _run(self, size: int, tail: int, logits: Tensor) -> None:
        tables, buffers = self._tables, self._buffers
        slots = buffers.slots[:size]

        def column(op: StandardOp) -> Tensor | None:
            return self._columns[op].gather(slots) if op in self._columns else None

        vocab = tables.limits.vocab_size
        self._kernels.sample(
            logits[:, :vocab],
            self._kernels.Tail(tail),
            self._tokens[:size],
            self._failed[:size],
            greedy=tables.greedy.index_select(0, slots),
            temperature=column(StandardOp.TEMPERATURE),
            top_k=column(StandardOp.TOP_K),
            top_p=column(StandardOp.TOP_P),
            min_p=column(StandardOp.MIN_P),
            seeds=tables.seeds.index_select(0, slots),
            positions=buffers.positions[:size] + 1,
            sample_index=tables.sample_index.index_select(0, slots),
        )
        self._inputs.record(tables.state, slots, buffers.decode_start_loc[: size + 1], self._tokens[:size])
