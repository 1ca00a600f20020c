"""Rows of an embedding in Triton, as a link of the chain of `pdl_triton`. The reference is torch's `F.embedding`.

It lets the next kernel start behind its own wait: what was written before it (a step's lengths and block tables) is
complete for all kernels that follow, which may read that before their waits.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs

_MAX_BLOCK = 4096


@triton.jit
def _embedding_kernel(ids_ptr, weight_ptr, out_ptr, D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(PDL)
    release_dependents(PDL)
    row = tl.load(ids_ptr + token).to(tl.int64)
    tl.store(out_ptr + token * D + d, tl.load(weight_ptr + row * D + d, mask=d < D), mask=d < D)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """int [T], [V, D] contiguous -> [T, D]."""
    assert weight.is_contiguous() and ids.is_contiguous(), (weight.stride(), ids.stride())
    tokens, width = len(ids), weight.shape[1]
    out = torch.empty(tokens, width, dtype=weight.dtype, device=weight.device)
    if tokens:
        block = min(_MAX_BLOCK, triton.next_power_of_2(width))
        _embedding_kernel[(tokens, triton.cdiv(width, block))](
            ids, weight, out, D=width, BLOCK=block, num_warps=min(8, max(1, block // 256)), **pdl_options(weight)
        )
    return out
