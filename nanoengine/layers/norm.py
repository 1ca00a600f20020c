"""Root-mean-square normalisation (Zhang and Sennrich, 2019)."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from nanoengine.layers.sharding import Placement, Shard, ShardSpec, WeightLayer


class RMSNorm(WeightLayer):
    """x / rms(x) * weight over the last dimension, computed in float32 for every dtype of x.

    unit_offset: checkpoints store the weight minus one. One is added when the weight is loaded, and the weight is kept
    in float32: the result is then that of a model which adds one in each call. In bfloat16 most digits would be lost.
    """

    def __init__(self, dim: int, eps: float, *, place: Placement, unit_offset: bool = False) -> None:
        super().__init__(place)
        self.shape = (dim,)
        self.eps = eps
        self.unit_offset = unit_offset
        self.weight: Tensor
        spec = ShardSpec(shape=self.shape, init="zeros" if unit_offset else "ones")
        self.add_weight("weight", spec, dtype=torch.float32 if unit_offset else None)

    def load_shard(self, name: str, shard: Shard, values: Tensor) -> None:
        super().load_shard(name, shard, values.float() + 1.0 if self.unit_offset else values)

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """[..., dim] -> normalised x; with a residual, (normalised x + residual, x + residual)."""
        normed, total = self.ops.add_rms_norm(x, residual, self.weight, self.eps)
        return normed if residual is None else (normed, total)
