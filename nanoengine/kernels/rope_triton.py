"""Head-wise norm of q and k, rotary embedding and the KV store: one read of qkv, no tensor in between."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.kv_quant import LARGEST, kv_dtype_of
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs
from nanoengine.kernels.quantise_triton import over

_FEW_TOKENS = 128


@triton.jit
def _qk_norm_rope_store_kernel(
    qkv_ptr, positions_ptr, inv_freq_ptr, q_weight_ptr, k_weight_ptr, q_ptr, k_cache_ptr, v_cache_ptr, slots_ptr,
    k_scales_ptr, v_scales_ptr, qkv_stride, block_size, k_block_stride, k_offset_stride, k_head_stride,
    v_block_stride, v_offset_stride, v_head_stride, scale_block_stride, scale_offset_stride, scale_head_stride,
    eps, magnitude,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, SCALED: tl.constexpr, BLOCK_HEADS: tl.constexpr, NORM: tl.constexpr,
    LARGEST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """LARGEST: of codes; 0: k and v are stored as they are."""
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
    i = tl.arange(0, HALF)[None, :]  # of the pairs in a head; those from PAIRS on are not rotated
    if INTERLEAVED:
        first, second = 2 * i, 2 * i + 1
    elif PAIRS * 2 == D:
        first, second = i, i + PAIRS
    else:
        first, second = tl.where(i < PAIRS, i, 2 * i), tl.where(i < PAIRS, i + PAIRS, 2 * i + 1)
    is_q = head < Q_HEADS
    is_k = (head >= Q_HEADS) & (head < Q_HEADS + KV_HEADS)
    is_v = (head >= Q_HEADS + KV_HEADS) & (head < Q_HEADS + 2 * KV_HEADS)
    in_half = i < D // 2
    if NORM:
        weight_ptr = tl.where(is_q, q_weight_ptr, k_weight_ptr)
        weight_a = tl.load(weight_ptr + first, mask=in_half & (is_q | is_k), other=0.0).to(tl.float32)
        weight_b = tl.load(weight_ptr + second, mask=in_half & (is_q | is_k), other=0.0).to(tl.float32)
    inv_freq = tl.load(inv_freq_ptr + i, mask=i < PAIRS, other=0.0)
    release_dependents(PDL)
    wait_for_inputs(PDL)

    source = qkv_ptr + token * qkv_stride + head * D
    mask = in_half & (is_q | is_k | is_v)
    raw_a = tl.load(source + first, mask=mask, other=0.0)
    raw_b = tl.load(source + second, mask=mask, other=0.0)
    angle = tl.load(positions_ptr + token).to(tl.float32) * inv_freq
    slot = tl.load(slots_ptr + token)
    cos, sin = tl.cos(angle), tl.sin(angle)
    if SCALED:
        scale_of = tl.where(i < PAIRS, magnitude, 1.0)
        cos, sin = cos * scale_of, sin * scale_of
    a, b = raw_a.to(tl.float32), raw_b.to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(a * a + b * b, axis=1, keep_dims=True) / D + eps)
        a = (a * scale * weight_a).to(raw_a.dtype).to(tl.float32)
        b = (b * scale * weight_b).to(raw_a.dtype).to(tl.float32)
    turned_a = (a * cos - b * sin).to(raw_a.dtype)
    turned_b = (b * cos + a * sin).to(raw_a.dtype)

    q_out = q_ptr + (token * Q_HEADS + head) * D
    tl.store(q_out + first, turned_a, mask=in_half & is_q)
    tl.store(q_out + second, turned_b, mask=in_half & is_q)
    block, offset = slot // block_size, slot % block_size
    store_k, store_v = in_half & is_k & (slot >= 0), in_half & is_v & (slot >= 0)
    k_head, v_head = head - Q_HEADS, head - Q_HEADS - KV_HEADS
    if LARGEST > 0:
        if (tl.program_id(1) + 1) * BLOCK_HEADS > Q_HEADS:
            code_a, code_b, scale = _codes_of_pairs(
                tl.where(is_v, raw_a, turned_a), tl.where(is_v, raw_b, turned_b), LARGEST, k_cache_ptr.dtype.element_ty
            )
            k_out = k_cache_ptr + block * k_block_stride + offset * k_offset_stride + k_head * k_head_stride
            v_out = v_cache_ptr + block * v_block_stride + offset * v_offset_stride + v_head * v_head_stride
            to = tl.where(is_v, v_out, k_out)
            tl.store(to + first, code_a, mask=store_k | store_v)
            tl.store(to + second, code_b, mask=store_k | store_v)
            at = block * scale_block_stride + offset * scale_offset_stride
            k_to, v_to = k_scales_ptr + k_head * scale_head_stride, v_scales_ptr + v_head * scale_head_stride
            tl.store(tl.where(is_v, v_to, k_to) + at, scale, mask=(is_k | is_v) & (slot >= 0))
        return
    k_a, k_b, v_a, v_b = turned_a, turned_b, raw_a, raw_b
    k_out = k_cache_ptr + block * k_block_stride + offset * k_offset_stride + k_head * k_head_stride
    tl.store(k_out + first, k_a, mask=store_k)
    tl.store(k_out + second, k_b, mask=store_k)
    v_out = v_cache_ptr + block * v_block_stride + offset * v_offset_stride + v_head * v_head_stride
    tl.store(v_out + first, v_a, mask=store_v)
    tl.store(v_out + second, v_b, mask=store_v)


@triton.jit
def _codes_of_pairs(a, b, LARGEST: tl.constexpr, DTYPE: tl.constexpr):
    """The two halves of heads [H, D / 2] -> (codes of both, scales [H, 1]), as `kv_quant.quantise_heads`."""
    a, b = a.to(tl.float32), b.to(tl.float32)
    largest = tl.max(tl.maximum(tl.abs(a), tl.abs(b)), axis=1, keep_dims=True)
    scale = tl.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32))
    broken = tl.max(((a != a) | (b != b)).to(tl.int32), axis=1, keep_dims=True) > 0
    by = tl.where(scale < 1e-36, 1.0, scale)  # a head of zeros, or of what is as good as zero
    return _code(a, by, LARGEST, DTYPE), _code(b, by, LARGEST, DTYPE), tl.where(broken, float("nan"), scale)


@triton.jit
def _code(values, by, LARGEST: tl.constexpr, DTYPE: tl.constexpr):
    codes = over(values, by)
    if DTYPE == tl.int8:  # noqa: SIM300
        codes = tl.floor(codes + 0.5)
    return tl.minimum(tl.maximum(codes, -LARGEST), LARGEST).to(DTYPE)


def _block_heads(tokens: int, heads: int, size: int, codes: bool) -> int:
    """Heads a program. Few tokens: spread over programs, whose start is the cost. Many: a token's heads together, as
    each thread works out the angles it needs, which costs more than the rest (16/8 heads of 128, 16,384 tokens, H200:
    159 us with 4 heads a program, 67 us with 32)."""
    elements = 512 if tokens <= _FEW_TOKENS else 1024 if codes and tokens <= 4 * _FEW_TOKENS else 4096
    wanted: int = min(max(1, elements // triton.next_power_of_2(size)), triton.next_power_of_2(heads))
    return wanted


def qk_norm_rope_store(
    qkv: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 0.0,
    magnitude: float = 1.0,
    interleaved: bool = False,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """As `rope.qk_norm_rope_store`. The norm's rounding and the rotation agree with the layers'; rows of qkv may be
    strided."""
    tokens, width = qkv.shape
    _, block_size, kv_heads, size = k_cache.shape
    q_heads = width // size - 2 * kv_heads
    assert width == (q_heads + 2 * kv_heads) * size and len(inv_freq) * 2 <= size, (qkv.shape, k_cache.shape)
    assert qkv.stride(1) == k_cache.stride(3) == v_cache.stride(3) == 1, (k_cache.stride(), v_cache.stride())
    assert (q_weight is None) == (k_weight is None), "norm weights come in pairs"
    assert scales is None or scales[0].stride() == scales[1].stride(), scales
    q = torch.empty(tokens, q_heads, size, dtype=qkv.dtype, device=qkv.device)
    if tokens == 0:
        return q
    half = triton.next_power_of_2(size // 2)
    heads = q_heads + 2 * kv_heads
    block_heads = _block_heads(tokens, heads, size, scales is not None)
    _qk_norm_rope_store_kernel[(tokens, triton.cdiv(heads, block_heads))](
        qkv, positions, inv_freq,
        inv_freq if q_weight is None else q_weight, inv_freq if k_weight is None else k_weight,
        q, k_cache, v_cache, slot_mapping, *(scales or (inv_freq, inv_freq)),
        qkv.stride(0), block_size, *k_cache.stride()[:3], *v_cache.stride()[:3],
        *(scales[0].stride() if scales else (0, 0, 0)), eps, magnitude,
        Q_HEADS=q_heads, KV_HEADS=kv_heads, D=size, PAIRS=len(inv_freq), HALF=half, INTERLEAVED=interleaved,
        SCALED=magnitude != 1.0, BLOCK_HEADS=block_heads, NORM=q_weight is not None,
        LARGEST=LARGEST[kv_dtype_of(k_cache)] if scales else 0.0, num_warps=2, **pdl_options(qkv),
    )  # fmt: skip
    return q
