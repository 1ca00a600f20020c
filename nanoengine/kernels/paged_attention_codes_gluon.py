"""Attention of one query a row over a paged cache of eight-bit codes, on GPUs of compute capability 9.0.

Keys go down and query heads across, so that tensor cores read the codes of K from shared memory as they are. A query is
the sum of two or three rows of codes, which have all of its bits. Values are taken as float16, which has each code:
tensor cores take no codes whose tokens do not lie side by side. So a thread has few registers, and four programs share
a multiprocessor, each with two tiles of keys and values on their way.

Gluon says where everything lies, which Triton does not. It has no interpreter: this kernel is tested on a GPU, and
compiled everywhere.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
# ruff: noqa: N803, RUF005, SIM300 - constants of a kernel are in capitals, Triton knows no starred tuple, and its types
# may stand right of a comparison
from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nanoengine.kernels.paged_attention_half_triton import FP8_EVEN, FP8_ODD, INT8_EVEN, INT8_ODD
from nanoengine.kernels.paged_attention_plan import DecodeConfig, DecodeScratch
from nanoengine.kernels.pdl_triton import release_dependents, wait_for_inputs
from nanoengine.kernels.split_k_triton import come

TYPES = {torch.float8_e4m3fn: gl.float8e4nv, torch.int8: gl.int8}
_LOG2E = gl.constexpr(1.4426950408889634)
_HEAD = 128
_D = gl.constexpr(_HEAD)
_TILE, _STAGES = 64, 3
_LEAST = gl.constexpr(1e-20)
# How codes come into shared memory, eight words of two a thread, and how they lie there, as words and as codes.
_COPIED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
_ONE_EACH = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
_WORDS = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))
_CODES = gl.constexpr(gl.NVMMASharedLayout(128, 8, rank=2))
_IN_A_ROW = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
_QUERIES = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
_PARTS = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))


@gluon.jit
def halves(words, asm: gl.constexpr):
    return gl.inline_asm_elementwise(asm, "=r,r", [words], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def lines_of(table, columns, kv_head, start, KV_HEADS: gl.constexpr, BLOCK: gl.constexpr, TILE: gl.constexpr,
           LAYOUT: gl.constexpr):  # fmt: skip
    """int32 [TILE]: where keys from `start` on lie, counted in heads of tokens; anything behind the row's end."""
    keys = start + gl.arange(0, TILE, layout=LAYOUT)
    block = gl.load(table + keys // BLOCK, mask=keys // BLOCK < columns, other=0)
    return (block * KV_HEADS + kv_head) * BLOCK + keys % BLOCK


@gluon.jit
def _ask(cached, kept, stage, start, end, lines, line,
         TILE: gl.constexpr):  # fmt: skip
    """Asks for codes and scales of keys from `start` on; zeros from `end` on. lines, line: where they
    lie, in both layouts. cached, kept: K, V and their scales, in the cache and in shared memory."""
    k_words, v_words, k_scales, v_scales = cached
    keys, values, key_scales, value_scales = kept
    live = (start + gl.arange(0, TILE, layout=gl.SliceLayout(1, _COPIED)) < end)[:, None]
    word = gl.arange(0, _D // 2, layout=gl.SliceLayout(0, _COPIED))[None, :]
    at = lines.to(gl.int64)[:, None] * (_D // 2) + word
    async_copy.async_copy_global_to_shared(keys.index(stage), k_words + at, mask=live & (word >= 0))
    async_copy.async_copy_global_to_shared(values.index(stage), v_words + at, mask=live & (word >= 0))
    one = start + gl.arange(0, TILE, layout=_ONE_EACH) < end
    async_copy.async_copy_global_to_shared(key_scales.index(stage), k_scales + line, mask=one)
    async_copy.async_copy_global_to_shared(value_scales.index(stage), v_scales + line, mask=one)


@gluon.jit
def _as_codes(rest, CODE: gl.constexpr, PARTS: gl.constexpr):
    """Rows [N, D] -> (PARTS codes whose sum they are, unit [N]: what one unit of a product is worth). Of int8, the
    first counts 256 times."""
    largest = gl.max(gl.abs(rest), 1)
    parts = ()
    if CODE == gl.int8:
        unit = gl.where(largest == 0, 1.0, largest * (1 / 32512))
        whole = gl.floor(rest / unit[:, None] + 0.5).to(gl.int32)
        above = (whole + 128) >> 8
        parts = (above.to(gl.int8), (whole - (above << 8)).to(gl.int8))
    else:
        # Units are powers of two, so two parts are bfloat16 as it is, and three float16. Rounded by adding a number
        # whose last bit is worth as much as theirs: ptxas 12.8 makes wrong code of a cast to codes and back.
        unit = (largest.to(gl.int32, bitcast=True) & 0x7F800000).to(gl.float32, bitcast=True) * (1 / 128)
        unit = gl.where(largest < _LEAST, 1.0, unit)
        rest /= unit[:, None]
        for _ in gl.static_range(PARTS):
            power = (rest.to(gl.int32, bitcast=True) & 0x7F800000).to(gl.float32, bitcast=True)
            rounder = gl.maximum(power, 0.015625) * 1572864.0  # 2^-6: subnormal below; 1.5 * 2^20
            part = (rest + rounder) - rounder
            parts = parts + (part.to(CODE),)
            rest -= part
    return parts, unit


@gluon.jit
def _ask_scores(codes, query, CODE: gl.constexpr, PARTS: gl.constexpr, TILE: gl.constexpr, N: gl.constexpr,
                LAYOUT: gl.constexpr):  # fmt: skip
    """Codes [TILE, D] by those of queries [PARTS, N, D]: their products, which must be waited for."""
    if CODE == gl.int8:
        scores = gl.zeros([TILE, N], gl.int32, layout=LAYOUT)
        scores = warpgroup_mma(codes, query.index(0).permute((1, 0)), scores, use_acc=False) * 256
        return warpgroup_mma(codes, query.index(1).permute((1, 0)), scores, is_async=True)
    else:
        scores = gl.zeros([TILE, N], gl.float32, layout=LAYOUT)
        scores = warpgroup_mma(codes, query.index(PARTS - 1).permute((1, 0)), scores, use_acc=False, is_async=True)
        for part in gl.static_range(1, PARTS):
            scores = warpgroup_mma(codes, query.index(PARTS - 1 - part).permute((1, 0)), scores, is_async=True)
        return scores


@gluon.jit
def _combine(part, lse, out, used, GROUP: gl.constexpr):
    """As in `paged_attention_decode_triton`: the sum of parts, each by its share of the softmax's denominator."""
    for first in gl.static_range(0, GROUP * _D, 1024):
        at = first + gl.arange(0, 1024, layout=_PARTS)
        live = at < GROUP * _D
        head = gl.minimum(at // _D, GROUP - 1)
        top = gl.full([1024], float("-inf"), gl.float32, layout=_PARTS)
        total = gl.zeros([1024], gl.float32, layout=_PARTS)
        acc = gl.zeros([1024], gl.float32, layout=_PARTS)
        for split in range(used):
            # .cg: other programs wrote all this; never from this multiprocessor's own L1
            mark = gl.load(lse + split * GROUP + head, cache_modifier=".cg")
            mixed = gl.load(part + split * (GROUP * _D) + at, mask=live, other=0.0, cache_modifier=".cg")
            higher = gl.maximum(top, mark)
            fade, share = gl.exp2(top - higher), gl.exp2(mark - higher)
            total = total * fade + share
            acc = acc * fade + share * mixed
            top = higher
        gl.store(out + at, (acc / total).to(out.dtype.element_ty), mask=live)


@gluon.jit(do_not_specialize=["columns", "min_tiles"])  # it goes by the number of rows, which is any in a mixed step
def _decode_codes_kernel(
    q, k_words, v_words, k_scales, v_scales, out, block_tables, seq_lens, part, lse, tickets,
    q_stride, table_stride, columns, min_tiles,
    CODE: gl.constexpr, PARTS: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, N: gl.constexpr,
    BLOCK: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr, SCALE: gl.constexpr,
    BESIDE: gl.constexpr,
):  # fmt: skip
    """N: columns of query heads, of which GROUP are some. How rows are split, and BESIDE: see
    `paged_attention_decode_triton`."""
    kv_head, row = gl.program_id(0), gl.program_id(1).to(gl.int64)
    split = gl.program_id(2)  # slowest, so that programs without work start behind those with
    scored: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 32])
    mixed: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    copied: gl.constexpr = gl.SliceLayout(1, _COPIED)
    keys = gl.allocate_shared_memory(gl.int16, [STAGES, TILE, _D // 2], _WORDS)
    values = gl.allocate_shared_memory(gl.int16, [STAGES, TILE, _D // 2], _WORDS)
    key_scales = gl.allocate_shared_memory(gl.float32, [STAGES, TILE], _IN_A_ROW)
    value_scales = gl.allocate_shared_memory(gl.float32, [STAGES, TILE], _IN_A_ROW)
    query = gl.allocate_shared_memory(CODE, [PARTS, N, _D], _CODES)
    shares = gl.allocate_shared_memory(gl.float16, [N, TILE], _WORDS)
    cached, kept = (k_words, v_words, k_scales, v_scales), (keys, values, key_scales, value_scales)
    codes = keys._reinterpret(CODE, [STAGES, TILE, _D], _CODES)

    length = gl.load(seq_lens + row)
    tiles = gl.cdiv(length, TILE)
    tiles_each = gl.maximum(gl.cdiv(tiles, SPLITS), min_tiles)
    used = gl.cdiv(tiles, tiles_each)
    tiles_each = gl.cdiv(tiles, used)  # as few as so many parts allow: the longest is waited for
    begin = 0  # so that a row's table need not wait for its length
    if SPLITS > 1:
        begin = gl.minimum(split, used) * tiles_each * TILE
    end = gl.minimum(begin + tiles_each * TILE, length)
    count = gl.cdiv(end - begin, TILE)
    table = block_tables + row * table_stride
    many, ones = (), ()
    for i in gl.static_range(STAGES + 1):
        many = many + (lines_of(table, columns, kv_head, begin + i * TILE, KV_HEADS, BLOCK, TILE, copied),)
        ones = ones + (lines_of(table, columns, kv_head, begin + i * TILE, KV_HEADS, BLOCK, TILE, _ONE_EACH),)
    for i in gl.static_range(STAGES):  # the cache of earlier steps may be read before the wait; the newest key not
        start = begin + i * TILE
        if (start < end) & (start + TILE < length):
            _ask(cached, kept, i, start, end, many[i], ones[i], TILE)
        async_copy.commit_group()
    wait_for_inputs(not BESIDE)
    release_dependents(True)
    if split >= used:
        return
    start = begin + (count - 1) * TILE
    if (count <= STAGES) & (start + TILE >= length):
        lines = lines_of(table, columns, kv_head, start, KV_HEADS, BLOCK, TILE, copied)
        line = lines_of(table, columns, kv_head, start, KV_HEADS, BLOCK, TILE, _ONE_EACH)
        _ask(cached, kept, count - 1, start, end, lines, line, TILE)

    head = gl.arange(0, N, layout=gl.SliceLayout(1, _QUERIES))[:, None]
    d = gl.arange(0, _D, layout=gl.SliceLayout(0, _QUERIES))[None, :]
    own = q + row * q_stride + kv_head * (GROUP * _D) + head * _D + d
    # .cg: beside prefill there was no wait, and where q lies an input of the product in front of it may have been
    rows = gl.load(own, mask=(head < GROUP) & (d >= 0), other=0.0, cache_modifier=".cg").to(gl.float32)
    parts, unit = _as_codes(rows, CODE, PARTS)
    for i in gl.static_range(PARTS):
        query.index(i).store(parts[i])
    unit = gl.convert_layout(unit, gl.SliceLayout(0, scored)) * (SCALE * _LOG2E)
    lines, line = many[STAGES], ones[STAGES]

    near = gl.arange(0, TILE, layout=gl.SliceLayout(1, scored))
    top = gl.full([N], float("-inf"), gl.float32, layout=gl.SliceLayout(0, scored))
    total = gl.zeros([TILE, N], gl.float32, layout=scored)  # of each thread's keys
    even = gl.zeros([_D // 2, N], gl.float32, layout=mixed)
    odd = gl.zeros([_D // 2, N], gl.float32, layout=mixed)
    for i in range(count):
        stage, start = i % STAGES, begin + i * TILE
        if i == count - 1:
            async_copy.commit_group()
            async_copy.wait_group(0)
        else:
            async_copy.wait_group(STAGES - 1)
        fence_async_shared()
        products = _ask_scores(codes.index(stage), query, CODE, PARTS, TILE, N, scored)
        key_scale = key_scales.index(stage).load(gl.SliceLayout(1, scored))
        value_scale = value_scales.index(stage).load(gl.SliceLayout(1, scored))
        value_scale = gl.where(value_scale < _LEAST, _LEAST, value_scale)  # NaN stays
        words = values.index(stage).permute((1, 0)).load(gl.DotOperandLayout(0, mixed, k_width=2))
        scores = warpgroup_mma_wait(0, deps=(products,)).to(gl.float32)
        # Scales of values are in the exponent, so that float16 has what is multiplied.
        scores = scores * key_scale[:, None] * unit[None, :] + gl.log2(value_scale)[:, None]
        scores = gl.where((start + near < end)[:, None], scores, float("-inf"))
        higher = gl.maximum(top, gl.max(scores, 0))  # finite: each tile has a key that is seen
        fade = gl.exp2(top - higher)
        top = higher
        share = gl.exp2(scores - higher[None, :])
        total = total * fade[None, :] + share * (1 / value_scale)[:, None]
        shares.permute((1, 0)).store(share.to(gl.float16))
        fence_async_shared()
        if CODE == gl.int8:
            evens, odds = halves(words, INT8_EVEN), halves(words, INT8_ODD)
        else:
            evens, odds = halves(words, FP8_EVEN), halves(words, FP8_ODD)
        fade = gl.convert_layout(fade, gl.SliceLayout(0, mixed))[None, :]
        even *= fade
        odd *= fade
        even = warpgroup_mma(evens, shares.permute((1, 0)), even, is_async=True)
        odd = warpgroup_mma(odds, shares.permute((1, 0)), odd, is_async=True)
        later = start + STAGES * TILE
        if later < end:  # every thread is done with this stage
            _ask(cached, kept, stage, later, end, lines, line, TILE)
            lines = lines_of(table, columns, kv_head, later + TILE, KV_HEADS, BLOCK, TILE, copied)
            line = lines_of(table, columns, kv_head, later + TILE, KV_HEADS, BLOCK, TILE, _ONE_EACH)
        async_copy.commit_group()
        even, odd = warpgroup_mma_wait(0, deps=(even, odd))

    sums = gl.convert_layout(gl.sum(total, 0), gl.SliceLayout(0, mixed))
    even /= sums[None, :]
    odd /= sums[None, :]
    n = gl.arange(0, N, layout=gl.SliceLayout(0, mixed))
    word = gl.arange(0, _D // 2, layout=gl.SliceLayout(1, mixed))[:, None]
    live = (n < GROUP)[None, :] & (word >= 0)
    pair = row * KV_HEADS + kv_head
    out += pair * (GROUP * _D)
    if SPLITS == 1 or used == 1:
        first = even.to(out.dtype.element_ty).to(gl.uint16, bitcast=True).to(gl.uint32)
        second = odd.to(out.dtype.element_ty).to(gl.uint16, bitcast=True).to(gl.uint32)
        two = out.to(gl.pointer_type(gl.uint32)) + n[None, :] * (_D // 2) + word
        gl.store(two, first | (second << 16), mask=live)
    else:
        part += pair * (SPLITS * GROUP * _D)
        lse += pair * (SPLITS * GROUP)
        one = part + (split * GROUP + n[None, :]) * _D + 2 * word
        gl.store(one, even, mask=live)
        gl.store(one + 1, odd, mask=live)
        mark = gl.convert_layout(top, gl.SliceLayout(0, mixed)) + gl.log2(sums)
        gl.store(lse + split * GROUP + n, mark, mask=n < GROUP)
        if come(tickets + pair) == used - 1:
            _combine(part, lse, out, used, GROUP)
            gl.store(tickets + pair, 0)  # for the next launch
    wait_for_inputs(BESIDE)


def takes(q: Tensor, k_cache: Tensor) -> bool:
    """Whether `attend_codes` can: heads of 128, up to 16 of q for each of K, and blocks that fill tiles or are filled
    by them."""
    block_size, width = k_cache.shape[2:]
    whole = block_size % _TILE == 0 or _TILE % block_size == 0
    few = q.shape[1] <= 16 * k_cache.shape[1]
    return q.dtype in (torch.bfloat16, torch.float16) and width == _HEAD and whole and few


def attend_codes(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, scales: tuple[Tensor, Tensor], out: Tensor, block_tables: Tensor,
    seq_lens: Tensor, *, scale: float, config: DecodeConfig, scratch: DecodeScratch,
    beside: bool = False,
) -> None:  # fmt: skip
    """As `attend_decode`, of what `takes` takes. q: each token's heads in one piece."""
    rows, heads = out.shape[:2]
    kv_heads, block_size = k_cache.shape[1:3]
    group = heads // kv_heads
    _decode_codes_kernel[(kv_heads, rows, config.splits)](
        q, k_cache.view(torch.int16), v_cache.view(torch.int16), *scales, out, block_tables, seq_lens,
        scratch.part, scratch.lse, scratch.tickets, q.stride(0), block_tables.stride(0), block_tables.shape[1],
        max(1, config.min_tiles * config.tile // _TILE), CODE=TYPES[k_cache.dtype],
        PARTS=3 if q.dtype == torch.float16 and k_cache.dtype != torch.int8 else 2,
        KV_HEADS=kv_heads, GROUP=group, N=max(8, triton.next_power_of_2(group)), BLOCK=block_size, TILE=_TILE,
        STAGES=_STAGES, SPLITS=config.splits, SCALE=scale, BESIDE=beside, num_warps=4, launch_pdl=True,
    )  # fmt: skip
