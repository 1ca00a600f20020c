"""Sequences in scattered KV blocks, and the `StepInputs` of steps with them, as the engine would make them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import gcd

import torch

from nanoengine.api import BatchLimits, StepInputs


@dataclass
class Paging:
    """Block tables of named sequences.

    Attributes:
        limits: bounds of every step. num_blocks: of the pool, including the dummy block 0. device: of the tensors.
        tables: name -> blocks of a sequence. lens: name -> number of its tokens so far.
    """

    limits: BatchLimits
    num_blocks: int
    device: torch.device
    tables: dict[str, list[int]] = field(default_factory=dict)
    lens: dict[str, int] = field(default_factory=dict)
    _free: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        # The stride has no common factor with the number of blocks, so consecutive blocks are not adjacent in memory.
        count = self.num_blocks - 1
        stride = next(s for s in range(7, 7 + count) if gcd(s, count) == 1)
        self._free = [1 + i * stride % count for i in range(count)]

    def share(self, new: str, old: str) -> int:
        """Starts `new` with the full blocks of `old`. Returns the number of tokens in them."""
        whole = self.lens[old] // self.limits.block_size
        self.tables[new] = self.tables[old][:whole]
        self.lens[new] = whole * self.limits.block_size
        return self.lens[new]

    def cut(self, name: str, blocks: int) -> None:
        """Shortens a sequence to its first full blocks. The others stay in use."""
        self.tables[name] = self.tables[name][:blocks]
        self.lens[name] = blocks * self.limits.block_size

    def drop(self, name: str) -> None:
        """Frees the blocks of a sequence that shares none. They are the next ones to be used again."""
        self._free += self.tables.pop(name)
        del self.lens[name]

    def take_back(self, name: str, tokens: int) -> None:
        """Forgets the last tokens of a sequence: drafts that were wrong. Their K and V stay where they are."""
        self.lens[name] -= tokens

    def order(self, chunks: Mapping[str, int], queries: int = 1) -> list[str]:
        """The rows of a step in order: decode rows, which have up to `queries` tokens, first."""
        return sorted(chunks, key=lambda name: chunks[name] > queries)

    def step(
        self, chunks: Mapping[str, int], *, padded_rows: int = 0, host_slack: int = 0, queries: int = 1
    ) -> StepInputs:
        """The inputs of a step that appends so many tokens to each sequence.

        `queries`: the most tokens of a decode row; 0: all rows are prefill rows. `padded_rows`: rows in the dummy
        block, after a step of decode rows: of one token each; with more `queries`, of none, and the step has tokens for
        that many in each row, while the host knows what a captured `fill` does: upper bounds. `host_slack`: how much
        the host overestimates the lengths of decode rows, or of all rows if none is one.
        """
        rows, size = self.order(chunks, queries), self.limits.block_size
        tables = torch.zeros(len(rows) + padded_rows, self.limits.max_blocks, dtype=torch.int32)
        slots, positions = list[int](), list[int]()
        for row, name in enumerate(rows):
            table, before = self.tables.setdefault(name, []), self.lens.get(name, 0)
            after = self.lens[name] = before + chunks[name]
            while len(table) * size < after:
                table.append(self._free.pop())
            used = table[: -(-after // size)]
            tables[row, : len(used)] = torch.tensor(used, dtype=torch.int32)
            slots += [table[p // size] * size + p % size for p in range(before, after)]
            positions += range(before, after)
        captured = queries > 1 and padded_rows > 0
        counts = [chunks[name] for name in rows] + [int(not captured)] * padded_rows
        lens = [self.lens[name] for name in rows] + [int(not captured)] * padded_rows
        padding = [0] * ((len(counts) * queries if captured else sum(counts)) - len(slots))
        decode = [count <= queries for count in counts]
        most = self.limits.max_model_len
        bounds = [min(n + host_slack * (each or not queries), most) for n, each in zip(lens, decode, strict=True)]
        return StepInputs(
            block_tables=tables.to(self.device),
            seq_lens=torch.tensor(lens, dtype=torch.int32, device=self.device),
            query_start_loc=torch.tensor([0, *counts]).cumsum(0).to(self.device, torch.int32),
            slot_mapping=torch.tensor(slots + padding, device=self.device),
            positions=torch.tensor(positions + padding, device=self.device),
            num_decode_rows=sum(decode),
            query_lens_host=(queries,) * len(counts) if captured else tuple(counts),
            seq_lens_host=(most,) * len(counts) if captured else tuple(bounds),
            decode_query_len=max(1, queries),
        )
