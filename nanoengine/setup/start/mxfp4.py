"""MXFP4, as GPT-OSS's files have it: 4-bit floats (E2M1), 32 of which share an exponent. Experts only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nanoengine.api.errors import WeightsError
from nanoengine.setup.start.packed import InPieces, Join, PackedTensor

_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BIAS = 127  # of the exponents
_GROUP = 32  # values of one exponent, in 16 bytes


class Mxfp4Tensor(PackedTensor):
    """bfloat16 [experts, in, out]: transformers' order for dequantised files, which are transposed so.

    Args:
        blocks: uint8 [experts, out, in / 32, 16]; the lower half of a byte is the first of two values.
        scales: uint8 [experts, out, in / 32]: the exponents of two, plus 127.
    """

    def __init__(self, blocks: Tensor, scales: Tensor) -> None:
        self._blocks, self._scales = blocks, scales
        self.stored = blocks.nbytes + scales.nbytes

    def get_shape(self) -> Sequence[int]:
        experts, outputs, groups, _ = self._blocks.shape
        return experts, groups * _GROUP, outputs

    def get_dtype(self) -> str:
        return "BF16"  # has each of the values

    def read(self, index: Any) -> tuple[list[Tensor], Join]:
        given = (index if isinstance(index, tuple) else (index,)) if index is not ... else ()
        shape = self.get_shape()
        bounds = [each.indices(size)[:2] for each, size in zip(given, shape, strict=False)]
        experts, inputs, outputs = (slice(*each) for each in [*bounds, *((0, size) for size in shape[len(given) :])])
        first, last = inputs.start // _GROUP, -(-inputs.stop // _GROUP)  # groups that are cut are read whole
        where = (experts, outputs, slice(first, last))
        cut = slice(inputs.start - first * _GROUP, inputs.stop - first * _GROUP)

        def join(pieces: Sequence[Tensor]) -> Tensor:
            return dequantised(*pieces)[..., cut].transpose(1, 2)

        return [self._blocks[where], self._scales[where]], join


def dequantised(blocks: Tensor, scales: Tensor) -> Tensor:
    """uint8 [E, out, groups, 16] and [E, out, groups] -> bfloat16 [E, out, 32 * groups]. No value is rounded."""
    made: dict[str, Any] = {"dtype": torch.bfloat16, "device": blocks.device}
    # Twice the values and half the factors: the largest factor would be infinite. A byte's two values are one int32.
    pairs = torch.tensor([(2 * _VALUES[byte & 15], 2 * _VALUES[byte >> 4]) for byte in range(256)], **made)
    factors = torch.tensor([2.0 ** (code - _BIAS - 1) for code in range(256)], **made)
    table, out = pairs.view(torch.int32).flatten(), torch.empty(*scales.shape, _GROUP, **made)
    for into, codes, exponents in zip(out, blocks, scales, strict=True):  # an expert at a time: it needs less memory
        values = table[codes.int()].view(torch.bfloat16)
        torch.mul(values, factors[exponents.int()].unsqueeze(-1), out=into)
    return out.flatten(-2)


def _make(name: str, pieces: Sequence[Tensor]) -> PackedTensor:
    blocks, scales = pieces
    wrong = {blocks.dtype, scales.dtype} != {torch.uint8} or blocks.dim() != 4
    if wrong or blocks.shape[-1] != _GROUP // 2 or blocks.shape[:-1] != scales.shape:
        raise WeightsError(
            f"{name}: blocks {blocks.dtype} {list(blocks.shape)} and scales {scales.dtype} {list(scales.shape)} are no "
            "experts in MXFP4: uint8 [experts, out, in / 32, 16] and [experts, out, in / 32]"
        )
    return Mxfp4Tensor(blocks, scales)


MXFP4 = InPieces("mxfp4", frozenset({"modules_to_not_convert", "dequantize"}), ("_blocks", "_scales"), _make)
