"""K and V in eight bits: how they are stored, in plain torch. The Triton kernels store the same values.

Each head of each token has a scale of its own, in the block beside its codes: the largest absolute value of the head
over the largest code. So nothing is calibrated, and the values of one token never depend on another.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

KV_DTYPES: Mapping[str, torch.dtype] = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
"""Names of the ways to store K and V in eight bits, and the dtype of their codes."""
LARGEST: Mapping[str, float] = {"fp8": 448.0, "int8": 127.0}
"""The largest code."""
SCALE_BYTES = 4


def quantise_heads(x: Tensor, kv_dtype: str) -> tuple[Tensor, Tensor]:
    """[..., D] -> (codes [..., D], float32 scales [...]); codes times scale are the values."""
    values = x.float()
    scale = values.abs().amax(-1) / values.new_full((), LARGEST[kv_dtype])  # by a number it is a product on a GPU
    codes = values / torch.where(scale == 0, 1.0, scale).unsqueeze(-1)
    if kv_dtype == "int8":
        codes = torch.floor(codes + 0.5)
    return codes.clamp(-LARGEST[kv_dtype], LARGEST[kv_dtype]).to(KV_DTYPES[kv_dtype]), scale


def dequantise_heads(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The values of codes [..., D] with scales [...]."""
    return (codes.float() * scale.unsqueeze(-1)).to(dtype)


def stored_bytes(kv_dtype: str, dtype: str, head_size: int) -> int:
    """Bytes of K, or of V, of one head of one token. dtype: the model's, by name."""
    if kv_dtype in KV_DTYPES:
        return head_size + SCALE_BYTES
    itemsize: int = getattr(torch, dtype).itemsize
    return head_size * itemsize


def kv_dtype_of(codes: Tensor) -> str:
    """The name of the way in which K or V are stored as these codes."""
    return next(name for name, dtype in KV_DTYPES.items() if dtype == codes.dtype)
