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
def _embedding_kernel(
    ids_ptr, weight_ptr, out_ptr, first, rows, D: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    wait_for_inputs(PDL)
    release_dependents(PDL)
    row, here = tl.load(ids_ptr + token).to(tl.int64), d < D
    if PART:
        row -= first
        here &= (row >= 0) & (row < rows)
    tl.store(out_ptr + token * D + d, tl.load(weight_ptr + row * D + d, mask=here, other=0.0), mask=d < D)


def embedding(ids: Tensor, weight: Tensor, *, first: int | None = None, out: Tensor | None = None) -> Tensor:
    """int [T], [V, D] contiguous -> [T, D].

    first: the weight is a part of the whole, from this id on, and rows of ids outside of it are 0. out: contiguous."""
    assert weight.is_contiguous() and ids.is_contiguous(), (weight.stride(), ids.stride())
    tokens, width = len(ids), weight.shape[1]
    if out is None:
        out = torch.empty(tokens, width, dtype=weight.dtype, device=weight.device)
    assert out.shape == (tokens, width) and out.is_contiguous() and out.dtype == weight.dtype, (out.shape, out.dtype)
    if tokens:
        block = min(_MAX_BLOCK, triton.next_power_of_2(width))
        _embedding_kernel[(tokens, triton.cdiv(width, block))](
            ids, weight, out, first or 0, len(weight), D=width, BLOCK=block, PART=first is not None,
            num_warps=min(8, max(1, block // 256)), **pdl_options(weight),
        )  # fmt: skip
    return out
