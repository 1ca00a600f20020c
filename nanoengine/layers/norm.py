"""Root-mean-square normalisation (Zhang and Sennrich, 2019)."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from nanoengine.layers.sharding import Placement, ShardSpec, WeightLayer


class RMSNorm(WeightLayer):
    """x / rms(x) * weight over the last dimension, computed in float32 whatever x's dtype."""

    def __init__(self, dim: int, eps: float, *, place: Placement) -> None:
        super().__init__(place)
        self.shape = (dim,)
        self.eps = eps
        self.weight: Tensor
        self.add_weight("weight", ShardSpec(shape=self.shape, init="ones"))

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """[..., dim] -> normalised x; with a residual, (normalised x + residual, x + residual)."""
        normed, total = self.ops.add_rms_norm(x, residual, self.weight, self.eps)
        return normed if residual is None else (normed, total)
