"""Weights in the blocks of a GGUF file, in plain torch: how each type is decoded, products and looked-up rows.

A row of `in` weights is `in / block` blocks of `size` bytes each; a weight [out, in] is uint8 [out, in / block * size].
Values are those of `gguf.dequantize`, bit for bit: float32, by the same operations in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_CPU_TILE, _GPU_TILE = 1 << 20, 1 << 24  # weights that are decoded at a time: in the CPU's cache; few launches


@dataclass(frozen=True, slots=True)
class BlockType:
    """A type of block.

    Attributes:
        name: the gguf package's. block: weights. size: bytes.
        codes: uint8 [blocks, size] -> uint8 [blocks, block], before scales. decode: those two -> float32.
    """

    name: str
    block: int
    size: int
    codes: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor, Tensor], Tensor]

    def row_bytes(self, width: int) -> int:
        """Bytes of a row of `width` weights, a multiple of `block`."""
        assert width % self.block == 0
        return width // self.block * self.size

    def width(self, row_bytes: int) -> int:
        """Weights in a row of so many bytes."""
        assert row_bytes % self.size == 0
        return row_bytes // self.size * self.block


def dequantise(blocks: Tensor, kind: str) -> Tensor:
    """uint8 [..., bytes of a row] -> float32 [..., weights of a row]."""
    type_ = BLOCK_TYPES[kind]
    each = blocks.reshape(-1, type_.size)
    values = type_.decode(each, type_.codes(each))
    return values.view(*blocks.shape[:-1], type_.width(blocks.shape[-1]))


def dummy_blocks(bits: Tensor, kind: str, deviation: float) -> Tensor:
    """uint8 [..., bytes of a row] of random bits -> blocks with scales for which weights have this deviation."""
    blocks = bits.reshape(-1, BLOCK_TYPES[kind].size).clone()
    for at, value in _DUMMY_HALVES[kind].items():
        half = torch.tensor([value * deviation], dtype=torch.float16)
        blocks[:, at : at + 2] = half.view(torch.uint8).to(blocks.device)
    return blocks.view(bits.shape)


def gguf_linear(
    x: Tensor, blocks: Tensor, kind: str, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """x @ dequantise(blocks).T + bias. A tile of rows is decoded at a time, so that little memory is needed.

    Args:
        x: [T, in], of any float dtype. blocks: uint8 [out, bytes of a row], contiguous.
        kind: a key of `BLOCK_TYPES`. bias: [out].
        out: [T, out], where the result goes; it may be columns of a wider tensor.

    Returns:
        [T, out] of x's dtype; products are summed in float32 and rounded once.
    """
    if out is None:
        out = torch.empty(len(x), len(blocks), dtype=x.dtype, device=x.device)
    wide = x.float()
    for rows in _tiles(blocks, kind):
        part = None if bias is None else bias[rows].float()
        out[:, rows] = F.linear(wide, dequantise(blocks[rows], kind), part)
    return out


def gguf_rows(ids: Tensor, blocks: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Rows of an embedding: int [T] -> [T, in] of `dtype`. Decodes the looked-up rows only."""
    return dequantise(blocks.index_select(0, ids), kind).to(dtype)


