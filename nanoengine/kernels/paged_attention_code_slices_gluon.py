"""Attention of one query a row, from qkv, over a paged cache of eight-bit codes, on GPUs of compute capability 9.0, for
many rows, so that several programs share a multiprocessor.

Memory is the limit, so what each program does is short and its copies are large: it asks for the codes of as many keys
and values as shared memory holds for six programs, the first of them before the product in front has ended; then there
is one softmax over them all, and the next keys are asked for as soon as the scores are there. Norms, rotation and the
codes of the newest key and value are made here, too, so that a layer has one launch for all that. What the newest key
adds is where the softmax begins.

Keys go down and columns of the query across, so that tensor cores read the codes of K as they lie. A head of the query
is the sum of two rows of codes (`paged_attention_codes_gluon`), and those are neighbours among the columns: one product
has both. Values become float16 on their way to the tensor cores.

Gluon says where everything lies, which Triton does not. It has no interpreter: this kernel is tested on a GPU, by what
its Python computes, and compiled everywhere.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
# ruff: noqa: N803, SIM300 - constants of a kernel are in capitals, and its types may stand right of a comparison
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

from nanoengine.kernels.kv_quant import LARGEST, kv_dtype_of
from nanoengine.kernels.paged_attention_codes_gluon import TYPES, halves
from nanoengine.kernels.paged_attention_half_triton import FP8_EVEN, FP8_ODD, INT8_EVEN, INT8_ODD
from nanoengine.kernels.paged_attention_plan import NewTokens
from nanoengine.kernels.paged_attention_slices import HEAD, WARPS
from nanoengine.kernels.paged_attention_slices_gluon import turned
from nanoengine.kernels.pdl_triton import release_dependents, wait_for_inputs

_LOG2E = gl.constexpr(1.4426950408889634)
_D, _HALF, _WARPS = gl.constexpr(HEAD), gl.constexpr(HEAD // 2), gl.constexpr(WARPS)
_LEAST = gl.constexpr(1e-20)
_AT_ONCE = gl.constexpr(32)  # keys whose values are float16 in registers
# How codes come into shared memory, eight words of two a thread, and how they lie there; a row of the query a warp.
_COPIED = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0]))
_ONE_EACH = gl.constexpr(gl.BlockedLayout([1], [32], [WARPS], [0]))
_WORDS = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))
_CODES = gl.constexpr(gl.NVMMASharedLayout(128, 8, rank=2))
_IN_A_ROW = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
_HEADS = gl.constexpr(gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0]))


@triton.jit
def _barrier():
    tl.debug_barrier()


@gluon.jit
def _lines(table, columns, kv_head, start, KV_HEADS: gl.constexpr, BLOCK: gl.constexpr, KEYS: gl.constexpr,
           LAYOUT: gl.constexpr):  # fmt: skip
    """int32 [KEYS]: where keys from `start`, a multiple of KEYS, on lie, counted in heads of tokens; anything behind
    the row's end. What is the same for each start is apart from it."""
    near = gl.arange(0, KEYS, layout=LAYOUT)
    column = start // BLOCK + near // BLOCK
    block = gl.load(table + column, mask=column < columns, other=0)
    return block * (KV_HEADS * BLOCK) + (kv_head * BLOCK + start % BLOCK + near % BLOCK)


@gluon.jit
def _ask(words, kept, at, start, end, KEYS: gl.constexpr):
    """Asks for codes of K or V of KEYS keys from `start` on; zeros from `end` on. at: where they lie."""
    live = (start + gl.arange(0, KEYS, layout=gl.SliceLayout(1, _COPIED)) < end)[:, None]
    word = gl.arange(0, _HALF, layout=gl.SliceLayout(0, _COPIED))[None, :]
    from_ = words + (at.to(gl.int64)[:, None] * _HALF + word)
    async_copy.async_copy_global_to_shared(kept, from_, mask=live & (word >= 0))


@gluon.jit
def _ask_scales(scales, kept, at, start, end, KEYS: gl.constexpr):
    """Asks for scales as `_ask` does for codes."""
    live = start + gl.arange(0, KEYS, layout=_ONE_EACH) < end
    async_copy.async_copy_global_to_shared(kept, scales + at, mask=live)


