"""Rotary position embedding (Su et al., 2021): the angles of a step, and how layers rotate by them."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from nanoengine.api import ModelError, Rotation
from nanoengine.layers.rope_config import ROPE_TYPES, read_rope
from nanoengine.layers.rope_kinds import Rope, RopeConfig

__all__ = ["ROPE_TYPES", "Angles", "Rope", "RopeConfig", "RotaryEmbedding", "apply_rope", "read_rope"]


class RotaryEmbedding(nn.Module):
    """Computes the angles of a step's positions once for all layers.

    Args:
        rope: the rotation, or what config.json says of it. max_model_len: of the engine, by which some kinds choose.

    Raises `ModelError` for a head size that cannot be rotated so.
    """

    def __init__(self, rope: Rope | RopeConfig, head_size: int, device: torch.device, max_model_len: int = 0) -> None:
        super().__init__()
        if isinstance(rope, RopeConfig):
            rope = rope.rope(head_size, max_model_len)
        if rope.width > head_size or head_size % 2:
            raise ModelError(f"rotary embedding of {rope.width} elements needs an even head size of as many at least, "
                             f"not {head_size}")  # fmt: skip
        self.rope = rope
        self.inv_freq: Tensor
        frequencies = torch.tensor(rope.frequencies, dtype=torch.float32).to(device)
        self.register_buffer("inv_freq", frequencies, persistent=False)

    def forward(self, positions: Tensor) -> Angles:
        """positions int64 [T] -> their rotations."""
        return Angles(positions, self.inv_freq, self.rope)


class Angles:
    """A step's rotations. Layers without a fused kernel share one table, which is made when it is first used.

    Attributes:
        positions: int64 [T]. inv_freq: float32 [rotated / 2], radians per position. rope: the rotation.
        wanted: int [L]; only these tokens are wanted of the layer that gets it, which may go on with them alone. None:
            all are.
    """

    wanted: Tensor | None = None

    def __init__(self, positions: Tensor, inv_freq: Tensor, rope: Rope) -> None:
        self.positions, self.inv_freq, self.rope = positions, inv_freq, rope

    @cached_property
    def rotation(self) -> Rotation:
        """The rotation as attention backends take it (`attend_qkv`)."""
        return Rotation(inv_freq=self.inv_freq, interleaved=self.rope.interleaved, magnitude=self.rope.magnitude)

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor]:
        """cos and sin times the magnitude, float32 [T, 1, rotated]; sin is negative for the first of each pair."""
        angles = self.positions.float().unsqueeze(-1) * self.inv_freq  # [T, rotated / 2]
        cos, sin = angles.cos(), angles.sin()
        if self.rope.magnitude != 1.0:
            cos, sin = cos * self.rope.magnitude, sin * self.rope.magnitude
        if self.rope.interleaved:
            pairs = torch.stack((cos, cos), dim=-1), torch.stack((-sin, sin), dim=-1)
            return pairs[0].flatten(-2).unsqueeze(1), pairs[1].flatten(-2).unsqueeze(1)
        return torch.cat((cos, cos), dim=-1).unsqueeze(1), torch.cat((-sin, sin), dim=-1).unsqueeze(1)

    def rotate(self, x: Tensor) -> Tensor:
        """[T, heads, head_size] -> the same, rotated."""
        width = self.rope.width
        if width == 0:
            return x
        if width == x.shape[-1]:
            return apply_rope(x, *self.tables, interleaved=self.rope.interleaved)
        turned = apply_rope(x[..., :width], *self.tables, interleaved=self.rope.interleaved)
        return torch.cat((turned, x[..., width:]), dim=-1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate [T, heads, rotated]: (a, b) -> (a cos - b sin, b cos + a sin), in float32.

    a and b are the halves, or with `interleaved` the even and the odd elements.
    """
    pairs = (-1, 2) if interleaved else (2, -1)
    swapped = x.reshape(*x.shape[:-1], *pairs).flip(-1 if interleaved else -2).view(x.shape)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)
