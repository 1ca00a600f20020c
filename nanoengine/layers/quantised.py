"""How the parameters of a quantised weight are split over ranks: specs that are made of the weight's own."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nanoengine.api import ModelError, ShardSpec, WeightLayer

__all__ = ["divided", "dummy_bits", "one_each", "per_output", "transposed"]

DUMMY_DEVIATION = 0.02  # of dummy weights, which are uniform around 0


def divided(layer: WeightLayer, weight: ShardSpec, *, outputs: int = 1, inputs: int = 1) -> ShardSpec:
    """The spec of a parameter [out / outputs, in / inputs], rounded up: scales of blocks, or codes that are packed.

    Args:
        weight: of the weight [out, in]. outputs, inputs: of the weight, for each element of the parameter.

    Raises `ModelError` if a rank's share, or a fused part, would end within a block.
    """
    sizes = (outputs, inputs)
    step, length = sizes[weight.dim], weight.shape[weight.dim]
    if weight.split != "whole":
        ranks, parts = layer.tp.size, weight.parts if weight.joined == weight.dim else ()
        for part, total in parts or (("", length),):
            held = _share(weight, total, ranks)
            if ranks > 1 and held % step:
                raise ModelError(
                    f"{layer.name}: {f'part {part} of ' if part else ''}{total} "
                    f"{'inputs' if weight.dim else 'outputs'} over tensor_parallel_size={ranks} ranks are {held} each, "
                    f"which end within a block of {step}: the ranks must divide the number of blocks, "
                    f"{-(-total // step)}"
                )
    if outputs > 1 and any(total % outputs for _, total in weight.parts[:-1]):
        sizes_ = ", ".join(f"{part} {total}" for part, total in weight.parts)
        raise ModelError(f"{layer.name}: its fused parts ({sizes_} outputs) end within a block of {outputs}")
    return replace(
        weight,
        shape=(-(-weight.shape[0] // outputs), -(-weight.shape[1] // inputs)),
        parts=tuple((part, -(-total // outputs)) for part, total in weight.parts),
        unit=weight.unit // step if weight.unit % step == 0 else 1,  # ranks hold whole blocks, as was seen above
    )


def _share(weight: ShardSpec, total: int, ranks: int) -> int:
    """Most elements along `weight.dim` that a rank has of `total`."""
    if weight.split == "padded":
        return -(-total // ranks)
    return max(total // ranks, weight.unit if weight.replicate else 1)


def transposed(spec: ShardSpec) -> ShardSpec:
    """The spec of the same parameter as [in, out]."""
    return replace(spec, shape=spec.shape[::-1], dim=1 - spec.dim, join=1 - spec.joined)


def per_output(weight: ShardSpec) -> ShardSpec:
    """The spec of one value for each output, [out]."""
    if weight.dim == 0:
        return replace(weight, shape=weight.shape[:1], join=None)
    return replace(weight, shape=weight.shape[:1], dim=0, join=None, split="whole", unit=1)


def one_each(name: str, weight: ShardSpec, spec: ShardSpec) -> dict[str, ShardSpec]:
    """Names and specs of a parameter `name` of each fused part, or of the one weight: for what has no dimension that
    parts could be joined along, as a scale of a whole tensor."""
    return {f"{name}:{part}": spec for part, _ in weight.parts} or {name: spec}


def dummy_bits(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Dummy weights as integers of `dtype` (int32 or uint8) all of whose bits are random, for codes that are packed."""
    words = (values.double() / (DUMMY_DEVIATION * 3**0.5) * 2.0**31).clamp_(-(2.0**31), 2.0**31 - 1).to(torch.int32)
    words ^= words >> 16 & 0xFFFF  # a float has no random bits for the lowest ones
    return words if dtype == torch.int32 else (words >> 24).to(dtype)
