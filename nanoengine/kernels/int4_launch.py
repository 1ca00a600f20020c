"""Which kernel makes a product with weights of four bits: of one row that of tiles, if the weight is in tiles; on GPUs
of compute capability 9.0, where they were measured, those in Gluon; else that in Triton. All read both layouts but that
of tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanoengine.kernels import int4_tiles_triton, int4_triton
from nanoengine.kernels.activation import Activation
from nanoengine.kernels.gluon import runs_gluon
from nanoengine.kernels.int4 import Int4Weight
from nanoengine.kernels.matmul import Scaled

_FEW, _MANY, _MOST = 8, 33, 512  # of rows; those in between were not measured in Gluon, or use too many registers
_NARROW = 4096  # so few rows of a weight are as fast in Triton with up to 64 tokens
_SLOWER = "weights of four bits run on slower kernels"
_STEP = 128  # a group that is no multiple of it is a product of `int4_triton`


def takes(x: Tensor, weight: Int4Weight, *, gluon: bool = True) -> bool:
    """Whether codes are multiplied with x, and `product` may prepare a norm behind it, or take what was prepared; other
    products are made with a dequantised copy. gluon: `engine.kernels`, int4_gluon."""
    most = _MOST if gluon and _in_gluon(weight, x.dtype) else int4_triton.MAX_ROWS
    return len(x) <= most and int4_triton.takes(1, weight)


def int4_linear(
    x: Tensor | Scaled,
    weight: Int4Weight,
    bias: Tensor | None = None,
    *,
    eps: float = 0.0,
    gate: Activation | None = None,
    add: Tensor | None = None,
    out: Tensor | None = None,
    tickets: Tensor | None = None,
    gluon: bool = True,
) -> Tensor:
    """As `int4_triton.int4_linear`."""
    around: dict[str, Any] = {"eps": eps, "gate": gate, "add": add, "out": out}
    found = _by_others(x, weight, bias, gluon, **around)
    return int4_triton.int4_linear(x, weight, bias, tickets=tickets, **around) if found is None else found[0]


def product(
    x: Tensor | Scaled,
    weight: Int4Weight,
    bias: Tensor | None = None,
    *,
    tickets: Tensor | None = None,
    gluon: bool = True,
    **around: Any,
) -> tuple[Tensor, Scaled | None]:
    """As `int4_triton.product`."""
    found = _by_others(x, weight, bias, gluon, **around)
    return int4_triton.product(x, weight, bias, tickets=tickets, **around) if found is None else found


def _in_gluon(weight: Int4Weight, dtype: torch.dtype) -> bool:
    fits = weight.group % _STEP == 0 and dtype.itemsize == 2
    return fits and runs_gluon(weight.codes.device, _SLOWER, "int4_few_gluon", "int4_many_gluon")


def _by_others(
    x: Tensor | Scaled, weight: Int4Weight, bias: Tensor | None, gluon: bool, **around: Any
) -> tuple[Tensor, Scaled | None] | None:
    """By another kernel than `int4_triton`; None: there is none for it."""
    values = x.values if isinstance(x, Scaled) else x
    if int4_tiles_triton.takes(values, weight):
        return int4_tiles_triton.product(x, weight, bias, **around)
    if not gluon or len(values) > _MOST or not _in_gluon(weight, values.dtype):
        return None
    from nanoengine.kernels import int4_few_gluon, int4_many_gluon

    if len(values) <= _FEW:
        return int4_few_gluon.product(x, weight, bias, **around)
    narrow = len(values) <= int4_triton.MAX_ROWS and weight.shape[0] <= _NARROW
    if len(values) < _MANY or narrow or not int4_many_gluon.takes(values):
        return None
    return int4_many_gluon.product(x, weight, bias, **around)