@gluon.jit
def _as_float8(x):
    """float32, at most 448 in size, rounded to a value of float8 e4m3: by adding a number whose last bit is worth as
    much as its last bit. ptxas 12.8 makes wrong code of a cast to codes and back."""
    power = (x.to(gl.int32, bitcast=True) & 0x7F800000).to(gl.float32, bitcast=True)
    rounder = gl.maximum(power, 0.015625) * 1572864.0  # 2^-6: subnormal below; 1.5 * 2^20
    return (x + rounder) - rounder


@gluon.jit
def _scale(x, LARGEST: gl.constexpr):
    """A head's scale, as `kv_quant.quantise_heads`, and what its values are divided by."""
    scale = gl.div_rn(gl.max(gl.abs(x), 0), LARGEST)
    # NaN as of the reference, whatever a maximum does with it
    broken = gl.max((x != x).to(gl.int32), 0) > 0
    return gl.where(broken, float("nan"), scale), gl.where(scale < 1e-36, 1.0, scale)


@gluon.jit
def _code(x, by, LARGEST: gl.constexpr, CODE: gl.constexpr):
    """float32: the codes of a head's values."""
    one_over = gl.div_rn(1.0, by)  # rounded once, as in `quantise_triton`
    codes = x * one_over
    codes = gl.fma(gl.fma(-codes, by, x), one_over, codes)
    if CODE == gl.int8:
        codes = gl.floor(codes + 0.5)
    codes = gl.minimum(gl.maximum(codes, -LARGEST), LARGEST)
    if CODE == gl.int8:
        return codes
    else:
        return _as_float8(codes)


@gluon.jit
def _columns(heads, second, CODE: gl.constexpr):
    """Heads [N, D], each twice -> (codes whose sum it is, those of the second where it is asked for, [N]: what one unit
    of a product with a column is worth)."""
    largest = gl.max(gl.abs(heads), 1)
    if CODE == gl.int8:
        unit = gl.where(largest == 0, 1.0, largest * (1 / 32512))
        whole = gl.floor(heads / unit[:, None] + 0.5).to(gl.int32)
        above = (whole + 128) >> 8
        return gl.where(second[:, None], whole - (above << 8), above).to(CODE), unit * gl.where(second, 1.0, 256.0)
    else:
        # Units are powers of two, so that two columns are bfloat16 as it is.
        unit = (largest.to(gl.int32, bitcast=True) & 0x7F800000).to(gl.float32, bitcast=True) * (1 / 128)
        unit = gl.where(largest < _LEAST, 1.0, unit)
        heads = heads * (1 / unit)[:, None]
        first = _as_float8(heads)
        return gl.where(second[:, None], _as_float8(heads - first), first).to(CODE), unit


@gluon.jit
def _all_columns(x, LIVE: gl.constexpr, N: gl.constexpr):
    """[LIVE] -> [N], those behind as those in front."""
    if LIVE == N:
        return x
    else:
        return gl.join(x, x).permute((1, 0)).reshape([N])


