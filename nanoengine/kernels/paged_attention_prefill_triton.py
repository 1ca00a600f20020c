"""Triton: ragged attention, causal or not, of several queries a row over the paged cache.

Queries stand at the end of their row's context, so chunked prompts, prompts behind a cached prefix and whole prompts
are one case. A program takes a tile of queries with all heads of one KV head (they share its keys) and walks the keys:
tiles that every query sees whole go without a mask. Which row a tile belongs to is looked up on the device, so the grid
follows from the numbers of tokens and rows alone.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# ruff: noqa: N803, SIM108 - constants of a kernel are in capitals, and its branches are taken when it is compiled
from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from nanoengine.kernels.gluon import multiprocessors, runs_gluon
from nanoengine.kernels.paged_attention_plan import padded_head
from nanoengine.kernels.paged_attention_read_triton import LOG2E, Scales, blocks_of, capped, rows_of, scaled
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs

_SHARED_FOR_LARGE_HEADS = 196_864  # bytes, as the compiler reports them


@triton.jit
def _row_of_tile(starts, tile, num_rows, BLOCK_Q: tl.constexpr):
    """The last row r in 0..num_rows whose tiles begin at or before `tile`, by bisection.

    Row r's tiles begin at (starts[r] - starts[0]) // BLOCK_Q + r, which leaves room for its last, broken one. Row
    `num_rows` stands for the padding behind the last row.
    """
    origin = tl.load(starts)
    low = 0
    high = num_rows
    while low < high:
        middle = (low + high + 1) // 2
        if (tl.load(starts + middle) - origin) // BLOCK_Q + middle <= tile:
            low = middle
        else:
            high = middle - 1
    return low


@triton.jit
def _walk(
    acc, top, total, query, positions, k_head, v_head, k_scales, v_scales, table, begin, end, length,
    BLOCK_STRIDE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, SOFT_CAP: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr,
    CAUSAL: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys [begin, end), `begin` a multiple of TILE. Not MASKED: every query sees all of them."""
    near = tl.arange(0, TILE)
    d = tl.arange(0, D_PAD)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        keys = start + near
        block = blocks_of(table, start, length, TILE, BLOCK_SIZE)
        at = block * BLOCK_STRIDE + keys % BLOCK_SIZE * D
        place = at // D if SCALED else at
        at = at[:, None] + d[None, :]
        if D == D_PAD:
            key = tl.load(k_head + at)
        else:
            key = tl.load(k_head + at, mask=(d < D)[None, :], other=0.0)
        key, key_scale = scaled(key, k_scales, place, keys < length, query.dtype, SCALED)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if SCALED:
            scores *= key_scale[None, :]
        scores = capped(scores, SCALE, SOFT_CAP)
        if MASKED:
            if CAUSAL:
                seen = keys[None, :] <= positions[:, None]
            elif WINDOW > 0:
                seen = (keys < length)[None, :] & (keys[None, :] < positions[:, None] + WINDOW)
            else:
                seen = (keys < length)[None, :]
            if WINDOW > 0:
                seen = seen & (keys[None, :] > positions[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = higher
        if MASKED and WINDOW > 0:  # a query may have seen nothing yet
            base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(scores - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(p, 1)
        if MASKED:  # stale memory behind the row's end may hold anything, and 0 * inf is no zero
            value = tl.load(v_head + at, mask=(keys < length)[:, None] & (d < D)[None, :], other=0.0)
        elif D == D_PAD:
            value = tl.load(v_head + at)
        else:
            value = tl.load(v_head + at, mask=(d < D)[None, :], other=0.0)
        value, value_scale = scaled(value, v_scales, place, keys < length, query.dtype, SCALED)
        if SCALED:
            p *= value_scale[None, :]
        acc = tl.dot(p.to(value.dtype), value, acc * fade[:, None], input_precision="ieee")
        top = higher
    return acc, top, total


@triton.jit(do_not_specialize=["num_rows", "num_tokens"])
def _prefill(
    q, k_cache, v_cache, k_scales, v_scales, out, block_tables, seq_lens, starts, q_stride, table_stride, num_rows,
    num_tokens, sinks,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, TILE: tl.constexpr, SCALE: tl.constexpr, WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
    SINKS: tl.constexpr, CAUSAL: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # a row's longest tiles first
    kv_head = tl.program_id(1)
    wait_for_inputs(PDL)
    release_dependents(PDL)
    row = _row_of_tile(starts, tile, num_rows, BLOCK_Q)
    start = tl.load(starts + row)
    first = start + (tile - ((start - tl.load(starts)) // BLOCK_Q + row)) * BLOCK_Q  # token
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, D_PAD)
    token = first + m // GROUP
    head = kv_head * GROUP + m % GROUP
    own = token.to(tl.int64) * (KV_HEADS * GROUP * D) + head * D
    if row == num_rows:  # padding: never read, but it must be finite
        live = (token < num_tokens) & (m < BLOCK_Q * GROUP)
        nothing = tl.zeros([BLOCK_M, D_PAD], out.dtype.element_ty)
        tl.store(out + own[:, None] + d[None, :], nothing, mask=live[:, None] & (d < D)[None, :])
        return
    stop = tl.load(starts + row + 1)
    if first >= stop:
        return
    live = ((token < stop) & (m < BLOCK_Q * GROUP))[:, None] & (d < D)[None, :]
    query = tl.load(q + (token.to(tl.int64) * q_stride + head * D)[:, None] + d[None, :], mask=live, other=0.0)

    length = tl.load(seq_lens + row)
    lowest = length - stop + first  # position of the tile's first query
    positions = lowest + m // GROUP
    table = block_tables + row.to(tl.int64) * table_stride
    k_head = k_cache + kv_head * (BLOCK_SIZE * D)
    v_head = v_cache + kv_head * (BLOCK_SIZE * D)
    k_scales += kv_head * BLOCK_SIZE
    v_scales += kv_head * BLOCK_SIZE
    stride: tl.constexpr = KV_HEADS * BLOCK_SIZE * D
    whole = (lowest + 1) // TILE * TILE  # keys in front of it are behind no query
    end = tl.minimum(lowest + BLOCK_Q, length)
    if not CAUSAL:
        whole = length // TILE * TILE
        end = length
        if WINDOW > 0:
            end = tl.minimum(lowest + BLOCK_Q - 1 + WINDOW, length)
            whole = tl.maximum(lowest - WINDOW + 1, 0) // TILE * TILE

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:  # a key without a value
        top = LOG2E * tl.load(sinks + head).to(tl.float32)
        total += 1.0
    acc = tl.zeros([BLOCK_M, D_PAD], tl.float32)
    begin = 0
    if WINDOW > 0 and not CAUSAL:  # few keys: all of them with a mask
        begin = whole
    elif WINDOW > 0:
        edge = tl.maximum(lowest - WINDOW + 1, 0) // TILE * TILE
        begin = tl.minimum(tl.cdiv(tl.maximum(end - WINDOW, 0), TILE) * TILE, whole)
        acc, top, total = _walk(
            acc, top, total, query, positions, k_head, v_head, k_scales, v_scales, table, edge, begin, length,
            stride, D, D_PAD, BLOCK_SIZE, TILE, SCALE, WINDOW, SOFT_CAP, STAGES, True, CAUSAL, SCALED,
        )  # fmt: skip
    acc, top, total = _walk(
        acc, top, total, query, positions, k_head, v_head, k_scales, v_scales, table, begin, whole, length,
        stride, D, D_PAD, BLOCK_SIZE, TILE, SCALE, WINDOW, SOFT_CAP, STAGES, False, CAUSAL, SCALED,
    )  # fmt: skip
    acc, top, total = _walk(
        acc, top, total, query, positions, k_head, v_head, k_scales, v_scales, table, whole, end, length,
        stride, D, D_PAD, BLOCK_SIZE, TILE, SCALE, WINDOW, SOFT_CAP, STAGES, True, CAUSAL, SCALED,
    )  # fmt: skip
    mixed = acc / total[:, None]
    tl.store(out + own[:, None] + d[None, :], mixed.to(out.dtype.element_ty), mask=live)


@dataclass(frozen=True, slots=True)
class PrefillConfig:
    """`block_m`: (query, head) pairs a program; `tile`: keys an iteration; `stages`: tiles in flight."""

    block_m: int
    tile: int
    warps: int
    stages: int


def prefill_config(group: int, head_size: int, itemsize: int, shared_memory: int) -> PrefillConfig:
    """By shapes and the bytes of shared memory a program may have, as measured on an H200.

    Small tiles at 128 x bf16, so that several programs share a multiprocessor and one computes while another waits: 8
    rows of 1,024 tokens took 141 us with them and 148 us with 128 pairs and 8 stages; 300 + 244 tokens 10.6 and 12 us.
    """
    width, least = padded_head(head_size), max(16, triton.next_power_of_2(group))
    if itemsize == 4:  # no tensor cores with full precision; operands twice as large
        return PrefillConfig(block_m=max(32, least), tile=32 if width <= 128 else 16, warps=8, stages=2)
    if width > 128:
        if shared_memory >= _SHARED_FOR_LARGE_HEADS:
            return PrefillConfig(block_m=max(128, least), tile=64, warps=8, stages=3)
        return PrefillConfig(block_m=max(64, least), tile=32, warps=4, stages=2)
    return PrefillConfig(block_m=max(64, least), tile=64, warps=4, stages=2)


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes a program may have; a Hopper GPU's in the interpreter."""
    if device.type != "cuda":
        return 232_448
    properties = driver.active.utils.get_device_properties(device.index or 0)
    return int(properties["max_shared_mem"])


def _attends_by_warps(
    q: Tensor, k_cache: Tensor, *read: Tensor, scale: float, counter: Tensor, decode_behind: bool
) -> bool:
    """Whether the kernel in Gluon takes it, and has been launched."""
    if not runs_gluon(q.device, "prompts are read by a slower kernel", "paged_attention_prefill_gluon"):
        return False
    from nanoengine.kernels import paged_attention_prefill_gluon as by_gluon

    if not by_gluon.takes(q, k_cache):
        return False
    kv_heads = k_cache.shape[1]
    group = q.shape[1] // kv_heads
    config = by_gluon.warps_config(len(q), group, kv_heads, multiprocessors(q.device), decode_behind=decode_behind)
    by_gluon.attend_prefill(q, k_cache, *read, scale=scale, counter=counter, config=config)
    return True


def attend_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    *,
    scale: float,
    window: int | None,
    soft_cap: float | None,
    config: PrefillConfig | None = None,
    sinks: Tensor | None = None,
    causal: bool = True,
    scales: Scales | None = None,
    counter: Tensor | None = None,
    decode_behind: bool = False,
) -> None:
    """Queries q [T, heads, head_size] of R rows into `out`, the same shape and contiguous.

    Row r's are tokens query_start_loc[r] .. query_start_loc[r + 1] (int32 [R + 1], on the device, which may begin above
    0: earlier tokens are left alone), the last of its seq_lens[r] (int32 [R]) tokens; `block_tables` int32 [R, blocks].
    Tokens behind the last row come out as zeros. `sinks`, `scales`: as in `attend_decode`. `causal` False: queries see
    all keys of their row; with a window, those that are less than `window` positions before or behind. `counter`: int32
    [1], at first 0, for launches that follow each other in one stream: on Hopper GPUs `paged_attention_prefill_gluon`
    does what it can; None: it does nothing. `decode_behind`: `attend_decode` of other rows is launched beside it.
    """
    tokens, heads, width = q.shape
    rows, (kv_heads, block_size) = len(seq_lens), k_cache.shape[1:3]
    if tokens == 0:
        return
    group, q = heads // kv_heads, rows_of(q)
    plain = causal and window is None and soft_cap is None and sinks is None and scales is None
    if counter is not None and plain and scale > 0:
        read = (q, k_cache, v_cache, out, block_tables, seq_lens, query_start_loc)
        if _attends_by_warps(*read, scale=scale, counter=counter, decode_behind=decode_behind):
            return
    config = config or prefill_config(group, width, q.element_size(), _shared_memory(q.device))
    block_q = config.block_m // group
    # An upper bound where query_start_loc begins above 0: which number that is, only the device need know.
    _prefill[(tokens // block_q + rows + 1, kv_heads)](
        q, k_cache, v_cache, *(scales or (q, q)), out, block_tables, seq_lens, query_start_loc, q.stride(0),
        block_tables.stride(0), rows, tokens, q if sinks is None else sinks,
        KV_HEADS=kv_heads, GROUP=group, D=width, D_PAD=padded_head(width), BLOCK_SIZE=block_size,
        BLOCK_M=config.block_m, BLOCK_Q=block_q, TILE=config.tile, SCALE=scale, WINDOW=window or 0,
        SOFT_CAP=soft_cap or 0.0, STAGES=config.stages, SINKS=sinks is not None, CAUSAL=causal,
        SCALED=scales is not None,
        num_warps=config.warps,
        **pdl_options(q),
    )  # fmt: skip
