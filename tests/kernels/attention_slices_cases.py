"""Attention of few rows by slices against its reference, case by case, as JSON lines: on a Hopper GPU the kernel
itself, elsewhere its Python (`emulated_gluon`). With names of mutants: those. Triton must not be interpreting."""

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
from nanoengine.kernels import paged_attention_slices_gluon as by_gluon
from nanoengine.kernels.paged_attention_plan import NewTokens
from nanoengine.kernels.paged_attention_slices import EMPTY, HEAD, SlicesConfig, SlicesScratch
from tests.kernels import emulated_gluon
from tests.kernels.uninterpreted import mutant

ON_HOPPER = torch.cuda.is_available() and gluon.is_hopper(torch.device("cuda", 0))
DEVICE = torch.device("cuda" if ON_HOPPER else "cpu")
KV_HEADS = 2


class Rows:
    """Rows of these lengths, the newest token included; a row of none is padding."""

    def __init__(self, lens: list[int], group: int = 2, block: int = 16, dtype: torch.dtype = torch.bfloat16) -> None:
        torch.manual_seed(len(lens))
        self.group, heads, columns = group, group * KV_HEADS, -(-max(lens) // block) + 1
        blocks = torch.randperm(len(lens) * columns, dtype=torch.int32).view(len(lens), columns) + 1
        shape = (len(lens) * columns + 1, KV_HEADS, block, HEAD)
        self.k, self.v = (torch.randn(shape).to(dtype) for _ in range(2))
        last = torch.tensor(lens) - 1
        self.slots = blocks.gather(1, last.clamp(min=0).unsqueeze(1) // block).squeeze(1).long() * block + last % block
        self.slots[last < 0] = -1
        for row, length in enumerate(lens):  # what is behind a row's end may be anything
            behind = blocks[row, max(length - 1, 0) // block].item()
            self.k[behind, :, max(length - 1, 0) % block :] = float("nan")
            self.v[behind, :, max(length - 1, 0) % block :] = float("nan")
        self.qkv = torch.randn(len(lens), (heads + 2 * KV_HEADS) * HEAD + 64).to(dtype)[:, :-64]
        self.tables, self.lens = blocks, torch.tensor(lens, dtype=torch.int32)
        self.inv_freq = 10000.0 ** (torch.arange(0, HEAD, 2) / -HEAD)
        self.norms = [(1 + torch.randn(HEAD) / 8).to(dtype) for _ in range(2)]
        for name in ("k", "v", "slots", "qkv", "tables", "lens", "inv_freq"):
            setattr(self, name, getattr(self, name).to(DEVICE))
        self.norms = [each.to(DEVICE) for each in self.norms]
        self.live = self.lens > 0

    def new(self, norm: bool) -> NewTokens:
        q, k = self.norms if norm else (None, None)
        return NewTokens(slots=self.slots, inv_freq=self.inv_freq, q_weight=q, k_weight=k, eps=1e-6)

    def wanted(self, norm: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Heads of the live rows, and the caches behind the step."""
        new, k, v, live = self.new(norm), self.k.clone(), self.v.clone(), self.live
        out = paged_attention.attend_decode_qkv(
            self.qkv[live], k, v, self.tables[live], self.lens[live], self.slots[live], self.inv_freq,
            q_weight=new.q_weight, k_weight=new.k_weight, eps=new.eps, scale=HEAD**-0.5,
        )  # fmt: skip
        return out, k, v

    def found(
        self, module: Any, norm: bool, config: SlicesConfig, scratch: SlicesScratch, *, beside: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """beside: of q, whose keys are stored."""
        k, v, given = self.k.clone(), self.v.clone(), self.qkv
        new: NewTokens | None = self.new(norm)
        if beside:
            assert new is not None
            given = rope.qk_norm_rope_store(
                self.qkv, self.lens.long() - 1, self.inv_freq, k.transpose(1, 2), v.transpose(1, 2), self.slots,
                q_weight=new.q_weight, k_weight=new.k_weight, eps=new.eps,
            )  # fmt: skip
            new = None
        out = torch.full((len(self.qkv), self.group * KV_HEADS, HEAD), float("nan"), dtype=k.dtype, device=DEVICE)
        kernel = module._decode_slices_kernel
        with patch.object(module, "_decode_slices_kernel", kernel if ON_HOPPER else Emulated(module)):
            module.attend_slices(
                given, k, v, out, self.tables, self.lens, new, scale=HEAD**-0.5, config=config, scratch=scratch
            )
        return out[self.live], k, v


class Emulated:
    def __init__(self, module: Any) -> None:
        self.module, self.kernel = module, module._decode_slices_kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def call(*args: Any, num_warps: int, launch_pdl: bool, **constants: Any) -> None:
            emulated_gluon.launch(self.module, self.kernel, grid, *args, empty=EMPTY, **constants)

        return call


ONE, TWO, FOUR = SlicesConfig(1, 256, 4), SlicesConfig(2, 256, 4), SlicesConfig(4, 128, 2)
CASES: list[tuple[list[int], SlicesConfig, bool, dict[str, Any]]] = [
    ([1, 2, 17, 130, 257], TWO, True, {}),
    ([384, 513, 0, 640], ONE, True, {}),
    ([384, 513, 0, 640], TWO, False, {}),
    ([384, 513, 0, 640], FOUR, True, {}),
    ([65, 130, 300], SlicesConfig(1, 64, 4), True, {}),
    ([65, 130, 300, 1], SlicesConfig(1, 64, 4), True, {"beside": True}),
    ([300, 33, 700], TWO, False, {"beside": True}),
    ([300, 33, 1030], FOUR, False, {"group": 1, "block": 32}),
    ([300, 33], TWO, True, {"group": 10, "dtype": torch.float16}),
]
MUTANTS = {
    "forgets the newest value": ("acc += new_mixed[:, None] * fresh[None, :]", "acc += 0.0"),
    "sees a key behind the end": (
        "layout=gl.SliceLayout(1, LAYOUT)) < end)",
        "layout=gl.SliceLayout(1, LAYOUT)) <= end)",
    ),
    "joins one part": ("for i in range(parts):", "for i in range(gl.minimum(parts, 1)):"),
    "keeps a sum of smaller shares": ("sums = sums * fade + gl", "sums = sums + gl"),
    "leaves its words": ("gl.full([_D, N], _EMPTY", "gl.full([_D, N], 0"),
}


def tried(module: Any) -> Iterator[dict[str, Any]]:
    """far: the largest difference in heads and caches. empty: scratch memory is as it was. joined: rows in parts."""
    for lens, config, norm, given in CASES:
        more = dict(given)
        beside = more.pop("beside", False)
        rows = Rows(lens, **more)
        scratch = SlicesScratch.make(len(lens) * KV_HEADS * config.splits, rows.group, DEVICE)
        found, wanted = rows.found(module, norm, config, scratch, beside=beside), rows.wanted(norm)
        far = max(
            float(torch.where(a.isnan() & b.isnan(), 0, a.float() - b.float()).abs().nan_to_num(float("inf")).max())
            for a, b in zip(found, wanted, strict=True)
        )
        empty = bool((scratch.part == EMPTY).all())
        joined = sum(config.splits > 1 and n - 1 > 64 * config.least for n in lens)
        yield {"far": far, "empty": empty, "joined": joined, "case": f"{lens} {config} {norm} {given}"}


def main() -> None:
    if not sys.argv[1:]:
        for case in tried(by_gluon):
            print(json.dumps(case), flush=True)
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            for case in tried(mutant(by_gluon, MUTANTS, name, Path(folder))):
                if case["far"] > 0.05 or not case["empty"]:
                    break  # it is caught
        print(json.dumps(case), flush=True)


if __name__ == "__main__":
    main()
