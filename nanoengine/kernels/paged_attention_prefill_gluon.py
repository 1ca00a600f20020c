"""Causal attention of many queries a row over the paged cache, for Hopper GPUs: `paged_attention_prefill_triton` by
warps with roles.

One warp asks the copy engine for tiles: queries, all heads of a KV head beside each other, and keys and values, block
by block. One or two warpgroups multiply, 64 (query, head) pairs each: the products with the next tile of keys are asked
for before the softmax of this one, and those with its values run beside that of the next. A program stays for several
tiles of queries where there are more than multiprocessors: so the copies of the next tile begin before the last
products of this one. Gluon has no interpreter: this kernel is tested on a GPU, and compiled everywhere.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nanoengine.kernels.gluon import multiprocessors
from nanoengine.kernels.paged_attention_copies_gluon import (
    END,
    FACTS,
    FIRST,
    HALF,
    HEAD,
    KV_HEAD,
    LENGTH,
    LOWEST,
    STOP,
    D,
    M,
    barrier,
    fact,
    produce,
)
from nanoengine.kernels.paged_attention_read_triton import LOG2E, rows_of

_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
_TILES = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
_QUERIES = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3))
_MIXED = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
_STORED = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))


@gluon.jit
def _softmax(scores, top, total, positions, begin, SCALE: gl.constexpr, TILE: gl.constexpr, MASKED: gl.constexpr):
    """A step of the online softmax. Every query has seen a key. SCALE: with log2(e)."""
    if MASKED:
        near = gl.arange(0, TILE, layout=gl.SliceLayout(0, scores.type.layout))
        scores = gl.where((begin + near)[None, :] <= positions[:, None], scores, float("-inf"))
    higher = gl.maximum(top, gl.max(scores, 1))
    fade = gl.exp2((top - higher) * SCALE)
    share = gl.exp2(scores * SCALE - (higher * SCALE)[:, None])
    return share, higher, total * fade + gl.sum(share, 1), fade


@gluon.jit
def _zero_behind(values, stage, known, TILE: gl.constexpr):
    """Stale memory behind the row's end may hold anything, and 0 * inf is no zero. Where there are two warpgroups both
    do this, and write the same."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    near = gl.arange(0, TILE, layout=gl.SliceLayout(1, layout))
    value = values.index(stage).load(layout)
    values.index(stage).store(gl.where((near < known)[:, None], value, gl.zeros_like(value)))
    fence_async_shared()
    barrier()


