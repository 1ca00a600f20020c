"""Tiny checkpoints with weights of four bits, written from the formats' definitions: the inverse of the readers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # code i of a word is the one of output AWQ_ORDER[i]


def words(codes: Tensor) -> Tensor:
    """Codes of 0 to 15 [..., 8 * n] -> int32 [..., n], the first in the lowest bits."""
    eights = codes.contiguous().to(torch.int64).unflatten(-1, (-1, 8))
    packed = sum(eights[..., i] << 4 * i for i in range(8))
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def awq(codes: Tensor) -> Tensor:
    """[n, out] -> int32 [n, out / 8]: of qweight [in, out], and of zeros [groups, out]."""
    return words(codes.unflatten(-1, (-1, 8))[..., list(AWQ_ORDER)].flatten(-2))


def gptq(codes: Tensor) -> Tensor:
    """[in, out] -> int32 [in / 8, out]."""
    return words(codes.t()).t().contiguous()


def less_one(words_: Tensor) -> Tensor:
    """Zeros as format "gptq" (v1) has them: words minus 0x11111111."""
    return words_ - 0x11111111


@dataclass(frozen=True)
class Quantised:
    """codes [out, in] and zeros [out, groups], 0 to 15; scales float16 [out, groups]; groups int32 [in], of inputs."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    groups: Tensor

    @property
    def values(self) -> Tensor:
        at = self.groups.long()
        return (self.codes - self.zeros[:, at]).float() * self.scales.float()[:, at]


def quantise(weight: Tensor, group: int, *, symmetric: bool = False, act_order: bool = False) -> Quantised:
    """Rounds to the nearest. With act-order, inputs are put into groups in the order of their largest value."""
    group = weight.shape[1] if group == -1 else group
    order = weight.abs().amax(0).argsort(descending=True) if act_order else torch.arange(weight.shape[1])
    groups = torch.empty(weight.shape[1], dtype=torch.int32)
    groups[order] = torch.arange(weight.shape[1], dtype=torch.int32) // group
    pieces = weight[:, order].unflatten(1, (-1, group))
    low, high = pieces.amin(2).clamp(max=0), pieces.amax(2).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / 15).half()
    zeros = torch.full_like(low, 8) if symmetric else (-low / scales.float()).round()
    at = groups.long()
    codes = (weight / scales.float()[:, at] + zeros[:, at]).round().clamp(0, 15)
    return Quantised(codes.to(torch.int64), scales, zeros.clamp(0, 15).to(torch.int64), groups)


def awq_tensors(made: Quantised) -> dict[str, Tensor]:
    return {
        "qweight": awq(made.codes.t()),
        "qzeros": awq(made.zeros.t()),
        "scales": made.scales.t().contiguous(),
    }


def gptq_tensors(made: Quantised, *, version: int = 1) -> dict[str, Tensor]:
    zeros = words(made.zeros.t())
    return {
        "qweight": gptq(made.codes.t()),
        "qzeros": less_one(zeros) if version == 1 else zeros,
        "scales": made.scales.t().contiguous(),
        "g_idx": made.groups,
    }


def write(
    source: Path,
    folder: Path,
    config: Mapping[str, Any],
    tensors_of: Callable[[Quantised], dict[str, Tensor]],
    group: int | Callable[[str], int],
    *,
    plain: Callable[[str], bool] = lambda module: module in ("lm_head", "model.embed_tokens"),
    **how: Any,
) -> tuple[Path, Path]:
    """From a plain checkpoint (the one in the format, the same values in float32). plain: modules that stay so."""
    dense, packed = dict[str, Tensor](), dict[str, Tensor]()
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if tensor.dim() == 1 or plain(module):
            dense[name] = packed[name] = tensor
            continue
        made = quantise(tensor, group(module) if callable(group) else group, **how)
        dense[name] = made.values
        packed |= {f"{module}.{each}": values for each, values in tensors_of(made).items()}
    hf = json.loads((source / "config.json").read_text())
    for which, tensors, more in (("packed", packed, {"quantization_config": dict(config)}), ("plain", dense, {})):
        (folder / which).mkdir(parents=True)
        save_file(tensors, folder / which / "model.safetensors")
        (folder / which / "config.json").write_text(json.dumps(hf | more))
    return folder / "packed", folder / "plain"
