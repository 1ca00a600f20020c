"""The launch of a product of a few rows with weights of eight bits, which the kernels share that normalise and quantise
x themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.eight_bit import EightBit


class RowProduct:
    """What a kernel is given and what it writes.

    Attributes:
        y: the result, [T, outputs]. total: the residual stream, [T, K].
        arguments: of the kernel, up to its constants. constants: those that do not depend on its tile.
    """

    def __init__(
        self,
        w: EightBit,
        x: Tensor,
        bias: Tensor | None,
        *,
        residual: Tensor | None,
        norm_weight: Tensor | None,
        eps: float,
        gate: Activation | None,
        add: Tensor | None,
        out: Tensor | None,
    ) -> None:
        (rows, k), self.outputs = x.shape, len(w.weight) // 2 if gate else len(w.weight)
        assert x.stride(1) == 1 and w.weight.is_contiguous() and w.scale.is_contiguous(), (x.stride(), w)
        assert residual is None or residual.stride(1) == 1, residual
        assert out is None or (out.shape == (rows, self.outputs) and out.is_contiguous()), (out, self.outputs)
        self.y = torch.empty(rows, self.outputs, dtype=x.dtype, device=x.device) if out is None else out
        self.total = x if residual is None else torch.empty(rows, k, dtype=x.dtype, device=x.device)
        source = x if residual is None else residual
        self.arguments: tuple[Any, ...] = (
            x, source, norm_weight if norm_weight is not None else x,
            w.input_scale if w.input_scale is not None else w.scale, w.bound if w.bound is not None else w.scale,
            w.weight, w.scale, bias if bias is not None else x, add if add is not None else x, self.y, self.total,
            x.stride(0), source.stride(0), 0 if add is None else add.stride(0), eps,
        )  # fmt: skip
        self.constants: dict[str, Any] = {
            "T": rows, "N": self.outputs, "K": k, "SCALE_ROWS": w.rows, "SCALE_COLUMNS": w.scale.shape[1],
            "INPUTS": w.inputs, "HAS_BOUND": w.bound is not None, "GATED": gate is not None, "ACTIVATION": gate,
            "NORM": norm_weight is not None, "HAS_RESIDUAL": residual is not None, "HAS_BIAS": bias is not None,
            "HAS_ADD": add is not None,
        }  # fmt: skip
