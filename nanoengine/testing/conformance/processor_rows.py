"""Rows of requests for a logits processor, made from lists of tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanoengine.api import ColumnSpec, Need, ParamsContext, ProcessorRows, RaggedColumn, StandardOp
from nanoengine.params.columns import pack_draws
from nanoengine.params.resolver import PackedProcessor


@dataclass(frozen=True, slots=True)
class Row:
    """A request: its tokens, packed columns (None: it does not use the processor) and the number of its example."""

    prompt: list[int]
    output: list[int]
    columns: Mapping[str, Any] | None
    example: int


def columns_of(
    processors: Sequence[PackedProcessor], prompt: Sequence[int], output: Sequence[int], ctx: ParamsContext
) -> Mapping[str, Any] | None:
    """The columns of a request before the next draw; None if it does not use the processor."""
    if not processors:
        return None
    (processor,) = processors
    state = processor.params.start(prompt, ctx)
    if state is None:
        return processor.columns
    if output:
        state.feed(output)
    specs, name = processor.params.columns, processor.name
    fresh = {
        column: pack_draws(name, column, specs[column], values, 1, ctx.vocab_size)[0]
        for column, values in state.columns(()).items()
    }
    scalars = {column for column in fresh if not (specs[column].ragged or is_wide(specs[column]))}
    return {**processor.columns, **fresh, **{column: fresh[column][0] for column in scalars}}


def is_wide(spec: ColumnSpec) -> bool:
    """Whether a row of the column has a fixed number of values."""
    return spec.width is not None or spec.op is StandardOp.BITMASK


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch. `logits`: float32 [R, V]. `rows`: with all history. `examples`: number of each row's example, or -1."""

    logits: Tensor
    rows: ProcessorRows
    examples: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[Row], specs: Mapping[str, ColumnSpec], logits: Tensor, max_len: int) -> Batch:
        count, vocab = logits.shape
        slots = [(5 * i + 3) % (count + 2) for i in range(count)]
        slots = slots if len(set(slots)) == count else list(range(count, 0, -1))
        table = torch.full((count + 2, max_len + 1), vocab - 1, dtype=torch.int32)
        for slot, row in zip(slots, rows, strict=True):
            tokens = row.prompt + row.output
            table[slot, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        return cls(
            logits,
            ProcessorRows(
                slots=torch.tensor(slots),
                positions=torch.tensor([len(row.prompt) + len(row.output) for row in rows]),
                prompt_lens=torch.tensor([len(row.prompt) for row in rows]),
                vocab_start=0,
                vocab_size=vocab,
                columns={name: _column(name, spec, rows, vocab) for name, spec in specs.items()},
                output_counts=_counts([row.output for row in rows], vocab),
                prompt_mask=_counts([row.prompt for row in rows], vocab) > 0,
                token_ids=table,
            ),
            tuple(row.example for row in rows),
        )

    def __len__(self) -> int:
        return len(self.examples)

    def rows_for(self, needs: Collection[Need]) -> ProcessorRows:
        """The rows with only the history that a processor with these needs gets."""
        return replace(
            self.rows,
            output_counts=self.rows.output_counts if Need.OUTPUT_COUNTS in needs else None,
            prompt_mask=self.rows.prompt_mask if Need.PROMPT_MASK in needs else None,
            token_ids=self.rows.token_ids if Need.TOKEN_IDS in needs else None,
        )

    def pick(self, index: Sequence[int]) -> Batch:
        """Some of the rows, in this order."""
        picked = {
            name: getattr(self.rows, name)[list(index)]
            for name in ("slots", "positions", "prompt_lens", "output_counts", "prompt_mask")
        }
        columns = {
            name: RaggedColumn(column.values[list(index)], column.counts[list(index)])
            if isinstance(column, RaggedColumn)
            else column[list(index)]
            for name, column in self.rows.columns.items()
        }
        rows = replace(self.rows, **picked, columns=columns)
        return Batch(self.logits[list(index)], rows, tuple(self.examples[i] for i in index))

    def shard(self, first: int, last: int) -> Batch:
        """The batch with only the ids [first, last)."""
        assert self.rows.output_counts is not None
        assert self.rows.prompt_mask is not None
        counts, mask = self.rows.output_counts[:, first:last], self.rows.prompt_mask[:, first:last]
        rows = replace(self.rows, vocab_start=first, output_counts=counts, prompt_mask=mask)
        return Batch(self.logits[:, first:last].contiguous(), rows, self.examples)

    def to(self, device: str) -> Batch:
        names = ("slots", "positions", "prompt_lens", "output_counts", "prompt_mask", "token_ids")
        moved = {name: getattr(self.rows, name).to(device) for name in names}
        columns = {
            name: RaggedColumn(column.values.to(device), column.counts.to(device))
            if isinstance(column, RaggedColumn)
            else column.to(device)
            for name, column in self.rows.columns.items()
        }
        return Batch(self.logits.to(device), replace(self.rows, **moved, columns=columns), self.examples)


def _column(name: str, spec: ColumnSpec, rows: Sequence[Row], vocab: int) -> Tensor | RaggedColumn:
    inert = np.zeros(0, dtype=spec.dtype) if spec.ragged else np.asarray(spec.default, dtype=spec.dtype)
    if is_wide(spec):
        inert = np.full(spec.width or -(-vocab // 32), spec.default, dtype=spec.dtype)
    values = [inert if row.columns is None else row.columns.get(name, inert) for row in rows]
    if not spec.ragged:
        return torch.from_numpy(np.stack(values))
    table = np.full((len(rows), max(1, *map(len, values)) + 1), spec.default, dtype=spec.dtype)
    for row, each in zip(table, values, strict=True):
        row[: len(each)] = each
    counts = np.array([len(each) for each in values], dtype=np.int32)
    return RaggedColumn(torch.from_numpy(table), torch.from_numpy(counts))


def _counts(tokens: Sequence[Sequence[int]], vocab: int) -> Tensor:
    """How often each id occurs in each row, int32 [R, V]."""
    counts = [np.bincount(np.array(each, dtype=np.int64), minlength=vocab) for each in tokens]
    return torch.from_numpy(np.stack(counts)).to(torch.int32)
