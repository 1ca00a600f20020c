"""Norms and rotations of q and k, which `attend_qkv` may do itself, written out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanoengine.api import HeadNorms, Rotation


@dataclass(frozen=True, slots=True)
class Turn:
    """What a step's q and k go through between their projection and attention."""

    rotation: Rotation
    norms: HeadNorms | None

    def query(self, q: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """float64 [T, H, D] at positions int64 [T], rounded to `dtype` after the norm and after the rotation."""
        return self._turned(q, positions, self.norms.q if self.norms else None, dtype)

    def key(self, k: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """The same for keys."""
        return self._turned(k, positions, self.norms.k if self.norms else None, dtype)

    def _turned(self, heads: Tensor, positions: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
        if weight is not None and self.norms is not None:
            scale = (heads.square().mean(-1, keepdim=True) + self.norms.eps).rsqrt()
            heads = (heads * scale * weight.cpu().double()).to(dtype).double()
        inv_freq, at = self.rotation.inv_freq.cpu(), slice(None)
        count = len(inv_freq)
        if self.rotation.interleaved:
            first, second = slice(0, 2 * count, 2), slice(1, 2 * count, 2)
        else:
            first, second = slice(0, count), slice(count, 2 * count)
        angles = (positions.float()[:, None] * inv_freq).double()[:, None, :]  # [T, 1, count], float32 as promised
        cos, sin = (wave * self.rotation.magnitude for wave in (angles.cos(), angles.sin()))
        a, b, turned = heads[at, at, first], heads[at, at, second], heads.clone()
        turned[at, at, first], turned[at, at, second] = a * cos - b * sin, b * cos + a * sin
        return turned.to(dtype).double()


def turns(head_size: int, dtype: torch.dtype, device: torch.device) -> list[Turn]:
    """One of each kind that a backend must do right or leave alone; the usual ones more than once."""
    size = torch.arange(0, head_size, 2)
    inv_freq = (100.0 ** -(size / head_size)).to(device)
    weights = (1 + 0.5 * torch.sin(torch.arange(2 * head_size))).view(2, -1).to(device, dtype)
    norms = HeadNorms(q=weights[0], k=weights[1], eps=1e-3)
    plain = Rotation(inv_freq=inv_freq)
    part = Rotation(inv_freq=inv_freq[: max(1, head_size // 4)])
    return [
        Turn(plain, norms),
        Turn(plain, None),
        Turn(Rotation(inv_freq=inv_freq, interleaved=True), norms),
        Turn(plain, norms),
        Turn(part, None),
        Turn(plain, None),
        Turn(Rotation(inv_freq=inv_freq, magnitude=1.5), norms),
    ]
