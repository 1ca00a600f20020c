"""Kernels and copies that are turned on and off one by one (`engine.kernels`); without one, another does its work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

KernelName = Literal[
    "attention_code_slices", "attention_codes", "attention_prefill_gluon", "attention_slices",
    "attention_slices_beside", "eight_bit_streamed", "int4_gluon", "mask_in_scan", "masks_beside",
    "matvec_streamed", "products_in_parts", "products_wide", "sums_pushed",
]  # fmt: skip
KERNELS: Mapping[KernelName, bool] = {
    # many rows with K and V in eight bits, from qkv, in slices of keys on Hopper GPUs; else in tiles, behind a store
    "attention_code_slices": True,
    "attention_codes": True,  # K and V in eight bits by wgmma on Hopper GPUs; else by the decode kernel in Triton
    "attention_prefill_gluon": True,  # prompts by warps with roles on Hopper GPUs; else by the kernel in Triton
    "attention_slices": True,  # decode from qkv by a softmax over many keys at once on Hopper GPUs; else tile by tile
    "attention_slices_beside": True,  # and decode beside prompts, from q
    # one row times a large FP8 weight by rings of shared memory, and quantised there; else by a kernel in front
    "eight_bit_streamed": True,
    "int4_gluon": True,  # codes of four bits in tiles, for tensor cores; and Hopper's kernels in Gluon; else row by row
    "mask_in_scan": True,  # a captured draw masks and checks logits as it first reads them; else kernels in front of it
    "masks_beside": True,  # late masks are copied on a stream of their own; else on that of the steps
    "matvec_streamed": True,  # one row times a large weight by rings of shared memory on Hopper GPUs; else registers
    # some products of 193 to 256 rows in two parts of K that the norm behind adds up: `matmul.takes_parts`
    "products_in_parts": True,
    "products_wide": True,  # some products with a gate in tiles of 96 outputs on Hopper GPUs: `matmul.takes_wide`
    # products of few rows end with their sum over GPUs, by writing to the others; else a kernel behind them reads
    "sums_pushed": True,
}
"""Whether each is on by default. What reads a name: `KernelChoice.has`."""


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """Those of `KERNELS` that are on: named in `on`, or on by default and not named in `off`."""

    on: frozenset[str] = frozenset()
    off: frozenset[str] = frozenset()

    @classmethod
    def of(cls, asked: Mapping[str, bool]) -> KernelChoice:
        """Names of `KERNELS` -> on or off."""
        assert asked.keys() <= KERNELS.keys(), asked
        on = frozenset(name for name, wanted in asked.items() if wanted)
        return cls(on, frozenset(asked) - on)

    def has(self, name: KernelName) -> bool:
        return name in self.on or (KERNELS[name] and name not in self.off)


BY_DEFAULT = KernelChoice()
