"""Rows of a weight in the order of `gguf_fragments`, decoded to memory."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.gguf_fragments import BLOCK, FRAGMENTS, LINES
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs


@triton.jit
def _half(words):
    return (words & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _scale_and_least(head, row, group, late_half, here, KIND: tl.constexpr):
    """float32 like `group`: scale of each group (Q6_K: of its half), and what is added. head: words of the tile's."""
    if (KIND == "Q4_K") or (KIND == "Q5_K"):
        head += row * 4
        halves, low = tl.load(head, mask=here, other=0), tl.load(head + 1, mask=here, other=0)
        mid, high = tl.load(head + 2, mask=here, other=0), tl.load(head + 3, mask=here, other=0)
        late = group >= 4  # their fields are split
        scales = tl.where(late, (high & 0x0F0F0F0F) | ((low >> 2) & 0x30303030), low & 0x3F3F3F3F)
        mins = tl.where(late, ((high >> 4) & 0x0F0F0F0F) | ((mid >> 2) & 0x30303030), mid & 0x3F3F3F3F)
        scale = _half(halves) * ((scales >> group % 4 * 8) & 255).to(tl.float32)
        return scale, -(_half(halves >> 16) * ((mins >> group % 4 * 8) & 255).to(tl.float32))
    elif KIND == "Q6_K":
        d = tl.load((head + 64).to(tl.pointer_type(tl.float16)) + row, mask=here, other=0.0).to(tl.float32)
        at = head.to(tl.pointer_type(tl.int8)) + row * 16 + group * 2 + late_half
        scale = d * tl.load(at, mask=here, other=0).to(tl.float32)
        return scale, -32.0 * scale
    elif (KIND == "Q4_1") or (KIND == "Q5_1"):
        word = tl.load(head + row * 8 + group, mask=here, other=0)
        return _half(word), _half(word >> 16)
    else:
        scale = tl.load(head.to(tl.pointer_type(tl.float16)) + row * 8 + group, mask=here, other=0.0).to(tl.float32)
        return scale, scale * (-8.0 if KIND == "Q4_0" else -16.0 if KIND == "Q5_0" else 0.0)


@triton.jit
def _fragment_rows_kernel(
    ids_ptr, tiles_ptr, out_ptr,
    KIND: tl.constexpr, FOURS: tl.constexpr, MORE: tl.constexpr, WORDS: tl.constexpr, TILES: tl.constexpr,
    BLOCK_S: tl.constexpr, HAS_IDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """TILES: of a row. BLOCK_S: of them in a program. A tensor is [tiles, groups, t, halves of eight, weights]."""
    wait_for_inputs(PDL)  # before the next kernel may start: see `embedding_triton`
    release_dependents(PDL)
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(ids_ptr + place).to(tl.int64) if HAS_IDS else place
    step = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)[:, None, None, None, None]
    group = tl.arange(0, 8)[None, :, None, None, None]
    t = tl.arange(0, 4)[None, None, :, None, None]
    half = tl.arange(0, 2)[None, None, None, :, None]
    weight = half * 4 + tl.arange(0, 4)[None, None, None, None, :]
    here = step < TILES
    tile = tiles_ptr.to(tl.pointer_type(tl.int32)) + (row // 16 * TILES + step) * WORDS
    of_row = row % 16
    lane, late = of_row % 8 * 4 + t, of_row // 8
    word = tile + (lane * 4 + late + group % 2 * 2 + group // 2 * 128)
    shift = weight // 2 * 4 + weight % 2 * 16
    codes = (tl.load(word, mask=here, other=0) >> shift) & 15
    if FOURS == 2:
        codes |= ((tl.load(word + 512, mask=here, other=0) >> shift) & 15) << 4
        codes = (codes << 24) >> 24
    if MORE == 1:
        more = tl.load(tile + (512 + lane * 4 + group // 2), mask=here, other=0)
        codes |= ((more >> (late * 4 + weight // 2 + group % 2 * 8 + weight % 2 * 16)) & 1) << 4
    if MORE == 2:
        more = tl.load(tile + (512 + lane * 4 + group % 4 + group // 4 * 128), mask=here, other=0)
        codes |= ((more >> ((late * 4 + weight // 2) * 2 + weight % 2 * 16)) & 3) << 4
    scale, least = _scale_and_least(tile + (FOURS * 512 + MORE * 128), of_row, group, half, here, KIND)
    values = scale * codes.to(tl.float32) + least
    k = group * 32 + (half * 16 + t * 4 + weight % 4 if KIND == "Q6_K" else t * 8 + weight)
    out = out_ptr + place * (TILES * 256) + step * 256 + k
    tl.store(out, values.to(out_ptr.dtype.element_ty), mask=here)


def rows(ids: Tensor | None, tiles: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Rows `ids` (int [T], contiguous), or all -> [T, in] of `dtype`."""
    assert tiles.is_contiguous() and (ids is None or ids.is_contiguous()), (tiles.stride(), ids)
    count, steps, of = len(tiles) * LINES if ids is None else len(ids), tiles.shape[1], FRAGMENTS[kind]
    out = torch.empty(count, steps * BLOCK, dtype=dtype, device=tiles.device)
    block = min(8, triton.next_power_of_2(steps))
    if out.numel():
        _fragment_rows_kernel[(count, triton.cdiv(steps, block))](
            tiles if ids is None else ids, tiles, out, KIND=kind, FOURS=of.fours, MORE=of.more,
            WORDS=LINES * of.row_bytes // 4, TILES=steps, BLOCK_S=block, HAS_IDS=ids is not None,
            num_warps=4, **pdl_options(tiles),
        )  # fmt: skip
    return out
