"""The end of a step on a GPU: the rows' columns, the draw, and each token to its slot, captured with the graphs.

It serves the rows whose stages are all standard operations; what else a row may ask (log-probs, penalties, a plugin's
stage) goes the eager way, step by step. One graph a size and `Tail`: per-row parameters tell the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor

from nanoengine.api.parallel import TensorParallelGroup
from nanoengine.api.specs import StandardOp
from nanoengine.core.execution.draw import vocab_slice
from nanoengine.core.execution.graph_inputs import RowInputs
from nanoengine.core.execution.graphs import captured
from nanoengine.core.execution.mixed_graphs import MixedSize
from nanoengine.core.execution.sampler import Sampler
from nanoengine.core.execution.slots import ScalarTable, SlotTables
from nanoengine.core.execution.step_inputs import StepBuffers
from nanoengine.core.step import Int32

_TRUNCATIONS = (StandardOp.TOP_K, StandardOp.TOP_P, StandardOp.MIN_P)


Size = int | MixedSize


class DecodeTail:
    """Captured after the graphs of steps, over their logits."""

    def __init__(
        self,
        sampler: Sampler,
        tables: SlotTables,
        buffers: StepBuffers,
        rows_of: Callable[[Size], RowInputs],
        tp: TensorParallelGroup,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        """`rows_of`: where a graph of that size finds its rows."""
        from nanoengine.kernels import sampling_shard_triton, sampling_triton, step_inputs_triton

        self._kernels, self._shards, self._inputs = sampling_triton, sampling_shard_triton, step_inputs_triton
        self._tp, self._agree = tp, agree
        self._sampler, self._tables, self._buffers, self._rows_of = sampler, tables, buffers, rows_of
        self._drawn = torch.zeros(3 * buffers.max_rows, dtype=torch.int32, device=tables.device)
        scalars = {
            op: table
            for op, (stage, column) in sampler.standard_columns().items()
            if isinstance(table := tables.columns[stage][column], ScalarTable)
        }
        picked = [(tables.first[name], words) for name, words in (("greedy", 1), ("seeds", 2), ("sample_index", 2))]
        picked += [(table.first, 1) for table in scalars.values()]
        self._ops = dict(zip(scalars, count(3), strict=False))  # standard operation -> which of the picked columns
        self._dtypes = {op: table.values.dtype for op, table in scalars.items()}
        self._picked = torch.tensor(picked, dtype=torch.int32).to(tables.device)
        self._columns = torch.zeros(len(picked), 2 * buffers.max_rows, dtype=torch.int32, device=tables.device)
        self._stages = frozenset(stage for stage, _ in sampler.standard_columns().values())
        self._graphs: dict[tuple[Size, int], torch.cuda.CUDAGraph] = {}

    def capture(self, logits: Mapping[Any, Tensor]) -> None:
        """`logits`: graphs' outputs by `Size`, each one row of them a row of the step.

        Each runs once before it is captured: the rows must be the dummy slot's.
        """
        pool = torch.cuda.graph_pool_handle()
        for size, values in sorted(logits.items(), key=lambda item: -len(item[1])):
            for tail in self._kernels.Tail:
                run = partial(self._run, size, tail, values)
                self._graphs[size, tail], _ = captured(run, pool, self._agree)

    def kind(self, slots: Int32, active: frozenset[str]) -> int | None:
        """The tail that serves these rows; None: the eager way. `active`: stages that some row wants.

        Counts over the vocabulary, where there are any, are not kept up for rows that want no stage which reads them:
        who enters a slot has them made from its tokens.
        """
        tables = self._tables
        asks_more = (tables.host_num_logprobs[slots] >= 0).any() or tables.host_min_tokens[slots].any()
        if asks_more or not active <= self._stages:
            return None
        if tables.host_greedy[slots].all():
            return int(self._kernels.Tail.GREEDY)
        truncates = any(stage in active for stage in self._truncating())
        return int(self._kernels.Tail.TRUNCATION if truncates else self._kernels.Tail.TEMPERATURE)

    def _truncating(self) -> list[str]:
        columns = self._sampler.standard_columns()
        return [columns[op][0] for op in _TRUNCATIONS if op in columns]

    def replay(self, size: Size, tail: int) -> Tensor:
        """int32 [3 R] for R rows: their tokens, two words each, then failures; valid until the next replay."""
        self._graphs[size, tail].replay()
        rows = size if isinstance(size, int) else size.rows
        return self._drawn[: 3 * rows]

    def _run(self, size: Size, tail: int, logits: Tensor) -> None:
        tables, rows, inputs = self._tables, len(logits), self._rows_of(size)
        slots, seq_lens = inputs.slots, self._buffers.seq_lens[:rows]
        tokens, failed = self._drawn[: 2 * rows].view(torch.int64), self._drawn[2 * rows : 3 * rows]

        self._inputs.pick_columns(tables.arena.words, slots, self._picked, self._columns)
        greedy, seeds, sample_index = self._columns[:3]

        def column(op: StandardOp) -> Tensor | None:
            return self._columns[self._ops[op], :rows].view(self._dtypes[op]) if op in self._ops else None

        draw: dict[str, Any] = {
            "greedy": greedy[:rows],
            "temperature": column(StandardOp.TEMPERATURE),
            "seeds": seeds[: 2 * rows].view(torch.int64),
            "positions": seq_lens.long(),  # behind the last token
            "sample_index": sample_index[: 2 * rows].view(torch.int64),
        }
        if self._tp.size > 1 and tail != self._kernels.Tail.TRUNCATION:
            start, stop = vocab_slice(tables.limits.vocab_size, self._tp)
            keys = self._shards.best_keys(logits[:, : stop - start], self._kernels.Tail(tail), start, **draw)
            self._shards.answer(self._tp.highest(keys), tokens, failed)
        else:
            whole = self._tp.all_gather(logits)[:, : tables.limits.vocab_size]
            top_k, top_p, min_p = map(column, _TRUNCATIONS)
            self._kernels.sample(
                whole, self._kernels.Tail(tail), tokens, failed, top_k=top_k, top_p=top_p, min_p=min_p, **draw
            )
        self._inputs.record(tables.state, slots, inputs.query_start_loc, tokens, inputs.token_of_row)
