"""The least time that a device can take: bytes read once at its bandwidth, products at its speed. Torch-free.

A decode step reads the KV of every running sequence once, and its matrix products take the longer of reading all
weights once and of doing their FLOPs. Prefill does 2 FLOPs a weight (without embeddings) and token, and causal
attention. Every output token counts as one decode step of its sequence, the first one too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from nanoengine.lab.bench.shapes import Shape

Lengths = tuple[int, int]
"""Tokens of a request's prompt and of its output."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Measured ceilings of a device: bytes/s of reading, FLOP/s of matrix products; bytes of an element."""

    bandwidth: float
    flops: float
    itemsize: int = 2

    def of(self, devices: int) -> Limits:
        """Of so many such devices together, were they to say nothing to each other."""
        return replace(self, bandwidth=self.bandwidth * devices, flops=self.flops * devices)


def least_seconds(shape: Shape, limits: Limits, requests: Sequence[Lengths], places: int, cached: int = 0) -> float:
    """Of requests that are all there from the start.

    Args:
        places: how many run at once; with fewer than requests, rows are spread evenly over them.
        cached: tokens of every prompt but the first that are taken from the prefix cache.
    """
    prefill = sum(
        prefill_seconds(shape, limits, prompt - (cached if i else 0), cached if i else 0)
        for i, (prompt, _) in enumerate(requests)
    )
    read = sum(sum(range(prompt, prompt + output)) for prompt, output in requests)
    products = sum(product_seconds(shape, limits, rows) for rows in _rows(requests, places))
    return prefill + read * shape.kv_per_token * limits.itemsize / limits.bandwidth + products


def _rows(requests: Sequence[Lengths], places: int) -> Iterable[int]:
    """Running rows of each decode step."""
    outputs = [output for _, output in requests]
    if len(outputs) <= places:
        return (sum(output > step for output in outputs) for step in range(max(outputs)))
    steps = max(max(outputs), -(-sum(outputs) // places))
    rows, rest = divmod(sum(outputs), steps)
    return [rows + 1] * rest + [rows] * (steps - rest)


def prefill_seconds(shape: Shape, limits: Limits, tokens: int, cached: int = 0) -> float:
    """Computing `tokens` of a prompt behind `cached` ones."""
    attended = tokens * cached + tokens * tokens / 2
    products = 2 * shape.layers * shape.layer_weights * tokens
    return (products + 4 * shape.layers * shape.heads * shape.head_size * attended) / limits.flops


def product_seconds(shape: Shape, limits: Limits, rows: int) -> float:
    """Matrix products of a decode step."""
    weights = shape.step_weights
    return max(weights * limits.itemsize / limits.bandwidth, 2 * weights * rows / limits.flops)


def decode_seconds(shape: Shape, limits: Limits, rows: int, context: float) -> float:
    """A decode step of rows that each see `context` tokens."""
    read = rows * context * shape.kv_per_token * limits.itemsize
    return product_seconds(shape, limits, rows) + read / limits.bandwidth