@gluon.jit
def _advance(
    acc, share, top, total, query, copied, ready, free, at, positions, begin,
    SCALE: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Scores of tile `at`, which begins at key `begin`, while the shares of the tile before are multiplied."""
    _, keys, values = copied
    _, k_ready, v_ready = ready
    _, k_free, v_free = free
    dtype: gl.constexpr = keys.dtype
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    stage, before = at % STAGES, (at - 1) % STAGES
    nothing = gl.zeros([M, TILE], gl.float32, layout=scored)
    mbarrier.wait(k_ready.index(stage), at // STAGES & 1)
    scores = warpgroup_mma(query, keys.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
    mbarrier.wait(v_ready.index(before), (at - 1) // STAGES & 1)
    acc = warpgroup_mma(share, values.index(before), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(scores,))
    barrier()
    mbarrier.arrive(k_free.index(stage))
    p, top, total, fade = _softmax(scores, top, total, positions, begin, SCALE, TILE, MASKED)
    p = gl.convert_layout(p.to(dtype), share.type.layout)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    barrier()
    mbarrier.arrive(v_free.index(before))
    acc *= gl.convert_layout(fade, gl.SliceLayout(1, _MIXED))[:, None]
    return acc, p, top, total


@gluon.jit
def _leave(out, acc, first, stop, head, number: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr):
    """Stores what a warpgroup has mixed."""
    rows = gl.convert_layout(acc.to(out.dtype.element_ty), _STORED)
    m = gl.arange(0, M, layout=gl.SliceLayout(1, _STORED))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, _STORED))
    token = first + (number * M + m) // GROUP
    own = token.to(gl.int64) * (KV_HEADS * GROUP * D) + (head * GROUP + m % GROUP) * D
    gl.store(out + own[:, None] + d[None, :], rows, mask=(token < stop)[:, None] & (d >= 0)[None, :])


@gluon.jit
def _consume(
    out, copied, facts, ready, free, number: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr,
    TILE: gl.constexpr, STAGES: gl.constexpr, SCALE: gl.constexpr,
):  # fmt: skip
    """A warpgroup: the softmax and both products of its 64 pairs of every tile of queries. copied, ready, free: of
    queries, keys and values."""
    queries, keys, values = copied
    q_ready, k_ready, v_ready = ready
    q_free, k_free, v_free = free
    dtype: gl.constexpr = keys.dtype
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    shared: gl.constexpr = gl.DotOperandLayout(0, _MIXED, k_width=2)
    query = queries.index(number)
    taken = 0
    at = 0
    mbarrier.wait(q_ready.index(0), 0)
    end = fact(facts, END)
    while end >= 0:
        first, stop, lowest = fact(facts, FIRST), fact(facts, STOP), fact(facts, LOWEST)
        length, head = fact(facts, LENGTH), fact(facts, KV_HEAD)
        acc = gl.zeros([M, D], gl.float32, layout=_MIXED)
        if end > 0:
            m = gl.arange(0, M, layout=gl.SliceLayout(1, scored))
            positions = lowest + (number * M + m) // GROUP
            stage = at % STAGES
            nothing = gl.zeros([M, TILE], gl.float32, layout=scored)
            mbarrier.wait(k_ready.index(stage), at // STAGES & 1)
            scores = warpgroup_mma(query, keys.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            barrier()
            mbarrier.arrive(k_free.index(stage))
            top = gl.full([M], float("-inf"), gl.float32, layout=gl.SliceLayout(1, scored))
            total = gl.zeros([M], gl.float32, layout=gl.SliceLayout(1, scored))
            p, top, total, _ = _softmax(scores, top, total, positions, 0, SCALE, TILE, True)
            share = gl.convert_layout(p.to(dtype), shared)
            at += 1
            whole = (lowest + 1) // TILE * TILE  # keys in front of it are behind no query
            for begin in range(TILE, whole, TILE):
                acc, share, top, total = _advance(
                    acc, share, top, total, query, copied, ready, free, at, positions, begin, SCALE, TILE, STAGES,
                    False,
                )  # fmt: skip
                at += 1
            for begin in range(gl.maximum(whole, TILE), end, TILE):
                acc, share, top, total = _advance(
                    acc, share, top, total, query, copied, ready, free, at, positions, begin, SCALE, TILE, STAGES,
                    True,
                )  # fmt: skip
                at += 1
            barrier()
            mbarrier.arrive(q_free.index(0))
            stage = (at - 1) % STAGES
            mbarrier.wait(v_ready.index(stage), (at - 1) // STAGES & 1)
            known = length - (end - 1) // TILE * TILE
            if known < TILE:
                _zero_behind(values, stage, known, TILE)
            acc = warpgroup_mma(share, values.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=(acc,))
            barrier()
            mbarrier.arrive(v_free.index(stage))
            acc /= gl.convert_layout(total, gl.SliceLayout(1, _MIXED))[:, None]
        else:
            barrier()
            mbarrier.arrive(q_free.index(0))
        _leave(out, acc, first, stop, head, number, KV_HEADS, GROUP)
        taken += 1
        mbarrier.wait(q_ready.index(0), taken & 1)
        end = fact(facts, END)


@gluon.jit(
    do_not_specialize=["num_rows", "num_tokens", "table_stride"],
    do_not_specialize_on_alignment=["tables", "seq_lens", "starts"],
)
def _prefill_kernel(
    q_desc, k_desc, v_desc, out, tables, seq_lens, starts, counter, num_rows, num_tokens, table_stride,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, BLOCK: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr, SCALE: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_desc.dtype
    box: gl.constexpr = min(BLOCK, TILE)
    q_boxes = gl.allocate_shared_memory(dtype, [2 * CONSUMERS, M // GROUP, GROUP, HALF], _QUERIES)
    k_boxes = gl.allocate_shared_memory(dtype, [2 * STAGES * TILE // box, box, HALF], _TILES)
    v_boxes = gl.allocate_shared_memory(dtype, [2 * STAGES * TILE // box, box, HALF], _TILES)
    queries = q_boxes._reinterpret(dtype, [CONSUMERS, M, D], _TILES)
    keys = k_boxes._reinterpret(dtype, [STAGES, TILE, D], _TILES)
    values = v_boxes._reinterpret(dtype, [STAGES, TILE, D], _TILES)
    facts = gl.allocate_shared_memory(gl.int32, [FACTS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready.index(0), count=1)
    mbarrier.init(q_free.index(0), count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(i), count=1)
        mbarrier.init(k_free.index(i), count=CONSUMERS)
        mbarrier.init(v_ready.index(i), count=1)
        mbarrier.init(v_free.index(i), count=CONSUMERS)
    fence_async_shared()
    copied, boxes = (queries, keys, values), (q_boxes, k_boxes, v_boxes)
    ready, free = (q_ready, k_ready, v_ready), (q_free, k_free, v_free)
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_consume, (out, copied, facts, ready, free, 0, KV_HEADS, GROUP, TILE, STAGES, SCALE)),
                (produce, (
                    q_desc, k_desc, v_desc, tables, seq_lens, starts, counter, num_rows, num_tokens, table_stride,
                    boxes, facts, ready, free, KV_HEADS, GROUP, BLOCK, TILE, STAGES, CONSUMERS,
                )),
            ], [1], [40],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consume, (out, copied, facts, ready, free, 0, KV_HEADS, GROUP, TILE, STAGES, SCALE)),
                (_consume, (out, copied, facts, ready, free, 1, KV_HEADS, GROUP, TILE, STAGES, SCALE)),
                (produce, (
                    q_desc, k_desc, v_desc, tables, seq_lens, starts, counter, num_rows, num_tokens, table_stride,
                    boxes, facts, ready, free, KV_HEADS, GROUP, BLOCK, TILE, STAGES, CONSUMERS,
                )),
            ], [4, 1], [232, 40],
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class WarpsConfig:
    """`consumers`: warpgroups that multiply, 1 or 2, of 64 (query, head) pairs each; `tile`: keys an iteration;
    `stages`: tiles in shared memory; `programs`: on a multiprocessor, each for several tiles of queries."""

    consumers: int
    tile: int
    stages: int
    programs: float

    @property
    def registers(self) -> int:
        """A thread may have as the program starts: two programs of one consumer fit a multiprocessor. 0: all that there
        are."""
        return 128 if self.consumers == 1 else 0


def warps_config(
    tokens: int, group: int, kv_heads: int, processors: int, *, decode_behind: bool = False
) -> WarpsConfig:
    """By the tokens of a step, as measured on an H200.

    Many tokens: 128 pairs share each key. 8 rows of 1,024 took 92 us (82 with 64 pairs, Triton 141), 1 of 8,192 took
    437 (580, 773). Few: two programs of 64 pairs work while the other waits: 300 tokens took 7.1 us (11.7, 10.4).
    decode_behind: beside the decode of other rows, whose programs find room next to one: 128 rows of 350 keys and
    prompts of 500 tokens took 54.4 us (two programs 54.6, Triton 58.8), 100 rows and 1,200 tokens 50.7 (51.9, 57.0).
    """
    if tokens * group * kv_heads >= 4 * 128 * processors:
        return WarpsConfig(consumers=2, tile=128, stages=2, programs=1)
    return WarpsConfig(consumers=1, tile=64, stages=2, programs=1 if decode_behind else 2)


def takes(q: Tensor, k_cache: Tensor) -> bool:
    """Whether `attend_prefill` can: heads of 128, as many of q for each of K as divide 64, blocks that fill tiles or
    are filled by them."""
    kv_heads, block_size, width = k_cache.shape[1:]
    plain = q.dtype in _TYPES and q.dtype == k_cache.dtype and width == HEAD
    return plain and 64 % (q.shape[1] // kv_heads) == 0 and block_size >= 16 and block_size & (block_size - 1) == 0


def attend_prefill(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, block_tables: Tensor, seq_lens: Tensor,
    query_start_loc: Tensor, *, scale: float, counter: Tensor, config: WarpsConfig,
) -> None:  # fmt: skip
    """As `paged_attention_prefill_triton.attend_prefill`, of what `takes` takes."""
    tokens, heads, width = q.shape
    rows, (kv_heads, block_size) = len(seq_lens), k_cache.shape[1:3]
    if tokens == 0:
        return
    group, q = heads // kv_heads, rows_of(q)
    tiles = tokens // (64 * config.consumers // group) + rows + 1  # an upper bound; only the device knows
    grid = min(tiles * kv_heads, max(1, int(multiprocessors(q.device) * config.programs)))
    box = [64 // group, group, width // 2]
    tile = [min(block_size, config.tile), width // 2]
    lines = (-1, width)
    few = {"maxnreg": config.registers} if config.registers else {}
    _prefill_kernel[(grid,)](
        TensorDescriptor(q, list(q.shape), [q.stride(0), width, 1], box, _QUERIES.value),
        TensorDescriptor.from_tensor(k_cache.view(lines), tile, _TILES.value),
        TensorDescriptor.from_tensor(v_cache.view(lines), tile, _TILES.value),
        out, block_tables, seq_lens, query_start_loc, counter, rows, tokens, block_tables.stride(0),
        KV_HEADS=kv_heads, GROUP=group, BLOCK=block_size, TILE=config.tile, STAGES=config.stages,
        CONSUMERS=config.consumers, SCALE=scale * LOG2E,
        num_warps=4, launch_pdl=True, **few,
    )  # fmt: skip
