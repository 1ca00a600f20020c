"""Which kernel makes a product with weights of four bits. Weights in tiles: one row is by `int4_tiles_triton`, others
are by those in Gluon on GPUs of compute capability 9.0, where they were measured. All else is by `int4_triton`, which
reads both layouts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanoengine.kernels import int4_tiles_triton, int4_triton
from nanoengine.kernels.activation import Activation
from nanoengine.kernels.gluon import runs_gluon
from nanoengine.kernels.int4 import Int4Weight
from nanoengine.kernels.matmul import Scaled

_FEW, _MANY, _MOST = 8, 17, 512  # of rows; those in between are as fast in Triton
_SLOWER = "weights of four bits run on slower kernels"


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
    found = _by_others(x, weight, bias, gluon, tickets, **around)
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
    found = _by_others(x, weight, bias, gluon, tickets, **around)
    return int4_triton.product(x, weight, bias, tickets=tickets, **around) if found is None else found


def _in_gluon(weight: Int4Weight, dtype: torch.dtype) -> bool:
    fits = weight.tiled and dtype.itemsize == 2
    return fits and runs_gluon(weight.codes.device, _SLOWER, "int4_few_gluon", "int4_roles_gluon")


def _by_others(
    x: Tensor | Scaled,
    weight: Int4Weight,
    bias: Tensor | None,
    gluon: bool,
    tickets: Tensor | None,
    **around: Any,
) -> tuple[Tensor, Scaled | None] | None:
    """By another kernel than `int4_triton`; None: there is none for it."""
    values = x.values if isinstance(x, Scaled) else x
    if int4_tiles_triton.takes(values, weight):
        return int4_tiles_triton.product(x, weight, bias, **around)
    if not gluon or len(values) > _MOST or not _in_gluon(weight, values.dtype):
        return None
    from nanoengine.kernels import int4_few_gluon, int4_roles_gluon

    if len(values) <= _FEW:
        return int4_few_gluon.product(x, weight, bias, **around)
    if len(values) < _MANY or not int4_roles_gluon.takes(values):
        return None
    return int4_roles_gluon.product(x, weight, bias, tickets=tickets, **around)
