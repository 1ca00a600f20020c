"""How files pack codes of four bits into int32, and how that becomes the layout of `kernels.int4`.

Each function takes a rank's slice of a checkpoint's tensor. Eight codes are a word, the first in the lowest bits; AWQ
has an order of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Int4Format:
    """What a file has for each weight [out, in], and how it becomes the layout of `kernels.int4`.

    Attributes:
        name: for reports. by_input: dimension 0 of its tensors is that of the inputs.
        codes, scales, zeros, groups: the tensors' names. groups: int32 [in], the group of each input.
        packs_outputs: eight codes of a word are of eight outputs, not of eight inputs. Zeros are always packed so.
        read_codes: int32 -> uint8 [out, in / 2]. read_zeros: int32 -> uint8 [out, groups].
        others: names of tensors that say nothing new, and their shapes and dtypes.
        stray_biases: files may have biases of zeros for layers that have none.
    """

    name: str
    by_input: bool
    codes: str
    scales: str
    zeros: str
    groups: str
    packs_outputs: bool
    read_codes: Callable[[Tensor], Tensor]
    read_zeros: Callable[[Tensor], Tensor]
    others: tuple[tuple[str, tuple[int, ...], tuple[str, ...]], ...] = ()
    stray_biases: bool = False


AWQ = Int4Format(
    name="awq", by_input=True, codes="qweight", scales="scales", zeros="qzeros", groups="", packs_outputs=True,
    read_codes=awq_codes, read_zeros=awq_zeros,
)  # fmt: skip
GPTQ = Int4Format(
    name="gptq", by_input=True, codes="qweight", scales="scales", zeros="qzeros", groups="g_idx", packs_outputs=False,
    read_codes=gptq_codes, read_zeros=partial(gptq_zeros, minus_one=False), stray_biases=True,
)  # fmt: skip
GPTQ_V1 = replace(GPTQ, read_zeros=partial(gptq_zeros, minus_one=True))
PACK_QUANTIZED = Int4Format(
    name="pack-quantized", by_input=False, codes="weight_packed", scales="weight_scale", zeros="weight_zero_point",
    groups="weight_g_idx", packs_outputs=False, read_codes=packed_codes, read_zeros=packed_zeros,
    others=(("weight_shape", (2,), ("I64", "I32")),),
)  # fmt: skip
