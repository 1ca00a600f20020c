"""How files pack codes of four bits into int32, and how that becomes the layout of `kernels.int4`.

Each function takes a rank's slice of a checkpoint's tensor. Eight codes are a word, the first in the lowest bits; AWQ
has an order of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanoengine.kernels.int4 import pack_codes

PER_WORD = 8
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a word the codes of 8 neighbouring outputs are
_ONES = 0x11111111


def unpack_words(words: Tensor) -> Tensor:
    """int32 [..., n] -> uint8 codes [..., 8 * n], those of a word from its lowest bits up."""
    pairs = words.contiguous().view(torch.uint8)  # bytes from the lowest up: little-endian, as all that torch runs on
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)


def _awq_order(codes: Tensor) -> Tensor:
    """Codes of AWQ's words -> in the order of the outputs."""
    return codes.view(len(codes), -1, PER_WORD)[..., list(_AWQ_ORDER)].flatten(-2)


def awq_codes(qweight: Tensor) -> Tensor:
    """AWQ's `qweight`, int32 [in, out / 8], packed along outputs -> uint8 [out, in / 2]."""
    return pack_codes(_awq_order(unpack_words(qweight)).t())


def awq_zeros(qzeros: Tensor) -> Tensor:
    """AWQ's `qzeros`, int32 [groups, out / 8] -> uint8 [out, groups]."""
    return _awq_order(unpack_words(qzeros)).t().contiguous()


def gptq_codes(qweight: Tensor) -> Tensor:
    """GPTQ's `qweight`, int32 [in / 8, out], packed along inputs -> uint8 [out, in / 2]."""
    return pack_codes(unpack_words(qweight.t()))


def gptq_zeros(qzeros: Tensor, *, minus_one: bool) -> Tensor:
    """GPTQ's `qzeros`, int32 [groups, out / 8] -> uint8 [out, groups].

    minus_one: format "gptq" (v1) stores one less. It is taken from whole words, with the borrow of a zero that is 0,
    and so it is given back.
    """
    return unpack_words(qzeros + _ONES if minus_one else qzeros).t().contiguous()


def packed_codes(weight_packed: Tensor) -> Tensor:
    """compressed-tensors' `weight_packed`, int32 [out, in / 8], packed along inputs -> uint8 [out, in / 2].

    Its signed values of -8 to 7 are stored plus 8, so a symmetric weight's zero is 8, as here.
    """
    return pack_codes(unpack_words(weight_packed))


def packed_zeros(weight_zero_point: Tensor) -> Tensor:
    """compressed-tensors' `weight_zero_point`, int32 [out / 8, groups], packed along outputs -> uint8 [out, groups]."""
    return unpack_words(weight_zero_point.t()).t().contiguous()


def narrowest(scales: Tensor) -> Tensor:
    """float32 scales, as float16 or bfloat16 if that has each of the values."""
    for dtype in (torch.float16, torch.bfloat16):
        narrow = scales.to(dtype)
        if torch.equal(narrow.float(), scales):
            return narrow
    return scales
