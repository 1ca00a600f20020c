"""Products with weights of eight bits by tensor cores, in tiles of outputs x tokens.

x comes as codes (`quantise_triton`), or as it is for a weight alone, whose codes are then widened on their way to the
tensor cores: each is exact in 16 bits. Where tiles make too few programs, K is cut as in `matvec_large_triton`.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.eight_bit import EightBit
from nanoengine.kernels.matvec_large_triton import _add_parts_kernel
from nanoengine.kernels.matvec_parts_triton import finish, halves, load_if, pick_rows, prefetch_rows
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs

_PROGRAMS = 132  # multiprocessors of a Hopper GPU
_ENOUGH = 64  # programs from which adding up parts costs more than idle multiprocessors (one H200, 2026-11-29)
_BAND = 8  # tiles of tokens that follow each other through one tile of the weight


@triton.jit(do_not_specialize=["rows"])
def _tile_kernel(
    x_ptr, x_scale_ptr, weight_ptr, scale_ptr, bias_ptr, add_ptr, y_ptr, partial_ptr, rows, x_stride, add_stride,
    N: tl.constexpr, K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr, BAND: tl.constexpr,
    SPLITS: tl.constexpr, SPAN: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
    PLAIN: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCKS: a scale of the weight for each BLOCK_K inputs. GROUPS: one of x. Else one an output, and one a token."""
    width: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    wide: tl.constexpr = not PLAIN and weight_ptr.dtype.element_ty == tl.int8  # sums are exact integers
    tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    # A band of token tiles is walked down each tile of the weight, which is then in L2.
    band = tl.program_id(0) // (BAND * tiles)
    inside = tl.minimum(tl.cdiv(rows, BLOCK_T) - band * BAND, BAND)
    at = tl.program_id(0) % (BAND * tiles)
    tile, token_tile = at // inside, band * BAND + at % inside
    row, source = pick_rows(tile, N, BLOCK_N, GATED)
    row, source = row[:, None], source[:, None]
    first = tl.program_id(1) * SPAN
    t = (token_tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)[None, :]
    w_mask, t_mask = row < N, t < rows
    release_dependents(PDL)
    if PDL:
        prefetch_rows(weight_ptr, source, first, w_mask, K, AHEAD)
    w_scales = scale_ptr + source // SCALE_ROWS * SCALE_COLUMNS
    w_scale = tl.load(w_scales, mask=w_mask, other=0.0)
    wait_for_inputs(PDL)
    k = tl.arange(0, BLOCK_K)
    w_ptrs = weight_ptr + source.to(tl.int64) * K + k[None, :]
    x_ptrs = x_ptr + t * x_stride + k[:, None]
    x_scales = x_scale_ptr + t * ((K + BLOCK_K - 1) // BLOCK_K if GROUPS else 1)
    acc = tl.zeros((width, BLOCK_T), tl.int32 if wide and not BLOCKS else tl.float32)
    for start in tl.range(first, first + SPAN, BLOCK_K, num_stages=STAGES):
        k_left = K - start
        x = tl.load(x_ptrs + start, mask=t_mask & (k[:, None] < k_left), other=0.0)
        w = tl.load(w_ptrs + start, mask=w_mask & (k[None, :] < k_left), other=0.0)
        if PLAIN:
            w = w.to(x.dtype)
        if BLOCKS:
            part = tl.dot(w, x, input_precision="ieee").to(tl.float32)
            inside_k = k_left > 0
            part *= tl.load(w_scales + start // BLOCK_K, mask=w_mask & inside_k, other=0.0)
            if GROUPS:
                part *= tl.load(x_scales + start // BLOCK_K, mask=t_mask & inside_k, other=0.0)
            acc += part
        elif wide:
            acc = tl.dot(w, x, acc, out_dtype=tl.int32)
        elif PLAIN:
            acc = tl.dot(w, x, acc, input_precision="ieee")
        else:  # else Hopper's tensor cores keep 14 bits of the sum
            acc = tl.dot(w, x, acc, max_num_imprecise_acc=BLOCK_K)
    sums = acc.to(tl.float32)
    if not BLOCKS:
        sums *= w_scale
    if not (PLAIN or GROUPS):
        sums *= tl.load(x_scales, mask=t_mask, other=0.0)
    n = (tile * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    mask = (n < N) & t_mask
    y, up = halves(sums, BLOCK_N, BLOCK_T, GATED)
    if SPLITS == 1:
        finish(
            y, up, load_if(HAS_BIAS, bias_ptr + n, n < N), load_if(HAS_BIAS and GATED, bias_ptr + N + n, n < N),
            load_if(HAS_ADD, add_ptr + t * add_stride + n, mask), y_ptr + t * N + n, mask, GATED, ACTIVATION,
        )  # fmt: skip
    else:
        out = partial_ptr + (tl.program_id(1) * rows + t) * (2 * N if GATED else N) + n
        tl.store(out, y, mask=mask)
        if GATED:
            tl.store(out + N, up, mask=mask)


@dataclass(frozen=True, slots=True)
class Tile:
    """Outputs, K and tokens a tile, warps, pipeline stages, parts of K."""

    block_n: int
    block_k: int
    block_t: int
    warps: int
    stages: int
    splits: int = 1


def tile_for(rows: int, outputs: int, k: int, *, gated: bool, itemsize: int, block: int) -> Tile:
    """As `large_tile`: bytes in flight count for more than the number of programs. itemsize: of x. block: inputs of a
    block of the weight, 0 where an output has one scale."""
    block_t = min(128, max(16, triton.next_power_of_2(rows)))
    width = 64 if rows <= 64 else 128
    block_k = block or (256 if rows <= 64 and itemsize == 1 else 128)
    stage = (width + block_t * itemsize) * block_k
    stages = max(2, min(8 if rows <= 64 else 4, 196608 // stage))
    tiles, splits = triton.cdiv(outputs * (1 + gated), width) * triton.cdiv(rows, block_t), 1
    while splits < 4 and tiles * splits < _ENOUGH and k // (2 * splits) >= 512:
        splits *= 2
    if rows <= 16 and itemsize == 1 and tiles > 2 * _PROGRAMS:
        stages = min(stages, 3)  # several programs share a multiprocessor (one H200, 2026-11-29)
    return Tile(width // (1 + gated), block_k, block_t, 4 if rows <= 64 else 8, stages, splits)


def tiled(
    w: EightBit,
    x: Tensor,
    x_scale: Tensor | None,
    bias: Tensor | None,
    *,
    dtype: torch.dtype,
    gate: Activation | None = None,
    add: Tensor | None = None,
    out: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """The product of codes [T, K] and their scales, or of plain x without them, as `dtype`."""
    rows, k = x.shape
    outputs = len(w.weight) // 2 if gate else len(w.weight)
    assert x.stride(1) == 1 and w.weight.is_contiguous() and w.scale.is_contiguous(), (x.stride(), w)
    assert add is None or (add.shape == (rows, outputs) and add.stride(1) == 1), (add, outputs)
    assert out is None or (out.shape == (rows, outputs) and out.is_contiguous()), (out, outputs)
    y = torch.empty(rows, outputs, dtype=dtype, device=x.device) if out is None else out
    if rows == 0:
        return y
    blocks = w.columns < k or w.inputs == "group"
    tile = tile or tile_for(
        rows, outputs, k, gated=gate is not None, itemsize=x.element_size(), block=w.columns if blocks else 0
    )
    span = triton.cdiv(triton.cdiv(k, tile.splits), tile.block_k) * tile.block_k
    partial = y
    if tile.splits > 1:
        partial = torch.empty(tile.splits, rows, len(w.weight), dtype=torch.float32, device=x.device)
    flags = {"GATED": gate is not None, "ACTIVATION": gate, "HAS_BIAS": bias is not None, "HAS_ADD": add is not None}
    tail = (bias if bias is not None else x, add if add is not None else x)
    add_stride = 0 if add is None else add.stride(0)
    grid = (triton.cdiv(outputs, tile.block_n) * triton.cdiv(rows, tile.block_t), tile.splits)
    _tile_kernel[grid](
        x, x if x_scale is None else x_scale, w.weight, w.scale, *tail, y, partial, rows, x.stride(0), add_stride,
        N=outputs, K=k, BLOCK_T=tile.block_t, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        SCALE_ROWS=w.rows, SCALE_COLUMNS=w.scale.shape[1], BAND=_BAND,
        SPLITS=tile.splits, SPAN=span, AHEAD=min(1024, triton.next_power_of_2(span)), STAGES=tile.stages,
        PLAIN=x_scale is None, BLOCKS=blocks, GROUPS=w.inputs == "group",
        num_warps=tile.warps, **flags, **pdl_options(x),
    )  # fmt: skip
    if tile.splits > 1:
        block_n = min(256, triton.next_power_of_2(outputs))
        _add_parts_kernel[(rows, triton.cdiv(outputs, block_n))](
            partial, *tail, y, rows, add_stride,
            N=outputs, BLOCK_N=block_n, SPLITS=tile.splits, num_warps=2, **flags, **pdl_options(x),
        )  # fmt: skip
    return y
