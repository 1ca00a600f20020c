"""Normalisations: by the root mean square (Zhang and Sennrich, 2019), by mean and variance, over widths that ranks
share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoengine.api import Norm, Shard, ShardSpec
from nanoengine.api.layers import Placement

__all__ = ["LayerNorm", "RMSNorm", "SharedRMSNorm", "norm_shared"]


class RMSNorm(Norm):
    """x / rms(x) * weight over the last dimension, computed in float32 for every dtype of x.

    unit_offset: checkpoints store the weight minus one. One is added when the weight is loaded, and the weight is kept
    in float32: the result is then that of a model which adds one in each call. In bfloat16 most digits would be lost.
    """

    rms: ClassVar[bool] = True

    def __init__(self, dim: int, eps: float, *, place: Placement, unit_offset: bool = False, name: str = "") -> None:
        super().__init__(place, name)
        self.shape = (dim,)
        self.eps = eps
        self.unit_offset = unit_offset
        spec = ShardSpec(shape=self.shape, init="zeros" if unit_offset else "ones")
        self.add_weight("weight", spec, dtype=torch.float32 if unit_offset else None)

    def load_shard(self, name: str, shard: Shard, values: Tensor) -> None:
        super().load_shard(name, shard, values.float() + 1.0 if self.unit_offset else values)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm(Norm):
    """(x - mean(x)) / std(x) * weight + bias over the last dimension, computed in float32 and rounded once.

    Args:
        shape: of the weight: the width, or (heads, head size), where each head has weights of its own.
        bias: whether it has one. unit: with several heads: the weight is cut over ranks as the heads are.
    """

    def __init__(
        self, shape: int | tuple[int, int], eps: float, *, place: Placement, bias: bool = False, name: str = ""
    ) -> None:
        super().__init__(place, name)
        self.eps = eps
        whole = (shape,) if isinstance(shape, int) else shape
        cut = ShardSpec(shape=whole, split="even" if len(whole) > 1 else "whole", replicate=True, init="ones")
        self.add_weight("weight", cut)
        self.bias: Tensor | None
        if bias:
            self.add_weight("bias", ShardSpec(shape=whole, split=cut.split, replicate=True, init="zeros"))
        else:
            self.register_parameter("bias", None)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        if self.weight.dim() == 1:
            return F.layer_norm(total, self.weight.shape, self.weight, self.bias, self.eps), total
        y = F.layer_norm(total.float(), total.shape[-1:], eps=self.eps) * self.weight
        return (y if self.bias is None else y + self.bias).to(x.dtype), total


class SharedRMSNorm(Norm):
    """`RMSNorm` over a width of which each rank holds whole heads: the mean square is that of all ranks.

    Args:
        dim: the whole width. unit: the head size; with fewer heads than ranks a head is on several ranks.
    """

    def __init__(self, dim: int, eps: float, *, unit: int, place: Placement, name: str = "") -> None:
        super().__init__(place, name)
        self.eps = eps
        self.add_weight("weight", ShardSpec(shape=(dim,), split="even", unit=unit, replicate=True, init="ones"))

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        total = x if residual is None else x + residual
        return norm_shared([self], [total])[0], total


def norm_shared(norms: Sequence[SharedRMSNorm], values: Sequence[Tensor]) -> list[Tensor]:
    """Each [T, width on this rank] normalised by its norm, with one sum over ranks for all of them."""
    tp = norms[0].tp
    if tp.size == 1:
        return [norm.ops.add_rms_norm(x, None, norm.weight, norm.eps)[0] for norm, x in zip(norms, values, strict=True)]
    # a head that several ranks have is counted by each of them, and so is its width
    squares = torch.stack([x.float().square().mean(-1) for x in values], dim=-1)  # [T, norms]
    squares = F.pad(squares, (0, -len(norms) % 4))  # 16 bytes, the least that a group with shared memory sums by itself
    means = tp.all_reduce(squares) / tp.size
    rows = zip(norms, values, means.unsqueeze(1).unbind(-1), strict=False)
    return [(x.float() * torch.rsqrt(mean + n.eps) * n.weight).to(x.dtype) for n, x, mean in rows]
