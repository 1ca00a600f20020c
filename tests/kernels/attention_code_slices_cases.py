"""Attention of many rows by slices over eight-bit codes against its reference, case by case, as JSON lines: on a Hopper
GPU the kernel itself, elsewhere its Python (`emulated_gluon`). With names of mutants: those. Triton must not be
interpreting."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from nanoengine.kernels import gluon, paged_attention, rope
from nanoengine.kernels import paged_attention_code_slices_gluon as by_gluon
from nanoengine.kernels.kv_quant import KV_DTYPES, dequantise_heads, quantise_heads
from nanoengine.kernels.paged_attention_plan import NewTokens
from tests.kernels import emulated_gluon
from tests.kernels.uninterpreted import mutant

HEAD, KV_HEADS = 128, 2
ON_HOPPER = torch.cuda.is_available() and gluon.is_hopper(torch.device("cuda", 0))
DEVICE = torch.device("cuda" if ON_HOPPER else "cpu")


class Rows:
    """Rows of these lengths, the newest token included; a row of none is padding."""

    def __init__(
        self, lens: list[int], kind: str, group: int = 2, block: int = 16, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        torch.manual_seed(len(lens))
        self.group, heads, columns = group, group * KV_HEADS, -(-max(lens) // block) + 1
        blocks = torch.randperm(len(lens) * columns, dtype=torch.int32).view(len(lens), columns) + 1
        shape = (len(lens) * columns + 1, KV_HEADS, block, HEAD)
        sizes = torch.exp(3 * torch.randn(shape[:-1])).unsqueeze(-1)  # scales that differ
        stored = [quantise_heads(torch.randn(shape) * each, kind) for each in (sizes**0.1, sizes)]
        self.caches = [codes for codes, _ in stored]
        self.scales = [scales for _, scales in stored]
        self.caches[0][1], self.scales[1][2] = 0.0, 0.0  # a block of zeros, and one of values
        last = torch.tensor(lens) - 1
        self.slots = blocks.gather(1, last.clamp(min=0).unsqueeze(1) // block).squeeze(1).long() * block + last % block
        self.slots[last < 0] = -1
        for row, length in enumerate(lens):  # what is behind a row's end may be anything
            behind, first = blocks[row, max(length - 1, 0) // block].item(), max(length - 1, 0) % block
            for scales in self.scales:
                scales[behind, :, first:] = float("nan")
        self.qkv = torch.randn(len(lens), (heads + 2 * KV_HEADS) * HEAD + 64).to(dtype)[:, :-64]
        self.qkv[0, -HEAD:] = 0.0  # the newest value of a head
        self.tables, self.lens = blocks, torch.tensor(lens, dtype=torch.int32)
        self.inv_freq = 10000.0 ** (torch.arange(0, HEAD, 2) / -HEAD)
        self.norms = [(1 + torch.randn(HEAD) / 8).to(dtype) for _ in range(2)]
        for name in ("slots", "qkv", "tables", "lens", "inv_freq"):
            setattr(self, name, getattr(self, name).to(DEVICE))
        for name in ("caches", "scales", "norms"):
            setattr(self, name, [each.to(DEVICE) for each in getattr(self, name)])
        self.live = self.lens > 0

    def new(self, norm: bool) -> NewTokens:
        q, k = self.norms if norm else (None, None)
        return NewTokens(slots=self.slots, inv_freq=self.inv_freq, q_weight=q, k_weight=k, eps=1e-6)

    def wanted(self, norm: bool) -> tuple[Tensor, list[Tensor]]:
        """Heads of the live rows, and the values that the caches have behind the step."""
        new, live = self.new(norm), self.live
        caches, scales = ([each.clone() for each in kept] for kept in (self.caches, self.scales))
        q = rope.qk_norm_rope_store(
            self.qkv[live], self.lens[live].long() - 1, self.inv_freq, caches[0].transpose(1, 2),
            caches[1].transpose(1, 2), self.slots[live], q_weight=new.q_weight, k_weight=new.k_weight, eps=new.eps,
            scales=(scales[0].transpose(1, 2), scales[1].transpose(1, 2)),
        )  # fmt: skip
        values = [dequantise_heads(*kept, torch.float32) for kept in zip(caches, scales, strict=True)]
        out = paged_attention.attend_decode(q, *values, self.tables[live], self.lens[live], scale=HEAD**-0.5)
        return out, values

    def found(self, module: Any, norm: bool, keys: int) -> tuple[Tensor, list[Tensor]]:
        caches, scales = ([each.clone() for each in kept] for kept in (self.caches, self.scales))
        out = torch.full(
            (len(self.qkv), self.group * KV_HEADS, HEAD), float("nan"), dtype=self.qkv.dtype, device=DEVICE
        )
        kernel = module._decode_code_slices_kernel
        with patch.object(module, "_decode_code_slices_kernel", kernel if ON_HOPPER else Emulated(module)):
            module.attend_code_slices(
                self.qkv, *caches, (scales[0], scales[1]), out, self.tables, self.lens, self.new(norm),
                scale=HEAD**-0.5, keys=keys,
            )  # fmt: skip
        values = [dequantise_heads(*kept, torch.float32) for kept in zip(caches, scales, strict=True)]
        return out[self.live], values


class Emulated:
    def __init__(self, module: Any) -> None:
        self.module, self.kernel = module, module._decode_code_slices_kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*args: Any, num_warps: int, launch_pdl: bool, CODE: Any, **constants: Any) -> None:  # noqa: N803
            code = next(dtype for dtype, type_ in self.module.TYPES.items() if type_ == CODE)
            emulated_gluon.launch(self.module, self.kernel, grid, *args, empty=0, CODE=code, **constants)

        return call


CASES: list[tuple[list[int], bool, int, dict[str, Any]]] = [
    ([1, 2, 17, 130, 257], True, 128, {}),
    ([384, 513, 0, 129], True, 128, {}),
    ([65, 130, 64], False, 64, {"block": 32}),
    ([300, 33], True, 128, {"group": 5, "block": 256}),
    ([140, 33], False, 128, {"group": 1}),
    ([140, 33], True, 64, {"group": 4, "block": 64}),
]
MUTANTS = {
    "forgets the newest value": ("even = new_even[:, None] + gl", "even = new_even[:, None] * 0.0 + gl"),
    "sees a key behind the end": ("gl.where((start + near < end)", "gl.where((start + near <= end)"),
    "keeps a sum of smaller shares": ("fresh *= fade", "fresh *= 1.0"),
    "forgets scales of values": ("+ value_log[:, None]", "+ 0.0"),
    "has one column of a head": ("gl.where(second[:, None], _as_float8(heads - first), first)", "first"),
    "takes the first block twice": ("column = start // BLOCK + near // BLOCK", "column = near // BLOCK"),
    "stores half of a code": ("to * _D + e, new_value.to", "to * _D + e, (new_value * 0.5).to"),
}


def tried(module: Any) -> Iterator[dict[str, Any]]:
    """far: the largest difference in heads, of their row's largest. cache: in the caches, of a step of its codes."""
    for kind in KV_DTYPES:
        for lens, norm, keys, given in CASES:
            rows = Rows(lens, kind, **given)
            (found, caches), (wanted, values) = rows.found(module, norm, keys), rows.wanted(norm)
            size = wanted.float().abs().amax(-1, keepdim=True)
            far = ((found.float() - wanted.float()).abs() / (size + 1e-6)).nan_to_num(float("inf")).max()
            steps = []
            for a, b in zip(caches, values, strict=True):
                step = b.abs().nan_to_num(0.0).amax(-1, keepdim=True) / (127 if kind == "int8" else 14)
                off = torch.where(a.isnan() & b.isnan(), 0, (a - b).abs() / (step + 1e-30)).nan_to_num(float("inf"))
                steps.append(float(off.max()))
            yield {"far": float(far), "cache": max(steps), "case": f"{kind} {lens} {norm} {keys} {given}"}


def main() -> None:
    if not sys.argv[1:]:
        for case in tried(by_gluon):
            print(json.dumps(case), flush=True)
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            for case in tried(mutant(by_gluon, MUTANTS, name, Path(folder))):
                if case["far"] > 0.1 or case["cache"] > 10:
                    break  # it is caught
        print(json.dumps(case), flush=True)


if __name__ == "__main__":
    main()
