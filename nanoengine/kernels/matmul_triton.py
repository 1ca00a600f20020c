"""Products of some hundred rows by tensor cores; see `matmul`.

Tiles are read by the GPU's copy engine (TMA). A program asks for its weights before it waits for the kernel in front
(`pdl_triton`).
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.activation_triton import act_mul
from nanoengine.kernels.matmul import MatmulTile, Scaled
from nanoengine.kernels.matvec_parts_triton import check, load_if, prefetch_rows, result
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs

_AHEAD = 256  # elements of each weight row that a program asks for before it waits


@triton.jit(do_not_specialize=["rows"])
def _matmul_kernel(
    x_desc, weight_desc, weight_ptr, bias_ptr, squares_ptr, add_ptr, next_ptr, y_ptr, scaled_ptr, sums_ptr,
    rows, add_stride, eps,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr, STAGES: tl.constexpr, SQUARES: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ADD: tl.constexpr, NEXT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tile_n = tl.program_id(0) // tiles_m
    m0, n0 = (tl.program_id(0) % tiles_m) * BLOCK_M, tile_n * BLOCK_N
    release_dependents(PDL)
    if PDL:
        r = n0 + tl.arange(0, BLOCK_N)[:, None]
        prefetch_rows(weight_ptr, r, 0, r < N, K, AHEAD)
        if GATED:
            prefetch_rows(weight_ptr, r + N, 0, r < N, K, AHEAD)
    wait_for_inputs(PDL)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        x = x_desc.load([m0, start])
        acc = tl.dot(x, weight_desc.load([n0, start]).T, acc, input_precision="ieee")
        if GATED:
            up = tl.dot(x, weight_desc.load([N + n0, start]).T, up, input_precision="ieee")
    m = m0 + tl.arange(0, BLOCK_M)
    if SQUARES > 0:
        square = tl.zeros((BLOCK_M,), tl.float32)
        for part in tl.static_range(SQUARES):
            square += tl.load(squares_ptr + part * rows + m, mask=m < rows, other=0.0)
        scale = tl.rsqrt(square / K + eps)[:, None]
        acc *= scale
        up *= scale
    n = (n0 + tl.arange(0, BLOCK_N))[None, :]
    row, mask = m[:, None].to(tl.int64), (m[:, None] < rows) & (n < N)
    y = acc + load_if(HAS_BIAS, bias_ptr + n, n < N)
    if GATED:
        y = act_mul(y, up + load_if(HAS_BIAS, bias_ptr + N + n, n < N), ACTIVATION)
    y = (y + load_if(HAS_ADD, add_ptr + row * add_stride + n, mask)).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * N + n, y, mask=mask)
    if NEXT:
        wide = tl.where(n < N, y.to(tl.float32), 0.0)
        next_weight = tl.load(next_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(scaled_ptr + row * N + n, (wide * next_weight).to(y.dtype), mask=mask)
        tl.store(sums_ptr + tile_n * rows + m, tl.sum(wide * wide, 1), mask=m < rows)


def matmul(
    x: Tensor | Scaled,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    tile: MatmulTile,
    eps: float = 0.0,
    gate: Activation | None = None,
    add: Tensor | None = None,
    next_norm: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Scaled | None]:
    """As `matmul.matmul`. `out`: contiguous; where the result goes."""
    given = Launch(x, weight, tile=tile, gate=gate, add=add, next_norm=next_norm, out=out)
    y, k = given.y, weight.shape[1]
    _matmul_kernel[given.grid](
        TensorDescriptor.from_tensor(given.source, [tile.block_m, tile.block_k]),
        TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k]),
        weight, y if bias is None else bias, *given.pointers(), given.rows, 0 if add is None else add.stride(0), eps,
        K=k, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        AHEAD=min(_AHEAD, triton.next_power_of_2(k)), STAGES=tile.stages, ACTIVATION=gate, HAS_BIAS=bias is not None,
        **given.constants, num_warps=tile.warps, **pdl_options(y),
    )  # fmt: skip
    return y, given.scaled


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the copy engine can read both: rows and starts at multiples of 16 bytes."""
    whole = 16 // x.element_size()
    aligned = x.data_ptr() % 16 == 0 and weight.data_ptr() % 16 == 0
    return aligned and x.stride(1) == 1 and x.stride(0) % whole == 0 and weight.is_contiguous()


class Launch:
    """What the launches of both kernels share."""

    def __init__(
        self,
        x: Tensor | Scaled,
        weight: Tensor,
        *,
        tile: MatmulTile,
        gate: Activation | None,
        add: Tensor | None,
        next_norm: Tensor | None,
        out: Tensor | None,
    ) -> None:
        self.source = x.values if isinstance(x, Scaled) else x
        self.squares = x.squares if isinstance(x, Scaled) else None
        self.rows = len(self.source)
        outputs = len(weight) // 2 if gate else len(weight)
        check(self.source, weight, add, outputs)
        self.y, self.add = result(self.source, outputs, out), add
        tiles = triton.cdiv(outputs, tile.block_n)
        self.grid = (triton.cdiv(self.rows, tile.block_m) * tiles,)
        self.scaled: Scaled | None = None
        if next_norm is not None:
            squares = torch.empty(tiles, self.rows, dtype=torch.float32, device=self.y.device)
            self.scaled = Scaled(next_norm, torch.empty_like(self.y), squares)
        self.constants: dict[str, Any] = {
            "N": outputs, "SQUARES": 0 if self.squares is None else len(self.squares), "GATED": gate is not None,
            "HAS_ADD": add is not None, "NEXT": next_norm is not None,
        }  # fmt: skip

    def pointers(self) -> tuple[Tensor, ...]:
        """squares, add, next_norm, y, scaled values, their squares; y in place of what there is not."""
        y, scaled = self.y, self.scaled
        ahead = (y, y, y, y) if scaled is None else (scaled.norm_weight, y, scaled.values, scaled.squares)
        return *(y if t is None else t for t in (self.squares, self.add)), *ahead
