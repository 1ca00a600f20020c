"""Weights in the blocks of a GGUF file, in the order in which tensor cores take them: the same bits, so that 16 bytes
that a thread loads are operands of products without a trip through shared memory.

A tile is 16 rows of the weight and 256 weights of each. Its words lie as a warp's threads want them. Thread 4 * g + t
has, of rows g and g + 8 and of each of the eight groups of 32, the weights 8 * t to 8 * t + 7 (of Q6_K, whose groups
have 16, 4 * t to 4 * t + 3 and as many of the second half). First come the lowest four bits, eight to a word, the even
weights in its low half, the odd ones in its high half; of Q8_0 the other four follow in the same way. Then further
bits, in which both rows share a word, and of one bit also two groups. Then scales, as in the file: 16 rows of each
field.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanoengine.kernels.gguf import BLOCK_TYPES

LINES, BLOCK = 16, 256
_WEIGHTS = 1 << 22  # reordered at a time: each needs four bytes then


@dataclass(frozen=True, slots=True)
class FragmentType:
    """Of a code, sets of four bits and further bits; bytes of a block, from and to, of each field of scales."""

    fours: int
    more: int
    fields: tuple[tuple[int, int], ...]

    @property
    def row_bytes(self) -> int:
        """Of 256 weights."""
        scales = sum(stop - start for start, stop in self.fields)
        return self.fours * 128 + self.more * 32 + scales * (1 if self.fields[0][1] >= 16 else 8)


FRAGMENTS = {
    "Q4_0": FragmentType(1, 0, ((0, 2),)),
    "Q4_1": FragmentType(1, 0, ((0, 4),)),
    "Q5_0": FragmentType(1, 1, ((0, 2),)),
    "Q5_1": FragmentType(1, 1, ((0, 4),)),
    "Q8_0": FragmentType(2, 0, ((0, 2),)),
    "Q4_K": FragmentType(1, 0, ((0, 16),)),
    "Q5_K": FragmentType(1, 1, ((0, 16),)),
    "Q6_K": FragmentType(1, 2, ((192, 208), (208, 210))),
}


def fits(blocks: Tensor, kind: str) -> bool:
    """Whether a program's 32 rows and 256 weights divide those of blocks [out, bytes of a row]."""
    return len(blocks) % (2 * LINES) == 0 and BLOCK_TYPES[kind].width(blocks.shape[1]) % BLOCK == 0


def fragments(blocks: Tensor, kind: str) -> Tensor:
    """uint8 [out, bytes of a row] that fit -> uint8 [out / 16, tiles of a row, bytes of a tile]."""
    tiles, columns = len(blocks) // LINES, BLOCK_TYPES[kind].width(blocks.shape[1]) // BLOCK
    size = LINES * FRAGMENTS[kind].row_bytes
    made = torch.empty(tiles, columns, size, dtype=torch.uint8, device=blocks.device)
    step = max(1, _WEIGHTS // (LINES * columns * BLOCK))
    for start in range(0, tiles, step):
        part = blocks[start * LINES : (start + step) * LINES]
        made[start : start + step] = torch.cat(list(_planes(part, columns, kind)), dim=2)
    return made


def _planes(blocks: Tensor, columns: int, kind: str) -> list[Tensor]:
    """Each uint8 [tiles, columns, bytes]."""
    type_, of = BLOCK_TYPES[kind], FRAGMENTS[kind]
    each = blocks.reshape(-1, type_.size)
    codes = type_.codes(each).reshape(-1, 2, 8, columns, 8, 32)  # tile, half of its rows, g, column, group, weight
    if kind == "Q6_K":
        codes = _cut(codes, 5, 2, 4, 4).transpose(5, 6).flatten(5)
    codes = _cut(codes, 5, 4, 8).permute(0, 3, 1, 2, 4, 5, 6)  # tile, column, half, g, group, t, weight
    weight = torch.arange(8, device=blocks.device)
    shifts = weight // 2 * 4 + weight % 2 * 16
    planes = []
    for four in range(of.fours):
        words = _packed((codes >> 4 * four) & 15, shifts, (6,))
        planes.append(_cut(words, 4, 4, 2).permute(0, 1, 4, 3, 6, 5, 2))
    if of.more:
        two = torch.arange(2, device=blocks.device)
        shifts = (two.view(2, 1, 1, 1, 1) * 4 + weight // 2) * of.more + weight % 2 * 16
        if of.more == 1:
            codes, shifts = _cut(codes, 4, 4, 2), shifts.unsqueeze(3) + 8 * two.view(2, 1, 1)
            planes.append(_packed(codes >> 4, shifts, (2, 5, 7)).permute(0, 1, 2, 4, 3))
        else:
            planes.append(_cut(_packed(codes >> 4, shifts, (2, 6)), 3, 2, 4).permute(0, 1, 3, 2, 5, 4))
    rows = each.view(-1, LINES, columns, len(each) // len(blocks) // columns, type_.size)
    scales = [rows[..., start:stop].transpose(1, 2).flatten(2) for start, stop in of.fields]
    return [plane.flatten(2).contiguous().view(torch.uint8) for plane in planes] + scales


def _packed(values: Tensor, shifts: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Words int32 of the values, whose bits do not overlap, over `dims`."""
    return (values.to(torch.int32) << shifts.to(torch.int32)).sum(dims, dtype=torch.int32)


def _cut(x: Tensor, dim: int, *sizes: int) -> Tensor:
    """`unflatten`."""
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])
