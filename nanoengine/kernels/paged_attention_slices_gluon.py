"""Attention of one query a row, from qkv, on GPUs of compute capability 9.0: a program asks for its first keys and
values before the product in front has ended.

At few rows a program has a multiprocessor to itself, and what takes time is the chain of steps that wait for each
other. So there is one softmax over all keys that shared memory holds, not one a tile: all scores by tensor cores, one
maximum, all shares, and all products with the values. Keys go down and query heads across, so that K and V are read as
they lie.

Where a row is split, parts are not counted by tickets: each word of scratch memory that is not EMPTY, a sum and its
mark, has arrived. The
row's last program waits for the words of those before it, which started earlier and wait for none; then it sets them to
EMPTY again.

Gluon says where everything lies, which Triton does not. It has no interpreter: this kernel is tested on a GPU, and
compiled everywhere.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nanoengine.kernels.paged_attention_plan import NewTokens
from nanoengine.kernels.paged_attention_slices import EMPTY, HEAD, WARPS, SlicesConfig, SlicesScratch
from nanoengine.kernels.pdl_triton import release_dependents, wait_for_inputs

_LOG2E = gl.constexpr(1.4426950408889634)
_D, _HALF, _WARPS, _TILE = gl.constexpr(HEAD), gl.constexpr(HEAD // 2), gl.constexpr(WARPS), gl.constexpr(16 * WARPS)
_EMPTY = gl.constexpr(EMPTY)
# How keys come into shared memory, 16 bytes a thread; how they lie there; a head of the query a warp.
_COPIED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0]))
_LIES = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))
_HEADS = gl.constexpr(gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0]))


def _until_there(words: int) -> str:
    """Loads so many words of 64 bits, again and again until the lower half of none is EMPTY."""
    names = range(words)
    loads = "".join(
        f"ld.relaxed.gpu.global.b64 w{i}, [${2 * words + i}];\nmov.b64 {{${i}, ${words + i}}}, w{i};\n" for i in names
    )
    tests = "".join(f"setp.eq.or.u32 p, ${i}, 0x{EMPTY & 0xFFFFFFFF:08X}, p;\n" for i in names)
    begin = f"{{\n.reg .pred p;\n.reg .b64 w<{words}>;\nagain:\nsetp.ne.u32 p, 0, 0;\n"
    return begin + loads + tests + "@p bra again;\n}"


_UNTIL_THERE = gl.constexpr(_until_there(8))
_WORDS = gl.constexpr(",".join(["=&r"] * 16 + ["l"] * 8))


@gluon.jit
def _wait_for(ptrs):
    """Two of float32 that another program writes to each EMPTY word."""
    lower, upper = gl.inline_asm_elementwise(
        _UNTIL_THERE, _WORDS, [ptrs], dtype=(gl.int32, gl.int32), is_pure=False, pack=8
    )
    return lower.to(gl.float32, bitcast=True), upper.to(gl.float32, bitcast=True)


@triton.jit
def _barrier():
    tl.debug_barrier()


@gluon.jit
def _lines(table, kv_head, first, end, KV_HEADS: gl.constexpr, BLOCK: gl.constexpr, KEYS: gl.constexpr):
    """int64 [KEYS]: where keys from `first` on lie, counted in heads of tokens; anything from `end` on."""
    keys = first + gl.arange(0, KEYS, layout=gl.SliceLayout(1, _COPIED))
    block = gl.load(table + keys // BLOCK, mask=keys < end, other=0).to(gl.int64)
    return (block * KV_HEADS + kv_head) * BLOCK + keys % BLOCK


@gluon.jit
def _ask(cache, kept, lines, first, end, KEYS: gl.constexpr):
    """Asks for K or V of KEYS keys from `first` on; zeros from `end` on. One copy: there would be a barrier between
    two to the same memory."""
    d = gl.arange(0, _D, layout=gl.SliceLayout(0, _COPIED))[None, :]
    live = (first + gl.arange(0, KEYS, layout=gl.SliceLayout(1, _COPIED)) < end)[:, None]
    async_copy.async_copy_global_to_shared(kept, cache + lines[:, None] * _D + d, mask=live & (d >= 0))
    async_copy.commit_group()


@gluon.jit
def turned(raw, swapped, weight, swapped_weight, cos, sin, squares, eps, NORM: gl.constexpr):
    """Heads, normalised where there is a norm, and rotated; as in `paged_attention_decode_triton`. squares: their sums
    of squares."""
    a, b = raw.to(gl.float32), swapped.to(gl.float32)
    if NORM:
        scale = gl.rsqrt(squares / _D + eps)
        a = (a * scale * weight).to(raw.dtype).to(gl.float32)
        b = (b * scale * swapped_weight).to(raw.dtype).to(gl.float32)
    return (a * cos + b * sin).to(raw.dtype)


@gluon.jit
def _shares(scores, shares, top, first, end, KEYS: gl.constexpr, SCALE: gl.constexpr, LAYOUT: gl.constexpr):
    """Products [KEYS, N] of keys from `first` on -> (the highest score [N], their shares [KEYS, N]), which go to shared
    memory too. top: the highest so far."""
    live = (first + gl.arange(0, KEYS, layout=gl.SliceLayout(1, LAYOUT)) < end)[:, None]
    scores = gl.where(live, scores * (SCALE * _LOG2E), float("-inf"))
    higher = gl.maximum(top, gl.max(scores, 0))  # finite: there is a key that is seen
    share = gl.exp2(scores - higher[None, :])
    shares.permute((1, 0)).store(share.to(shares.dtype))
    return higher, share


@gluon.jit
def _join(own, mark, part, parts, GROUP: gl.constexpr, N: gl.constexpr, LAYOUT: gl.constexpr):
    """This program's part [D, N] of the row and those of the `parts` programs before it, which it waits for, each by
    its share of the softmax's denominator."""
    head = gl.minimum(gl.arange(0, N, layout=gl.SliceLayout(0, LAYOUT)), GROUP - 1)
    place = head[None, :] * _D + gl.arange(0, _D, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    total = gl.full([_D, N], 1.0, gl.float32, layout=LAYOUT)
    highest = mark[None, :] + total * 0.0
    for i in range(parts):
        theirs, marks = _wait_for(part + i * (GROUP * _D) + place)
        higher = gl.maximum(highest, marks)
        fade, share = gl.exp2(highest - higher), gl.exp2(marks - higher)
        total = total * fade + share
        own = own * fade + theirs * share
        highest = higher
    return own / total


@gluon.jit
def _decode_slices_kernel(
    qkv, k_cache, v_cache, out, block_tables, seq_lens, part, qkv_stride, table_stride,
    slots, inv_freq, q_weight, k_weight, eps,
    FUSED: gl.constexpr, NORM: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, N: gl.constexpr,
    BLOCK: gl.constexpr, KEYS: gl.constexpr, SPLITS: gl.constexpr, LEAST: gl.constexpr, SCALE: gl.constexpr,
):  # fmt: skip
    """FUSED: of qkv, as `attend_slices` says. Else of q, behind the prefill attention of other rows: all that is read
    here is complete when this starts, and it waits at its end (see `pdl_triton`), so both run at the same time.

    N: columns of query heads, of which GROUP are some. LEAST: the fewest tiles that a part is worth."""
    kv_head, row = gl.program_id(0), gl.program_id(1).to(gl.int64)
    split = gl.program_id(2)  # slowest: a program waits for those that start before it
    if FUSED:
        release_dependents(True)
    scored: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[_WARPS, 1], instr_shape=[16, N, 16])
    dtype: gl.constexpr = k_cache.dtype.element_ty
    keys = gl.allocate_shared_memory(dtype, [KEYS, _D], _LIES)
    values = gl.allocate_shared_memory(dtype, [KEYS, _D], _LIES)
    query = gl.allocate_shared_memory(dtype, [N, _D], _LIES)
    shares = gl.allocate_shared_memory(dtype, [N, KEYS], _LIES)

    # Lengths and tables are complete before a step's first layer, and so is what the cache has of earlier steps: see
    # `paged_attention_decode_triton`. The newest key comes from qkv.
    length = gl.load(seq_lens + row)
    stop = length
    if FUSED:
        stop = length - 1
    tiles = gl.cdiv(stop, _TILE)
    each = gl.maximum(gl.cdiv(tiles, SPLITS), LEAST)
    used = gl.maximum(gl.cdiv(tiles, each), 1)
    each = gl.cdiv(tiles, used)
    begin = 0  # so that a row's table need not wait for its length
    if SPLITS > 1:
        begin = split * each * _TILE
    end = gl.minimum(begin + each * _TILE, stop)
    newest = split == used - 1
    if split >= used:  # a row's first program is there and waits, so that this launch ends behind the one in front
        return
    table = block_tables + row * table_stride
    lines = _lines(table, kv_head, begin, end, KV_HEADS, BLOCK, KEYS)
    _ask(k_cache, keys, lines, begin, end, KEYS)
    _ask(v_cache, values, lines, begin, end, KEYS)

    nothing = gl.zeros([KEYS, N], gl.float32, layout=scored)
    score = gl.full([N], float("-inf"), gl.float32, layout=gl.SliceLayout(0, scored))
    d = gl.arange(0, _D, layout=gl.SliceLayout(1, scored))
    new_mixed = gl.zeros([_D], gl.float32, layout=gl.SliceLayout(1, scored))
    e = gl.arange(0, _D, layout=gl.SliceLayout(0, _HEADS))
    h = gl.arange(0, N, layout=gl.SliceLayout(1, _HEADS))[:, None]
    live = (h < GROUP) & (e >= 0)[None, :]
    heads = qkv + row * qkv_stride + (kv_head * GROUP + h) * _D
    if FUSED:
        swap = gl.where(e < _HALF, e + _HALF, e - _HALF)
        slot = gl.load(slots + row)
        angle = (length - 1).to(gl.float32) * gl.load(inv_freq + e % _HALF)
        cos, sin = gl.cos(angle), gl.where(e < _HALF, -1.0, 1.0) * gl.sin(angle)
        weight, swapped_weight, new_weight, new_swapped_weight = cos, cos, cos, cos
        if NORM:
            weight, swapped_weight = gl.load(q_weight + e).to(gl.float32), gl.load(q_weight + swap).to(gl.float32)
            new_weight = gl.load(k_weight + e).to(gl.float32)
            new_swapped_weight = gl.load(k_weight + swap).to(gl.float32)
        wait_for_inputs(True)
        if length <= 0:
            async_copy.wait_group(0)
            return
        last = qkv + row * qkv_stride + (KV_HEADS * GROUP + kv_head) * _D
        raw = gl.load(heads + e[None, :], mask=live, other=0.0)
        swapped = gl.load(heads + swap[None, :], mask=live, other=0.0)
        new_raw, new_swapped, new_value = gl.load(last + e), gl.load(last + swap), gl.load(last + KV_HEADS * _D + e)
        new_mixed = gl.load(last + KV_HEADS * _D + d, mask=(d >= 0) & newest, other=0.0).to(gl.float32)
        squares = gl.sum(raw.to(gl.float32) * raw.to(gl.float32), 1)[:, None]
        heads_turned = turned(
            raw, swapped, weight[None, :], swapped_weight[None, :], cos[None, :], sin[None, :], squares, eps, NORM
        )
        query.store(heads_turned)
        async_copy.wait_group(1)
        fence_async_shared()
        asked = warpgroup_mma(keys, query.permute((1, 0)), nothing, use_acc=False, is_async=True)
        square = gl.sum(new_raw.to(gl.float32) * new_raw.to(gl.float32), 0)
        new_key = turned(new_raw, new_swapped, new_weight, new_swapped_weight, cos, sin, square, eps, NORM)
        new_at = ((slot // BLOCK * KV_HEADS + kv_head) * BLOCK + slot % BLOCK) * _D + e
        stored = (e >= 0) & newest & (slot >= 0)
        gl.store(k_cache + new_at, new_key, mask=stored)
        gl.store(v_cache + new_at, new_value, mask=stored)
        new_score = gl.sum(heads_turned.to(gl.float32) * new_key.to(gl.float32)[None, :], 1) * (SCALE * _LOG2E)
        score = gl.where(newest, gl.convert_layout(new_score, gl.SliceLayout(0, scored)), float("-inf"))
        scores = warpgroup_mma_wait(0, deps=(asked,))
    else:
        release_dependents(True)
        if length <= 0:
            async_copy.wait_group(0)
            wait_for_inputs(True)
            return
        # .cg: there was no wait, and where q lies an input of the product in front of it may have been
        query.store(gl.load(heads + e[None, :], mask=live, other=0.0, cache_modifier=".cg"))
        async_copy.wait_group(1)
        fence_async_shared()
        scores = warpgroup_mma(keys, query.permute((1, 0)), nothing, use_acc=False)

    # The first keys, and the newest one. Others are few or none, so this is not part of a loop, where what is the same
    # in each round would be worked out first.
    top, total = _shares(scores, shares, score, begin, end, KEYS, SCALE, scored)
    later = begin + KEYS
    if later < end:  # every thread is done with the keys
        lines = _lines(table, kv_head, later, end, KV_HEADS, BLOCK, KEYS)
        _ask(k_cache, keys, lines, later, end, KEYS)
        async_copy.wait_group(1)
    else:
        async_copy.wait_group(0)
    fence_async_shared()
    empty = gl.zeros([_D, N], gl.float32, layout=scored)
    mixing = warpgroup_mma(values.permute((1, 0)), shares.permute((1, 0)), empty, use_acc=False, is_async=True)
    fresh = gl.exp2(score - top)
    sums = gl.sum(total, 0) + fresh
    acc = warpgroup_mma_wait(0, deps=(mixing,))
    acc += new_mixed[:, None] * fresh[None, :]

    for first in range(later, end, KEYS):
        _barrier()  # every thread is done with the values
        _ask(v_cache, values, lines, first, end, KEYS)
        async_copy.wait_group(1)
        fence_async_shared()
        scores = warpgroup_mma(keys, query.permute((1, 0)), nothing, use_acc=False)
        higher, total = _shares(scores, shares, top, first, end, KEYS, SCALE, scored)
        fade = gl.exp2(top - higher)
        sums = sums * fade + gl.sum(total, 0)
        acc *= fade[None, :]
        top = higher
        if first + KEYS < end:
            lines = _lines(table, kv_head, first + KEYS, end, KV_HEADS, BLOCK, KEYS)
            _ask(k_cache, keys, lines, first + KEYS, end, KEYS)
            async_copy.wait_group(1)
        else:
            async_copy.wait_group(0)
        fence_async_shared()
        acc = warpgroup_mma(values.permute((1, 0)), shares.permute((1, 0)), acc)

    acc *= (1 / sums)[None, :]
    n = gl.arange(0, N, layout=gl.SliceLayout(0, scored))
    live = (n < GROUP)[None, :] & (d >= 0)[:, None]
    pair = row * KV_HEADS + kv_head
    place = n[None, :] * _D + d[:, None]
    out += pair * (GROUP * _D) + place
    if SPLITS == 1:
        gl.store(out, acc.to(dtype), mask=live)
    else:
        part += pair * ((SPLITS - 1) * GROUP * _D)
        mark = top + gl.log2(sums)
        if newest:
            acc = _join(acc, mark, part, used - 1, GROUP, N, scored)
            gl.store(out, acc.to(dtype), mask=live)
            _barrier()  # every thread has read
            for i in range(used - 1):  # for the next launch
                gl.store(part + i * (GROUP * _D) + place, gl.full([_D, N], _EMPTY, gl.int64, layout=scored), mask=live)
        else:
            upper = gl.zeros([_D, N], gl.float32, layout=scored) + mark[None, :]
            words = upper.to(gl.int32, bitcast=True).to(gl.int64) << 32
            words |= acc.to(gl.int32, bitcast=True).to(gl.int64) & 0xFFFFFFFF
            gl.store(part + split * (GROUP * _D) + place, words, mask=live)
    wait_for_inputs(not FUSED)


def takes(qkv: Tensor, k_cache: Tensor, group: int) -> bool:
    """Whether `attend_slices` can: heads of 128, up to 16 of q for each of K."""
    halves = qkv.dtype in (torch.bfloat16, torch.float16) and k_cache.dtype == qkv.dtype
    return halves and k_cache.shape[3] == HEAD and group <= 16


def attend_slices(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, block_tables: Tensor, seq_lens: Tensor,
    new: NewTokens | None, *, scale: float, config: SlicesConfig, scratch: SlicesScratch,
) -> None:  # fmt: skip
    """As `paged_attention.attend_decode_qkv`, of what `takes` takes, into `out` [B, heads, 128].

    new: None: `qkv` is q [B, heads, 128], whose keys are stored; as `attend_decode` where this is behind the prefill
    attention of other rows."""
    rows, heads = out.shape[:2]
    kv_heads, block_size = k_cache.shape[1:3]
    group = heads // kv_heads
    _decode_slices_kernel[(kv_heads, rows, config.splits)](
        qkv, k_cache, v_cache, out, block_tables, seq_lens, scratch.part, qkv.stride(0), block_tables.stride(0),
        *((qkv, qkv, qkv, qkv, 0.0) if new is None else new.arguments()),
        FUSED=new is not None, NORM=new is not None and new.q_weight is not None,
        KV_HEADS=kv_heads, GROUP=group, N=max(8, triton.next_power_of_2(group)), BLOCK=block_size,
        KEYS=config.keys, SPLITS=config.splits, LEAST=config.least, SCALE=scale,
        num_warps=WARPS, launch_pdl=True,
    )  # fmt: skip
