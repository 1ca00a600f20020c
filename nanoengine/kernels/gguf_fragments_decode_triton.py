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
def _values(
    word, upper, more, late_row, group, weight, scale, least, later_scale, later_least,
    KIND: tl.constexpr, FOURS: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    """The eight weights [..., 8] of words [..., 1]. late_row: 1 in the second half of a tile's rows. Of Q6_K the last
    four weights have the later scale."""
    shift = weight // 2 * 4 + weight % 2 * 16
    codes = (word >> shift) & 15
    if FOURS == 2:
        codes |= ((upper >> shift) & 15) << 4
        codes = (codes << 24) >> 24
    if MORE == 1:
        codes |= ((more >> (late_row * 4 + weight // 2 + group % 2 * 8 + weight % 2 * 16)) & 1) << 4
    if MORE == 2:
        codes |= ((more >> ((late_row * 4 + weight // 2) * 2 + weight % 2 * 16)) & 3) << 4
    if KIND == "Q6_K":
        scale, least = tl.where(weight < 4, scale, later_scale), tl.where(weight < 4, least, later_least)
    return scale * codes.to(tl.float32) + least


@triton.jit
def _decode(
    tile, at, row, group, t, here, out,
    KIND: tl.constexpr, FOURS: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    """Writes the weights of the words `at` of a tile, which are those of `row`, `group` and `t`; all of the shape
    [steps, words]. out: where the tile's weights of the row begin."""
    lane = row % 8 * 4 + t
    word, upper, more = tl.load(tile + at, mask=here, other=0), 0, 0
    if FOURS == 2:
        upper = tl.load(tile + at + 512, mask=here, other=0)[:, :, None]
    if MORE == 1:
        more = tl.load(tile + (512 + lane * 4 + group // 2), mask=here, other=0)[:, :, None]
    if MORE == 2:
        more = tl.load(tile + (512 + lane * 4 + group % 4 + group // 4 * 128), mask=here, other=0)[:, :, None]
    head = tile + (FOURS * 512 + MORE * 128)
    scale, least = _scale_and_least(head, row, group, 0, here, KIND)
    later_scale, later_least = _scale_and_least(head, row, group, 1, here, KIND)
    weight = tl.arange(0, 8)[None, None, :]
    values = _values(
        word[:, :, None], upper, more, row[:, :, None] // 8, group[:, :, None], weight,
        scale[:, :, None], least[:, :, None], later_scale[:, :, None], later_least[:, :, None], KIND, FOURS, MORE,
    )  # fmt: skip
    if KIND == "Q6_K":
        k = (group * 32 + t * 4)[:, :, None] + (weight // 4 * 16 + weight % 4)
    else:
        k = (group * 32 + t * 8)[:, :, None] + weight
    tl.store(out[:, :, None] + k, values.to(out.dtype.element_ty), mask=here[:, :, None])


@triton.jit
def _fragment_rows_kernel(
    ids_ptr, tiles_ptr, out_ptr,
    KIND: tl.constexpr, FOURS: tl.constexpr, MORE: tl.constexpr, WORDS: tl.constexpr, TILES: tl.constexpr,
    BLOCK_S: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A row. TILES: of it. BLOCK_S: of them in a program."""
    wait_for_inputs(PDL)  # before the next kernel may start: see `embedding_triton`
    release_dependents(PDL)
    place = tl.program_id(0).to(tl.int64)
    line = tl.load(ids_ptr + place).to(tl.int64)
    step = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]
    group, t = tl.arange(0, 32)[None, :] // 4, tl.arange(0, 32)[None, :] % 4
    here = (step < TILES) & (group < 8)
    tile = tiles_ptr.to(tl.pointer_type(tl.int32)) + (line // 16 * TILES + step) * WORDS
    row = (line % 16).to(tl.int32) + 0 * group
    at = (row % 8 * 4 + t) * 4 + row // 8 + group % 2 * 2 + group // 2 * 128
    out = out_ptr + place * (TILES * 256) + (step * 256 + 0 * group)
    _decode(tile, at, row, group, t, here, out, KIND, FOURS, MORE)


@triton.jit
def _fragment_tiles_kernel(
    tiles_ptr, out_ptr,
    KIND: tl.constexpr, FOURS: tl.constexpr, MORE: tl.constexpr, WORDS: tl.constexpr, TILES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A tile: its words are read one behind the other."""
    wait_for_inputs(PDL)
    release_dependents(PDL)
    line, step = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, 512)[None, :]
    group, t = at // 128 * 2 + at % 4 // 2, at // 4 % 4
    row = at // 16 % 8 + at % 2 * 8
    tile = tiles_ptr.to(tl.pointer_type(tl.int32)) + (line * TILES + step) * WORDS
    out = out_ptr + (line * 16 + row) * (TILES * 256) + step * 256
    _decode(tile, at, row, group, t, at >= 0, out, KIND, FOURS, MORE)


def rows(ids: Tensor | None, tiles: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Rows `ids` (int [T], contiguous), or all -> [T, in] of `dtype`."""
    assert tiles.is_contiguous() and (ids is None or ids.is_contiguous()), (tiles.stride(), ids)
    steps, of = tiles.shape[1], FRAGMENTS[kind]
    count = len(tiles) * LINES if ids is None else len(ids)
    out = torch.empty(count, steps * BLOCK, dtype=dtype, device=tiles.device)
    given = {"KIND": kind, "FOURS": of.fours, "MORE": of.more, "WORDS": LINES * of.row_bytes // 4, "TILES": steps}
    if ids is None and out.numel():
        _fragment_tiles_kernel[(len(tiles), steps)](tiles, out, **given, num_warps=4, **pdl_options(tiles))
    elif out.numel():
        block = min(8, triton.next_power_of_2(steps))
        _fragment_rows_kernel[(count, triton.cdiv(steps, block))](
            ids, tiles, out, **given, BLOCK_S=block, num_warps=4, **pdl_options(tiles)
        )
    return out
