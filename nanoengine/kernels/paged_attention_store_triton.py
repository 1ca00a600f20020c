"""Triton: K and V into the paged cache, as they are or in eight bits (`kv_quant`)."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.kv_quant import LARGEST, kv_dtype_of
from nanoengine.kernels.paged_attention_plan import padded_head
from nanoengine.kernels.paged_attention_read_triton import Scales, rows_of
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs


@triton.jit
def _codes(x, LARGEST: tl.constexpr, DTYPE: tl.constexpr):
    """Heads [H, D] -> (codes [H, D], scales [H, 1]), as `kv_quant.quantise_heads`."""
    values = x.to(tl.float32)
    size = tl.abs(values)
    largest = tl.max(size, axis=1, keep_dims=True)
    scale = tl.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32))
    # NaN as of the reference: it makes the scale NaN, whatever a maximum does with it
    broken = tl.max((size != size).to(tl.int32), axis=1, keep_dims=True) > 0
    codes = tl.div_rn(values, tl.broadcast_to(tl.where(scale == 0, 1.0, scale), values.shape))
    if DTYPE == tl.int8:  # noqa: SIM300
        codes = tl.floor(codes + 0.5)
    codes = tl.minimum(tl.maximum(codes, -LARGEST), LARGEST)
    return codes.to(DTYPE), tl.where(broken, float("nan"), scale)


@triton.jit
def _store_kv(
    k, v, k_cache, v_cache, k_scales, v_scales, slots, k_stride, v_stride,
    HEADS: tl.constexpr, HEADS_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    LARGEST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    wait_for_inputs(PDL)
    release_dependents(PDL)
    slot = tl.load(slots + token)
    head = tl.arange(0, HEADS_PAD)[:, None]
    d = tl.arange(0, D_PAD)[None, :]
    live = (head < HEADS) & (d < D)
    at = (slot // BLOCK_SIZE * HEADS + head) * BLOCK_SIZE + slot % BLOCK_SIZE
    to = at * D + d
    key = tl.load(k + token * k_stride + head * D + d, mask=live, other=0.0)
    value = tl.load(v + token * v_stride + head * D + d, mask=live, other=0.0)
    if LARGEST > 0:
        key, k_scale = _codes(key, LARGEST, k_cache.dtype.element_ty)
        value, v_scale = _codes(value, LARGEST, v_cache.dtype.element_ty)
        tl.store(k_scales + at, k_scale, mask=head < HEADS)
        tl.store(v_scales + at, v_scale, mask=head < HEADS)
    tl.store(k_cache + to, key, mask=live)
    tl.store(v_cache + to, value, mask=live)


def store_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, scales: Scales | None = None
) -> None:
    """Store [T, kv_heads, head_size] at `slot_mapping`, int64 [T], of caches [blocks, kv_heads, block_size, head_size]
    (block * block_size + offset). With `scales`, of K and V, the caches have codes (`kv_quant`)."""
    tokens, heads, width = k.shape
    if tokens == 0:
        return
    k, v = rows_of(k), rows_of(v)
    _store_kv[(tokens,)](
        k, v, k_cache, v_cache, *(scales or (k, v)), slot_mapping, k.stride(0), v.stride(0),
        HEADS=heads, HEADS_PAD=triton.next_power_of_2(heads), D=width, D_PAD=padded_head(width),
        BLOCK_SIZE=k_cache.shape[2], LARGEST=LARGEST[kv_dtype_of(k_cache)] if scales else 0.0,
        num_warps=4, **pdl_options(k),
    )  # fmt: skip
