"""Random paged batches, a naive reference, and the machinery to compare a backend with it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nanoengine.api import AttentionBackend, AttentionLayerSpec, BatchLimits, KVSpec, StepInputs
from nanoengine.kernels.kv_quant import dequantise_heads, quantise_heads


@dataclass(kw_only=True)
class Case:
    """A step: rows of (query length, context length with this step's tokens), decode rows first.

    `decode_queries`: more than 1: rows of up to so many tokens are decode rows too, and rows of padding have no token.
    """

    rows: list[tuple[int, int]]
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 16
    block_size: int = 4
    window: int | None = None
    soft_cap: float | None = None
    with_sinks: bool = False
    causal: bool = True
    dtype: torch.dtype = torch.float32
    seed: int = 0
    padded_rows: int = 0  # decode rows of length 1 on the dummy block, behind the others
    tail: int = 0  # tokens behind the last row
    host_slack: int = 0  # by how much the host overestimates decode rows
    decode_queries: int = 1
    kv_dtype: str = "auto"
    max_model_len: int = 0
    device: str = "cpu"
    blocks: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        self.max_model_len = self.max_model_len or max(length for _, length in self.rows) + 8
        needed = [-(-(length + self.host_slack) // self.block_size) for _, length in self.rows]
        ids = list(range(1, sum(needed) + 4))
        rng.shuffle(ids)
        self.num_blocks = len(ids) + 1
        self.blocks = []
        for count in needed:
            self.blocks.append([ids.pop() for _ in range(count)])
        torch.manual_seed(self.seed)
        self.keys = [torch.randn(length, self.kv_heads, self.head_size, dtype=torch.float64) for _, length in self.rows]
        self.values = [torch.randn_like(k) for k in self.keys]
        self.queries = [
            2 * torch.randn(count, self.heads, self.head_size, dtype=torch.float64) for count, _ in self.rows
        ]
        self.sinks = 2 * torch.randn(self.heads) + 1
        for part in (self.keys, self.values, self.queries):  # rounded as the backend will see them
            part[:] = [x.to(self.dtype).double() for x in part]

    @property
    def spec(self) -> AttentionLayerSpec:
        return AttentionLayerSpec(
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_size=self.head_size,
            scale=self.head_size**-0.5,
            window=self.window,
            soft_cap=self.soft_cap,
            sinks=self.sinks.to(self.device) if self.with_sinks else None,
            causal=self.causal,
        )

    @property
    def kv_spec(self) -> KVSpec:
        name = str(self.dtype).removeprefix("torch.")
        shape = {"num_kv_heads": self.kv_heads, "head_size": self.head_size}
        made = KVSpec(**shape, dtype=name, window=self.window, causal=self.causal)
        return replace(made, kv_dtype=self.kv_dtype)

    @property
    def limits(self) -> BatchLimits:
        tokens = sum(count for count, _ in self.rows) + self.padding
        return BatchLimits(
            max_rows=len(self.rows) + self.padded_rows,
            max_tokens=tokens,
            max_model_len=self.max_model_len,
            block_size=self.block_size,
        )

    @property
    def padding(self) -> int:
        """Tokens behind the last one of a row that has an output."""
        return self.tail + (self.padded_rows if self.decode_queries == 1 else 0)

    def slots(self, row: int) -> list[int]:
        """Slot of every position of a row."""
        return [
            self.blocks[row][p // self.block_size] * self.block_size + p % self.block_size
            for p in range(self.rows[row][1])
        ]

    def inputs(self) -> StepInputs:
        tables = torch.zeros(self.limits.max_rows, self.limits.max_blocks, dtype=torch.int32)
        slots: list[int] = []
        positions: list[int] = []
        for row, (count, length) in enumerate(self.rows):
            tables[row, : len(self.blocks[row])] = torch.tensor(self.blocks[row], dtype=torch.int32)
            slots += self.slots(row)[length - count :]
            positions += range(length - count, length)
        one = int(self.decode_queries == 1)
        lens = [length for _, length in self.rows] + [one] * self.padded_rows
        counts = [count for count, _ in self.rows] + [one] * self.padded_rows
        decode = next((i for i, count in enumerate(counts) if count > self.decode_queries), len(counts))
        at = torch.device(self.device)
        slack = [self.host_slack if i < min(decode, len(self.rows)) else 0 for i in range(len(lens))]
        return StepInputs(
            block_tables=tables.to(at),
            seq_lens=torch.tensor(lens, dtype=torch.int32, device=at),
            query_start_loc=torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=at),
            slot_mapping=torch.tensor(slots + [0] * self.padding, device=at),
            positions=torch.tensor(positions + [0] * self.padding, device=at),
            num_decode_rows=decode,
            decode_query_len=self.decode_queries,
            query_lens_host=tuple(counts),
            seq_lens_host=tuple(n + extra for n, extra in zip(lens, slack, strict=True)),
        )

    def step_qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        """This step's queries, keys and values, padding filled with numbers that must not matter."""

        def join(parts: list[Tensor]) -> Tensor:
            rows = torch.cat([x[len(x) - count :] for x, (count, _) in zip(parts, self.rows, strict=True)])
            filler = torch.full((self.padding, *rows.shape[1:]), 7.0)
            return torch.cat([rows, filler]).to(self.dtype).to(self.device)

        return join(self.queries), join(self.keys), join(self.values)

    def reference(self) -> Tensor:
        """float64, one query and one head at a time: [tokens of the real rows, heads, head size]."""
        out = []
        keys, values = ([self.stored(each) for each in part] for part in (self.keys, self.values))
        for q, k, v, (count, length) in zip(self.queries, keys, values, self.rows, strict=True):
            for i in range(count):
                position = length - count + i
                first = 0 if self.window is None else max(0, position - self.window + 1)
                last = length if self.window is None else min(length, position + self.window)
                seen = slice(first, position + 1 if self.causal else last)
                for head in range(self.heads):
                    kv = head // (self.heads // self.kv_heads)
                    scores = k[seen, kv] @ q[i, head] * self.head_size**-0.5
                    if self.soft_cap is not None:
                        scores = self.soft_cap * torch.tanh(scores / self.soft_cap)
                    top = torch.exp(scores)
                    sink = torch.exp(self.sinks[head].double()) if self.with_sinks else 0.0
                    out.append((top / (top.sum() + sink)) @ v[seen, kv])
        return torch.stack(out).view(-1, self.heads, self.head_size)

    def stored(self, x: Tensor) -> Tensor:
        """K or V as the cache holds them."""
        if self.kv_dtype == "auto":
            return x
        return dequantise_heads(*quantise_heads(x, self.kv_dtype), torch.float64)


def run(backend_cls: type[AttentionBackend], case: Case, *, layer: int = 1, layers: int = 2) -> Tensor:
    """The backend's output for the case, whose earlier tokens are stored by an earlier call. Wherever nothing is
    stored, the cache holds NaN."""
    backend = backend_cls(case.kv_spec, case.limits, torch.device(case.device))
    backend.allocate(layers, case.num_blocks)
    cache: Tensor = backend._kv  # type: ignore[attr-defined]
    if case.kv_dtype == "auto":
        cache.fill_(float("nan"))
    else:
        cache.view(torch.uint8).fill_(0x7F)  # NaN of fp8
        backend._scales.fill_(float("nan"))  # type: ignore[attr-defined]
    history(backend, case, layer)
    backend.fill(case.inputs())
    return backend.forward(layer, case.spec, *case.step_qkv())


def history(backend: AttentionBackend, case: Case, layer: int) -> None:
    """Store every token before this step, row by row, by the backend's `store`, or by its forward if it has none."""
    for row, (count, length) in enumerate(case.rows):
        before = length - count
        for first in range(0, before, case.limits.max_tokens):
            last = min(first + case.limits.max_tokens, before)
            one = Case(rows=[(last - first, last)], max_model_len=case.max_model_len, head_size=case.head_size)
            inputs = one.inputs()
            at = torch.device(case.device)
            table = torch.zeros(1, case.limits.max_blocks, dtype=torch.int32)
            table[0, : len(case.blocks[row])] = torch.tensor(case.blocks[row], dtype=torch.int32)
            backend.fill(
                StepInputs(
                    block_tables=table.to(at),
                    seq_lens=inputs.seq_lens.to(at),
                    query_start_loc=inputs.query_start_loc.to(at),
                    slot_mapping=torch.tensor(case.slots(row)[first:last], device=at),
                    positions=inputs.positions.to(at),
                    num_decode_rows=0,
                    query_lens_host=(last - first,),
                    seq_lens_host=(last,),
                )
            )
            k, v = case.keys[row][first:last], case.values[row][first:last]
            k, v = (x.to(case.dtype).to(at) for x in (k, v))
            if hasattr(backend, "store"):
                backend.store(layer, k, v)
            else:
                q = torch.zeros(last - first, case.heads, case.head_size, dtype=case.dtype, device=at)
                backend.forward(layer, case.spec, q, k, v)
