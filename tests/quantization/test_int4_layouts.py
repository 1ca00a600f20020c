"""The layouts of AWQ, GPTQ and compressed-tensors become one."""

from __future__ import annotations

import int4_packers as pack
import pytest
import torch

from nanoengine.kernels.int4 import unpack_codes
from nanoengine.plugins.quantizations import int4_layouts as layouts

CODES = torch.randint(0, 16, (40, 64), generator=torch.Generator().manual_seed(0))  # [out, in]
ZEROS = torch.randint(0, 16, (40, 2), generator=torch.Generator().manual_seed(1))  # [out, groups]


def test_the_packers_are_what_the_formats_say() -> None:
    """By hand: AWQ's first word has outputs 0, 2, 4, 6, 1, 3, 5, 7 of input 0; GPTQ's has inputs 0 to 7 of output 0."""
    codes = torch.arange(8).view(1, 8)
    assert pack.awq(codes).item() == 0x75316420
    assert pack.gptq(codes.t()).item() == 0x76543210
    assert pack.less_one(torch.tensor([0x76543210], dtype=torch.int32)).item() == 0x654320FF


@pytest.mark.parametrize(
    ("read", "packed"),
    [
        (layouts.awq_codes, pack.awq(CODES.t())),
        (layouts.gptq_codes, pack.gptq(CODES.t())),
        (layouts.packed_codes, pack.words(CODES)),
    ],
)
def test_codes(read, packed) -> None:
    assert torch.equal(unpack_codes(read(packed)), CODES.to(torch.uint8))


@pytest.mark.parametrize(
    ("read", "packed"),
    [
        (layouts.awq_zeros, pack.awq(ZEROS.t())),
        (lambda words: layouts.gptq_zeros(words, minus_one=False), pack.words(ZEROS.t())),
        (lambda words: layouts.gptq_zeros(words, minus_one=True), pack.less_one(pack.words(ZEROS.t()))),
        (layouts.packed_zeros, pack.words(ZEROS.t()).t()),
    ],
)
def test_zeros(read, packed) -> None:
    """A zero of 0 too, which v1 stores with a borrow from its neighbours."""
    assert {0, 15} <= set(ZEROS.flatten().tolist())
    assert torch.equal(read(packed), ZEROS.to(torch.uint8))


def test_scales_take_the_smallest_dtype_that_has_each_of_them() -> None:
    for value, dtype in ((0.5 + 2**-10, torch.float16), (2.0**-100, torch.bfloat16), (1 + 2.0**-20, torch.float32)):
        made = layouts.narrowest(torch.tensor([[value, 1.0]]))
        assert (made.dtype, made.tolist()) == (dtype, [[value, 1.0]])