def _tiles(blocks: Tensor, kind: str) -> Iterator[slice]:
    width = BLOCK_TYPES[kind].width(blocks.shape[1])
    rows = max(1, (_GPU_TILE if blocks.is_cuda else _CPU_TILE) // max(1, width))
    return (slice(start, start + rows) for start in range(0, len(blocks), rows))


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block: float32 [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _bits(values: Tensor, width: int, count: int) -> Tensor:
    """Fields of `width` bits of each byte, the lowest first: uint8 [n, groups, bytes] -> [n, groups, count, bytes]."""
    shifts = torch.arange(0, width * count, width, dtype=torch.uint8, device=values.device)
    return (values.unsqueeze(2) >> shifts.view(1, 1, -1, 1)) & ((1 << width) - 1)


def _nibbles(values: Tensor, group: int) -> Tensor:
    """uint8 [n, bytes] -> uint8 [n, 2 * bytes]: of each `group` bytes first the low halves, then the high ones."""
    return _bits(values.reshape(len(values), -1, group), 4, 2).reshape(len(values), -1)


def _fifth_bits(words: Tensor) -> Tensor:
    """uint8 [n, 4], bit i of the 32 belongs to weight i -> uint8 [n, 32], 0 or 16."""
    return _bits(words.reshape(len(words), 4, 1), 1, 8).reshape(len(words), 32) << 4


def _q4_0(blocks: Tensor, codes: Tensor) -> Tensor:
    return _half(blocks, 0) * (codes.float() - 8)


def _q5_0(blocks: Tensor, codes: Tensor) -> Tensor:
    return _half(blocks, 0) * (codes.float() - 16)


def _with_min(blocks: Tensor, codes: Tensor) -> Tensor:
    return _half(blocks, 0) * codes.float() + _half(blocks, 2)


def _q8_0(blocks: Tensor, codes: Tensor) -> Tensor:
    return codes.view(torch.int8).float() * _half(blocks, 0)


def _scales_and_mins(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K: uint8 [n, 12] -> eight scales and eight minima of 6 bits, float32 [n, 8] each."""
    scale, low, mixed = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((scale & 63, (mixed & 15) | ((scale >> 2) & 48)), dim=1)
    mins = torch.cat((low & 63, (mixed >> 4) | ((low >> 2) & 48)), dim=1)
    return scales.float(), mins.float()


def _scaled_groups(blocks: Tensor, codes: Tensor) -> Tensor:
    """Of Q4_K and Q5_K: scale and minimum of each 32 codes; uint8 [n, 256] -> float32 [n, 256]."""
    scales, mins = _scales_and_mins(blocks[:, 4:16])
    scale, low = (_half(blocks, 0) * scales).unsqueeze(2), (_half(blocks, 2) * mins).unsqueeze(2)
    return (scale * codes.float().view(-1, 8, 32) - low).view(-1, 256)


def _q6_k(blocks: Tensor, codes: Tensor) -> Tensor:
    scales = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return (scales.unsqueeze(2) * (codes.float() - 32).view(-1, 16, 16)).view(-1, 256)


def _q5_k_codes(blocks: Tensor) -> Tensor:
    fifth = _bits(blocks[:, 16:48].reshape(-1, 1, 32), 1, 8).reshape(-1, 256) << 4
    return _nibbles(blocks[:, 48:], 32) | fifth


def _q6_k_codes(blocks: Tensor) -> Tensor:
    upper = _bits(blocks[:, 128:192].reshape(-1, 2, 32), 2, 4).reshape(-1, 256) << 4
    return _nibbles(blocks[:, :128], 64) | upper


_TYPES = (
    BlockType("Q4_0", 32, 18, lambda blocks: _nibbles(blocks[:, 2:], 16), _q4_0),
    BlockType("Q4_1", 32, 20, lambda blocks: _nibbles(blocks[:, 4:], 16), _with_min),
    BlockType("Q5_0", 32, 22, lambda blocks: _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6]), _q5_0),
    BlockType("Q5_1", 32, 24, lambda blocks: _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8]), _with_min),
    BlockType("Q8_0", 32, 34, lambda blocks: blocks[:, 2:].contiguous(), _q8_0),
    BlockType("Q4_K", 256, 144, lambda blocks: _nibbles(blocks[:, 16:], 32), _scaled_groups),
    BlockType("Q5_K", 256, 176, _q5_k_codes, _scaled_groups),
    BlockType("Q6_K", 256, 210, _q6_k_codes, _q6_k),
)
BLOCK_TYPES = {each.name: each for each in _TYPES}

_FOUR, _FIVE, _EIGHT = 1 / 4.61, 1 / 9.23, 1 / 73.9  # over the deviation of codes of so many bits
_DUMMY_HALVES: Mapping[str, Mapping[int, float]] = {
    "Q4_0": {0: _FOUR},
    "Q4_1": {0: _FOUR, 2: -7.5 * _FOUR},
    "Q5_0": {0: _FIVE},
    "Q5_1": {0: _FIVE, 2: -15.5 * _FIVE},
    "Q8_0": {0: _EIGHT},
    "Q4_K": {0: 1 / 258, 2: 7.5 / 258},
    "Q5_K": {0: 1 / 527, 2: 15.5 / 527},
    "Q6_K": {208: 1 / 1366},
}
"""The float16 numbers of a block, by the first byte, for which random codes give weights of mean 0 and deviation 1."""
