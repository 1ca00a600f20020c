"""Experts of many tokens as grouped products by tensor cores: the pairs of a token and its expert are put in order by
expert on the device, and each tile of a product is of one expert.

Nothing waits for the device and every shape is known in front: there are as many tiles as there can be, and those
without a pair end at once. An expert's tiles begin at slot (pairs before it) // BLOCK_T + its number, so each finds its
place without the others; the last tile of each is filled up with -1.

What an expert makes of a token is written down by pair, and a last kernel sums a token's pairs in their order: no
atomics, so a sum comes out the same every time.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.matvec_parts_triton import finish, halves, load_if, pick_rows
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs


@triton.jit
def _local(ids_ptr, at, pairs, first, E: tl.constexpr):
    """Numbers of experts here; E for those of other ranks, of none, and behind the last pair."""
    e = tl.load(ids_ptr + at, mask=at < pairs, other=-1) - first
    return tl.where((at < pairs) & (e >= 0) & (e < E), e, E)


@triton.jit(do_not_specialize=["pairs", "slots", "first"])
def _sort_kernel(
    ids_ptr, pair_ptr, owner_ptr, pairs, slots, first,
    E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program e: the pairs of expert e, in order, to its slots, and whose each of these slots is."""
    release_dependents(PDL)
    wait_for_inputs(PDL)
    e = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    lower, mine = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.int32)
    for start in range(0, pairs, BLOCK):
        local = _local(ids_ptr, start + lane, pairs, first, E)
        lower += (local < e).to(tl.int32)
        mine += (local == e).to(tl.int32)
    before, count = tl.sum(lower, axis=0), tl.sum(mine, axis=0)
    slot = before // BLOCK_T + e
    end = tl.where(e == E - 1, slots, (before + count) // BLOCK_T + e + 1)
    used = (count + BLOCK_T - 1) // BLOCK_T
    place = slot * BLOCK_T
    for start in range(0, pairs, BLOCK):
        at = start + lane
        found = (_local(ids_ptr, at, pairs, first, E) == e).to(tl.int32)
        tl.store(pair_ptr + place + tl.cumsum(found, axis=0) - 1, at, mask=found > 0)
        place += tl.sum(found, axis=0)
    filler = tl.arange(0, BLOCK_T)
    tl.store(pair_ptr + place + filler, -1 + filler * 0, mask=filler < (slot + used) * BLOCK_T - place)
    for start in range(slot, end, BLOCK):
        at = start + lane
        tl.store(owner_ptr + at, tl.where(at < slot + used, e, -1), mask=at < end)


@triton.jit
def _grouped_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, pair_ptr, owner_ptr, x_stride,
    SHARE: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Outputs of one expert for its pairs of one slot; SHARE pairs have one row of x."""
    width: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    rows: tl.constexpr = 2 * N if GATED else N
    release_dependents(PDL)
    wait_for_inputs(PDL)
    slot = tl.program_id(1)
    e = tl.load(owner_ptr + slot).to(tl.int64)
    if e < 0:
        return
    pair = tl.load(pair_ptr + slot * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    t_mask = (pair >= 0)[None, :]  # a filler that read row 0 would make it what every program waits for
    token = tl.where(pair >= 0, pair, 0) // SHARE
    row, source = pick_rows(tl.program_id(0), N, BLOCK_N, GATED)
    k = tl.arange(0, BLOCK_K)
    w_ptrs = weight_ptr + (e * rows + source[:, None]) * K + k[None, :]
    x_ptrs = x_ptr + token[None, :] * x_stride + k[:, None]
    w_mask = (row < N)[:, None]
    acc = tl.zeros((width, BLOCK_T), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k_left = K - start
        x = tl.load(x_ptrs + start, mask=t_mask & (k[:, None] < k_left), other=0.0)
        w = tl.load(w_ptrs + start, mask=w_mask & (k[None, :] < k_left), other=0.0)
        acc = tl.dot(w, x, acc, input_precision="ieee")
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    y, up = halves(acc, BLOCK_N, BLOCK_T, GATED)
    bias = bias_ptr + e * rows + n
    finish(
        y, up, load_if(HAS_BIAS, bias, n < N), load_if(HAS_BIAS and GATED, bias + N, n < N), 0.0,
        out_ptr + pair[None, :] * N + n, (n < N) & t_mask, GATED, ACTIVATION,
    )  # fmt: skip


@triton.jit
def _combine_kernel(
    parts_ptr, ids_ptr, router_ptr, add_ptr, out_ptr, add_stride, first,
    E: tl.constexpr, TOP_K: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, HAS_ADD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (token, part of the outputs): the weighted sum of what the token's experts made."""
    release_dependents(PDL)
    wait_for_inputs(PDL)
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < N
    y = tl.zeros((BLOCK_N,), tl.float32)
    for j in tl.static_range(TOP_K):
        pair = t * TOP_K + j
        e = tl.load(ids_ptr + pair) - first
        here = (e >= 0) & (e < E)
        part = tl.load(parts_ptr + pair * N + n, mask=n_mask & here, other=0.0).to(tl.float32)
        y += tl.load(router_ptr + pair, mask=here, other=0.0) * part
    if HAS_ADD:
        y += tl.load(add_ptr + t * add_stride + n, mask=n_mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * N + n, y.to(out_ptr.dtype.element_ty), mask=n_mask)


@dataclass(frozen=True, slots=True)
class GroupedTile:
    """Rows of the weight (gates and ups both count), K, warps, pipeline stages."""

    width: int
    block_k: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class GroupedTiles:
    """Pairs a tile, the tiles of both products, and whether what the experts make stays float32 until it is summed."""

    block_t: int
    gate_up: GroupedTile
    down: GroupedTile
    float_parts: bool = True


# Three kinds, which the steps that an engine starts with compile: decode steps, and the largest prefill. Chosen on an
# H200 by `benchmarks/experts.py --tune` at 4 to 8,192 tokens of Qwen3-30B-A3B. While the bytes are the time, tiles
# of 64 to 128 rows differ by 1%; large prefill is bound by what tiles read from L2.
def grouped_tiles(pairs: int, experts: int, itemsize: int) -> GroupedTiles:
    """By the pairs that an expert has on average: few, and the experts' bytes are the time; many, and the products."""
    each = pairs / experts
    if each <= 32:
        tile = GroupedTile(64, 128, warps=4, stages=4) if itemsize == 2 else GroupedTile(64, 64, warps=4, stages=3)
        return GroupedTiles(16 if each <= 8 else 32, tile, tile)
    if itemsize == 2:
        gate_up, down = GroupedTile(128, 64, warps=8, stages=5), GroupedTile(128, 64, warps=8, stages=3)
    else:
        gate_up = down = GroupedTile(64, 32, warps=8, stages=3)
    return GroupedTiles(128, gate_up, down, float_parts=False)


def grouped(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    activation: Activation,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    first: int,
    add: Tensor | None,
    out: Tensor,
    tiles: GroupedTiles | None = None,
) -> Tensor:
    """As `experts.experts`, into `out`. With many tokens what an expert makes is rounded to x's dtype, as there."""
    (count, hidden, width), (rows, top_k) = down.shape, ids.shape
    pairs = rows * top_k
    tiles = tiles or grouped_tiles(pairs, count, x.element_size())
    pair, owner = by_expert(ids, count, first, tiles.block_t)
    inner = torch.empty(pairs, width, dtype=x.dtype, device=x.device)
    _product(x, gate_up, gate_up_bias, inner, pair, owner, tiles.block_t, tiles.gate_up, share=top_k, gate=activation)
    dtype = torch.float32 if tiles.float_parts else x.dtype
    parts = torch.empty(pairs, hidden, dtype=dtype, device=x.device)
    _product(inner, down, down_bias, parts, pair, owner, tiles.block_t, tiles.down)
    block_n = min(1024, triton.next_power_of_2(hidden))
    _combine_kernel[(rows, triton.cdiv(hidden, block_n))](
        parts, ids, weights, x if add is None else add, out, 0 if add is None else add.stride(0), first,
        E=count, TOP_K=top_k, N=hidden, BLOCK_N=block_n, HAS_ADD=add is not None, num_warps=4, **pdl_options(x),
    )  # fmt: skip
    return out


def by_expert(ids: Tensor, experts: int, first: int, block_t: int) -> tuple[Tensor, Tensor]:
    """Pairs (token * k + place), int32 [slots * block_t], of one expert in each slot, -1 where there is none; and the
    expert of each slot, int32 [slots], -1 of those without a pair, whose pairs are not written."""
    pairs = ids.numel()
    slots = pairs // block_t + experts
    pair = torch.empty(slots * block_t, dtype=torch.int32, device=ids.device)
    owner = torch.empty(slots, dtype=torch.int32, device=ids.device)
    block, warps = (512, 4) if pairs <= 512 else (4096, 16) if pairs <= 4096 else (8192, 32)
    _sort_kernel[(experts,)](
        ids, pair, owner, pairs, slots, first,
        E=experts, BLOCK=block, BLOCK_T=block_t, num_warps=warps, **pdl_options(ids),
    )  # fmt: skip
    return pair, owner


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    pair: Tensor,
    owner: Tensor,
    block_t: int,
    tile: GroupedTile,
    *,
    share: int = 1,
    gate: Activation | None = None,
) -> None:
    """out[pair] of every pair. share: pairs that have one row of x."""
    outputs, k = out.shape[1], weight.shape[2]
    block_n = tile.width // 2 if gate else tile.width
    options: dict[str, Any] = pdl_options(x)
    _grouped_kernel[(triton.cdiv(outputs, block_n), len(owner))](
        x, weight, x if bias is None else bias, out, pair, owner, x.stride(0),
        SHARE=share, N=outputs, K=k, BLOCK_T=block_t, BLOCK_N=block_n, BLOCK_K=tile.block_k, STAGES=tile.stages,
        GATED=gate is not None, ACTIVATION=gate, HAS_BIAS=bias is not None, num_warps=tile.warps, **options,
    )  # fmt: skip
