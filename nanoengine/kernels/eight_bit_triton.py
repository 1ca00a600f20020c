"""Products with weights of eight bits on a GPU, each weight read once at few rows. The route depends on rows and kind:

- one row of a large FP8 weight, on Hopper GPUs: `eight_bit_streamed_triton`, which does all in one launch;
- one or two rows that have no single scale: `eight_bit_gemv_triton`, which normalises and quantises x itself;
- many rows of FP8 with one scale an output: `torch._scaled_mm`, whose result is rounded before what follows it;
- all else: tiles by tensor cores (`eight_bit_tile_triton`), x quantised in front (`quantise_triton`, with the norm).

All of them see x as the same codes: the quantisation of a row does not depend on the rows beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.activation_triton import act_and_mul
from nanoengine.kernels.eight_bit import EightBit
from nanoengine.kernels.eight_bit_gemv_triton import gemv, takes_gemv
from nanoengine.kernels.eight_bit_streamed_triton import streamed, takes_streamed
from nanoengine.kernels.eight_bit_tile_triton import tiled
from nanoengine.kernels.quantise_triton import quantised
from nanoengine.kernels.rms_norm_triton import add_rms_norm

_FEW_ROWS = 64
_FP8 = torch.float8_e4m3fn


def product(
    w: EightBit,
    x: Tensor,
    bias: Tensor | None = None,
    *,
    gate: Activation | None = None,
    add: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As `eight_bit.product`."""
    if takes_streamed(w, len(x)):
        return streamed(w, x, bias, gate=gate, add=add, out=out)
    if takes_gemv(w, len(x)):
        return gemv(w, x, bias, gate=gate, add=add, out=out)[0]
    if w.inputs == "plain":
        return tiled(w, x, None, bias, dtype=x.dtype, gate=gate, add=add, out=out)
    codes, scale, _ = quantised(x, w)
    return _of_codes(w, codes, scale, bias, x.dtype, gate=gate, add=add, out=out)


def product_added(w: EightBit, x: Tensor, bias: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor | None]:
    """As `eight_bit.product_added`. The library's product leaves the sum to the norm behind it."""
    if not _scaled_mm_takes(w, x):
        return product(w, x, bias, add=residual), None
    return product(w, x, bias), residual


def norm_product(
    w: EightBit,
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    bias: Tensor | None = None,
    *,
    gate: Activation | None = None,
) -> tuple[Tensor, Tensor]:
    """As `eight_bit.norm_product`."""
    if residual is None and takes_streamed(w, len(x)):
        return streamed(w, x, bias, norm_weight=norm_weight, eps=eps, gate=gate), x
    if len(x) == 1 and takes_gemv(w, len(x)):
        return gemv(w, x, bias, residual=residual, norm_weight=norm_weight, eps=eps, gate=gate)
    if w.inputs == "plain" or takes_gemv(w, len(x)):
        normed, total = add_rms_norm(x, residual, norm_weight, eps)
        return product(w, normed, bias, gate=gate), total
    codes, scale, total = quantised(x, w, residual=residual, norm_weight=norm_weight, eps=eps)
    return _of_codes(w, codes, scale, bias, x.dtype, gate=gate), total


def _of_codes(
    w: EightBit,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    gate: Activation | None = None,
    add: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    if dtype != torch.bfloat16 or not _scaled_mm_takes(w, codes) or (out is not None and out.dtype != dtype):
        return tiled(w, codes, scale, bias, dtype=dtype, gate=gate, add=add, out=out)
    y = torch._scaled_mm(codes, w.weight.t(), scale, w.scale.t(), bias=bias, out_dtype=dtype)
    y = act_and_mul(y, gate) if gate else y
    y = y if add is None else y.add_(add)
    return y if out is None else out.copy_(y)


def _scaled_mm_takes(w: EightBit, x: Tensor) -> bool:
    """Row-wise scales, for many rows, of sizes that it is aligned for; its result is bfloat16. x: or its codes."""
    outputs, k = w.weight.shape
    one_each = w.rows == 1 and w.columns >= k and w.inputs in ("token", "tensor")
    fits = len(x) > _FEW_ROWS and outputs % 16 == 0 and k % 16 == 0
    return x.is_cuda and x.dtype in (torch.bfloat16, w.weight.dtype) and w.weight.dtype == _FP8 and one_each and fits
