"""The launch of a product with weights of four bits, which their kernels share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.int4 import Int4Weight
from nanoengine.kernels.matmul import Scaled
from nanoengine.kernels.matvec_parts_triton import result
from nanoengine.kernels.split_k_triton import SplitProduct


class Int4Product(SplitProduct):
    """`SplitProduct` with codes; the weight is in its arguments.

    Attributes:
        y: the result, [T, outputs].
    """

    def __init__(
        self,
        x: Tensor | Scaled,
        weight: Int4Weight,
        bias: Tensor | None,
        *,
        gate: Activation | None = None,
        out: Tensor | None = None,
        eps: float = 0.0,
        add: Tensor | None = None,
        next_norm: Tensor | None = None,
        tickets: Tensor | None = None,
        block_n: int,
        block_t: int,
        splits: int = 1,
    ) -> None:
        values = x.values if isinstance(x, Scaled) else x
        outputs, k = weight.shape
        assert k == values.shape[1] and values.stride(1) == 1, (values.shape, values.stride(), weight.shape)
        self.y = result(values, outputs // 2 if gate else outputs, out)
        super().__init__(
            x, self.y, bias, eps=eps, gate=gate, add=add, next_norm=next_norm, tickets=tickets,
            block_n=block_n, block_t=block_t, splits=splits,
        )  # fmt: skip
        zeros = weight.scales if weight.zeros is None else weight.zeros
        codes: tuple[Any, ...] = weight.codes.view(torch.int16), weight.scales, zeros
        self.arguments = codes + self.arguments
        self.constants |= {"GROUP": weight.group, "HAS_ZEROS": weight.zeros is not None, "TILED": weight.tiled}
