"""Writes small quantised checkpoints, beside what they mean: each module's weight in float32, and what its product
sees of x. Written from the formats' descriptions, without the engine's own code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

FP8, INT8 = torch.float8_e4m3fn, torch.int8
LARGEST = {FP8: 448.0, INT8: 127.0}
FACTORS = {"k_proj": 4.0, "v_proj": 0.25, "up_proj": 3.0}  # so that fused parts have scales that differ much

See = Callable[[Tensor], Tensor]


@dataclass
class Module:
    """Tensors of a module by their last name; the weight that they mean; what its product sees of x."""

    tensors: dict[str, Tensor]
    weight: Tensor
    see: See = field(default=lambda x: x)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(self.see(x), self.weight)


Pack = Callable[[str, Tensor], Module | None]


def code(values: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    codes = (values / scale).clamp(-LARGEST[dtype], LARGEST[dtype])
    return codes.round().to(dtype) if dtype == INT8 else codes.to(dtype)


def by_tensor(w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, scale, values)."""
    scale = w.abs().max() / LARGEST[dtype]
    codes = code(w, scale, dtype)
    return codes, scale, codes.float() * scale


def by_channel(w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    scale = w.abs().amax(1, keepdim=True) / LARGEST[dtype]
    codes = code(w, scale, dtype)
    return codes, scale, codes.float() * scale


def by_block(w: Tensor, dtype: torch.dtype, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    n, k = w.shape
    scale = torch.zeros(-(-n // rows), -(-k // columns))
    codes, values = torch.zeros(n, k).to(dtype), torch.zeros(n, k)
    for i in range(len(scale)):
        for j in range(scale.shape[1]):
            at = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scale[i, j] = w[at].abs().max() / LARGEST[dtype]
            codes[at] = code(w[at], scale[i, j], dtype)
            values[at] = codes[at].float() * scale[i, j]
    return codes, scale, values


def per_token(dtype: torch.dtype, bound: float | None = None) -> See:
    def see(x: Tensor) -> Tensor:
        most = x.abs().amax(-1, keepdim=True)
        scale = (most if bound is None else most.clamp(max=bound)) / LARGEST[dtype]
        return code(x, scale, dtype).float() * scale

    return see


def per_group(dtype: torch.dtype, size: int) -> See:
    whole = per_token(dtype)
    return lambda x: torch.cat([whole(each) for each in x.split(size, -1)], -1)


def static(dtype: torch.dtype, scale: float) -> See:
    return lambda x: code(x, scale, dtype).float() * scale


def write(source: Path, target: Path, config: Mapping[str, Any], pack: Pack) -> dict[str, Module]:
    """A copy of a plain checkpoint in which `pack` replaced weights of modules. Returns what it made, by name."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    made = dict[str, Module]()
    for name in list(tensors):
        module, _, own = name.rpartition(".")
        if own != "weight" or tensors[name].dim() != 2 or "embed_tokens" in module:
            continue
        weight = tensors[name].float() * FACTORS.get(module.rpartition(".")[2], 1.0)
        packed = pack(module, weight)
        if packed is None:
            continue
        made[module] = packed
        del tensors[name]
        tensors |= {f"{module}.{each}": values.contiguous() for each, values in packed.tensors.items()}
    save_file(tensors, target / "model.safetensors")
    hf = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**hf, "quantization_config": dict(config)}))
    return made


def online(source: Path, quantised: Callable[[Tensor], Module]) -> dict[str, Module]:
    """What the linear layers of a plain checkpoint become."""
    tensors = load_file(source / "model.safetensors")
    return {name.removesuffix(".weight"): quantised(each) for name, each in tensors.items() if "_proj." in name}


class _Seen(nn.Module):
    def __init__(self, module: Module, bias: Tensor | None) -> None:
        super().__init__()
        self.module, self.bias = module, bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.module(x)
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def expected_logprobs(source: Path, made: Mapping[str, Module], ids: list[int]) -> Tensor:
    """transformers' model of the plain checkpoint with these modules in place of its own: [tokens, vocabulary]."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for name, module in made.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, _Seen(module, model.get_submodule(name).bias))
    return model(torch.tensor([ids])).logits[0].log_softmax(-1)