@gluon.jit
def _of_pairs(x, ROWS: gl.constexpr, N: gl.constexpr):
    """[ROWS, N]: the sum of both columns of a head, [ROWS, N / 2]."""
    return gl.sum(x.reshape([ROWS, N // 2, 2]), 2)


@gluon.jit
def _of_tiles(x, KEYS: gl.constexpr, N: gl.constexpr):
    """[KEYS, N / 2]: the sum of tiles of 64 keys, [64, N / 2]."""
    return gl.sum(x.reshape([KEYS // 64, 64, N // 2]), 0)


@gluon.jit
def _twice(x, N: gl.constexpr, LAYOUT: gl.constexpr):
    """[N / 2] -> each for both columns, [N]."""
    return gl.convert_layout(gl.join(x, x).reshape([N]), LAYOUT)


@gluon.jit
def _mix(values, shares, even, odd, first, CODE: gl.constexpr, LAYOUT: gl.constexpr):
    """Asks for the products of `_AT_ONCE` keys' values and shares; they must be waited for."""
    words = values.slice(first, _AT_ONCE).permute((1, 0)).load(gl.DotOperandLayout(0, LAYOUT, k_width=2))
    if CODE == gl.int8:
        evens, odds = halves(words, INT8_EVEN), halves(words, INT8_ODD)
    else:
        evens, odds = halves(words, FP8_EVEN), halves(words, FP8_ODD)
    near = shares.slice(first, _AT_ONCE, dim=1).permute((1, 0))
    even = warpgroup_mma(evens, near, even, is_async=True)
    return even, warpgroup_mma(odds, near, odd, is_async=True)


@gluon.jit
def _decode_code_slices_kernel(
    qkv, k_words, v_words, k_scales, v_scales, out, block_tables, seq_lens, qkv_stride, table_stride, columns,
    slots, inv_freq, q_weight, k_weight, eps,
    CODE: gl.constexpr, LARGEST: gl.constexpr, NORM: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr,
    N: gl.constexpr, LIVE: gl.constexpr, BLOCK: gl.constexpr, KEYS: gl.constexpr, SCALE: gl.constexpr,
):  # fmt: skip
    """N: columns, two of each query head, of which LIVE are written and 2 * GROUP are some."""
    kv_head, row = gl.program_id(0), gl.program_id(1).to(gl.int64)
    release_dependents(True)
    scored: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[_WARPS, 1], instr_shape=[16, N, 32])
    mixed: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[_WARPS, 1], instr_shape=[16, N, 16])
    copied: gl.constexpr = gl.SliceLayout(1, _COPIED)
    keys = gl.allocate_shared_memory(gl.int16, [KEYS, _HALF], _WORDS)
    values = gl.allocate_shared_memory(gl.int16, [KEYS, _HALF], _WORDS)
    key_scales = gl.allocate_shared_memory(gl.float32, [KEYS], _IN_A_ROW)
    value_scales = gl.allocate_shared_memory(gl.float32, [KEYS], _IN_A_ROW)
    query = gl.allocate_shared_memory(CODE, [N, _D], _CODES)
    shares = gl.allocate_shared_memory(gl.float16, [N, KEYS], _WORDS)
    codes = keys._reinterpret(CODE, [KEYS, _D], _CODES)

    # What is read before the wait: see `paged_attention_slices_gluon`. A table need not wait for its row's length.
    length = gl.load(seq_lens + row)
    end = length - 1
    table = block_tables + row * table_stride
    many = _lines(table, columns, kv_head, 0, KV_HEADS, BLOCK, KEYS, copied)
    ones = _lines(table, columns, kv_head, 0, KV_HEADS, BLOCK, KEYS, _ONE_EACH)
    _ask(k_words, keys, many, 0, end, KEYS)
    _ask_scales(k_scales, key_scales, ones, 0, end, KEYS)
    _ask_scales(v_scales, value_scales, ones, 0, end, KEYS)
    async_copy.commit_group()
    _ask(v_words, values, many, 0, end, KEYS)
    async_copy.commit_group()
    e = gl.arange(0, _D, layout=gl.SliceLayout(0, _HEADS))
    n = gl.arange(0, LIVE, layout=gl.SliceLayout(1, _HEADS))
    heads = qkv + row * qkv_stride + (kv_head * GROUP + n // 2)[:, None] * _D
    live = (n // 2 < GROUP)[:, None] & (e >= 0)[None, :]
    swap = gl.where(e < _HALF, e + _HALF, e - _HALF)
    slot = gl.load(slots + row)
    angle = (length - 1).to(gl.float32) * gl.load(inv_freq + e % _HALF)
    cos, sin = gl.cos(angle), gl.where(e < _HALF, -1.0, 1.0) * gl.sin(angle)
    weight, swapped_weight, new_weight, new_swapped_weight = cos, cos, cos, cos
    if NORM:
        weight, swapped_weight = gl.load(q_weight + e).to(gl.float32), gl.load(q_weight + swap).to(gl.float32)
        new_weight, new_swapped_weight = gl.load(k_weight + e).to(gl.float32), gl.load(k_weight + swap).to(gl.float32)
    wait_for_inputs(True)
    if length <= 0:
        async_copy.wait_group(0)
        return
    last = qkv + row * qkv_stride + (KV_HEADS * GROUP + kv_head) * _D
    raw = gl.load(heads + e[None, :], mask=live, other=0.0)
    swapped = gl.load(heads + swap[None, :], mask=live, other=0.0)
    new_raw, new_swapped = gl.load(last + e), gl.load(last + swap)
    last += KV_HEADS * _D
    new_value = gl.load(last + e).to(gl.float32)
    word = gl.arange(0, _HALF, layout=gl.SliceLayout(1, mixed))
    new_even, new_odd = gl.load(last + 2 * word).to(gl.float32), gl.load(last + 2 * word + 1).to(gl.float32)

    squares = gl.sum(raw.to(gl.float32) * raw.to(gl.float32), 1)[:, None]
    turned_heads = turned(
        raw, swapped, weight[None, :], swapped_weight[None, :], cos[None, :], sin[None, :], squares, eps, NORM
    ).to(gl.float32)
    columns_of, unit = _columns(turned_heads, n % 2 == 1, CODE)
    if LIVE == N:
        query.store(columns_of)
    else:
        query.store(gl.join(columns_of, columns_of).permute((2, 0, 1)).reshape([N, _D]))
    square = gl.sum(new_raw.to(gl.float32) * new_raw.to(gl.float32), 0)
    new_key = turned(new_raw, new_swapped, new_weight, new_swapped_weight, cos, sin, square, eps, NORM).to(gl.float32)
    new_key_scale, by = _scale(new_key, LARGEST)
    new_key = _code(new_key, by, LARGEST, CODE)
    new_value_scale, by = _scale(new_value, LARGEST)
    new_value = _code(new_value, by, LARGEST, CODE)
    new_even, new_odd = _code(new_even, by, LARGEST, CODE), _code(new_odd, by, LARGEST, CODE)
    to = (slot // BLOCK * KV_HEADS + kv_head) * BLOCK + slot % BLOCK
    stored = (e >= 0) & (slot >= 0)
    gl.store(k_words.to(gl.pointer_type(CODE), bitcast=True) + to * _D + e, new_key.to(CODE), mask=stored)
    gl.store(v_words.to(gl.pointer_type(CODE), bitcast=True) + to * _D + e, new_value.to(CODE), mask=stored)
    gl.store(k_scales + to, new_key_scale, mask=slot >= 0)
    gl.store(v_scales + to, new_value_scale, mask=slot >= 0)

    # Scales of values are in the exponent, so that float16 has what is multiplied. Smaller ones are as good as zero.
    worth = gl.where(new_value_scale < _LEAST, _LEAST, new_value_scale)  # NaN stays
    ahead = gl.sum(turned_heads * new_key[None, :], 1) * (new_key_scale * SCALE * _LOG2E) + gl.log2(worth)
    ahead = gl.convert_layout(_all_columns(ahead, LIVE, N), gl.SliceLayout(0, scored))
    unit = gl.convert_layout(_all_columns(unit * (SCALE * _LOG2E), LIVE, N), gl.SliceLayout(0, scored))
    # The mean of two that are equal: there is no other name for how it lies.
    above = _of_pairs(ahead[None, :] * 0.5 + gl.zeros([KEYS, N], gl.float32, layout=scored), KEYS, N)
    paired: gl.constexpr = above.type.layout
    total = _of_tiles(gl.zeros([KEYS, N // 2], gl.float32, layout=paired), KEYS, N)  # of each thread's keys
    summed: gl.constexpr = total.type.layout
    top = gl.max(above, 0)
    fresh = gl.full([N // 2], 1.0, gl.float32, layout=gl.SliceLayout(0, paired))
    even = new_even[:, None] + gl.zeros([_HALF, N], gl.float32, layout=mixed)
    odd = new_odd[:, None] + gl.zeros([_HALF, N], gl.float32, layout=mixed)
    near = gl.arange(0, KEYS, layout=gl.SliceLayout(1, paired))
    product: gl.constexpr = gl.int32 if CODE == gl.int8 else gl.float32
    for start in range(0, end, KEYS):
        async_copy.wait_group(1)
        fence_async_shared()
        empty = gl.zeros([KEYS, N], product, layout=scored)
        asked = warpgroup_mma(codes, query.permute((1, 0)), empty, use_acc=False, is_async=True)
        later = start + KEYS
        at = _lines(table, columns, kv_head, later, KV_HEADS, BLOCK, KEYS, copied)
        one = _lines(table, columns, kv_head, later, KV_HEADS, BLOCK, KEYS, _ONE_EACH)
        key_scale = key_scales.load(gl.SliceLayout(1, paired))
        value_scale = value_scales.load(gl.SliceLayout(1, paired))
        value_scale = gl.where(value_scale < _LEAST, _LEAST, value_scale)
        value_log = gl.log2(value_scale)
        products = warpgroup_mma_wait(0, deps=(asked,)).to(gl.float32) * unit[None, :]
        scores = _of_pairs(products, KEYS, N) * key_scale[:, None] + value_log[:, None]
        scores = gl.where((start + near < end)[:, None], scores, float("-inf"))
        higher = gl.maximum(top, gl.max(scores, 0))
        _barrier()  # every thread is done with the keys
        if later < end:
            _ask(k_words, keys, at, later, end, KEYS)
            _ask_scales(k_scales, key_scales, one, later, end, KEYS)
            _ask_scales(v_scales, value_scales, one, later, end, KEYS)
        async_copy.commit_group()
        fade = gl.exp2(top - higher)
        top = higher
        share = gl.exp2(scores - higher[None, :])
        fresh *= fade
        total *= gl.convert_layout(fade, gl.SliceLayout(0, summed))[None, :]
        total += _of_tiles(share * (1 / value_scale)[:, None], KEYS, N)
        share = share.to(gl.float16)
        shares.permute((1, 0)).store(gl.join(share, share).reshape([KEYS, N]))
        async_copy.wait_group(1)
        fence_async_shared()
        fade = _twice(fade, N, gl.SliceLayout(0, mixed))[None, :]
        even *= fade
        odd *= fade
        for first in gl.static_range(0, KEYS, _AT_ONCE):
            even, odd = _mix(values, shares, even, odd, first, CODE, mixed)
            even, odd = warpgroup_mma_wait(0, deps=(even, odd))
        at = _lines(table, columns, kv_head, later, KV_HEADS, BLOCK, KEYS, copied)
        _barrier()  # and with the values
        if later < end:
            _ask(v_words, values, at, later, end, KEYS)
        async_copy.commit_group()
    async_copy.wait_group(0)

    sums = gl.convert_layout(gl.sum(total, 0), gl.SliceLayout(0, paired)) + fresh * (1 / worth)
    sums = _twice(sums, N, gl.SliceLayout(0, mixed))
    column = gl.arange(0, N, layout=gl.SliceLayout(0, mixed))
    first = (even / sums[None, :]).to(out.dtype.element_ty).to(gl.uint16, bitcast=True).to(gl.uint32)
    second = (odd / sums[None, :]).to(out.dtype.element_ty).to(gl.uint16, bitcast=True).to(gl.uint32)
    out += (row * KV_HEADS + kv_head) * (GROUP * _D)
    two = out.to(gl.pointer_type(gl.uint32)) + (column // 2)[None, :] * _HALF + word[:, None]
    live = (column % 2 == 0) & (column // 2 < GROUP)
    gl.store(two, first | (second << 16), mask=live[None, :] & (word >= 0)[:, None])


def takes(qkv: Tensor, k_cache: Tensor, group: int, keys: int) -> bool:
    """Whether `attend_code_slices` can: heads of 128, up to 8 of q for each of K, and blocks that fill slices or are
    filled by them; bfloat16 beside any codes, since two of float8 are not float16."""
    exact = qkv.dtype == torch.bfloat16 or (qkv.dtype == torch.float16 and k_cache.dtype == torch.int8)
    block_size, width = k_cache.shape[2:]
    whole = block_size % keys == 0 or keys % block_size == 0
    return exact and whole and k_cache.dtype in TYPES and width == HEAD and group <= 8


def attend_code_slices(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, scales: tuple[Tensor, Tensor], out: Tensor, block_tables: Tensor,
    seq_lens: Tensor, new: NewTokens, *, scale: float, keys: int,
) -> None:  # fmt: skip
    """As `paged_attention.attend_decode_qkv` of caches of codes, of what `takes` takes, into `out` [B, heads, 128].

    scales: of K and V, float32 [blocks, kv_heads, block_size]. keys: that a program holds in shared memory."""
    rows, heads = out.shape[:2]
    kv_heads, block_size = k_cache.shape[1:3]
    group = heads // kv_heads
    live = 2 * triton.next_power_of_2(group)
    _decode_code_slices_kernel[(kv_heads, rows)](
        qkv, k_cache.view(torch.int16), v_cache.view(torch.int16), *scales, out, block_tables, seq_lens,
        qkv.stride(0), block_tables.stride(0), block_tables.shape[1], *new.arguments(),
        CODE=TYPES[k_cache.dtype], LARGEST=LARGEST[kv_dtype_of(k_cache)], NORM=new.q_weight is not None,
        KV_HEADS=kv_heads, GROUP=group, N=max(8, live), LIVE=max(4, live), BLOCK=block_size, KEYS=keys, SCALE=scale,
        num_warps=WARPS, launch_pdl=True,
    )  # fmt: skip
