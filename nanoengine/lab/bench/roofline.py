"""The shortest time that a device can need: bytes read once at its bandwidth, products at its speed. Imports no torch.

A decode step reads the KV of every running sequence once. Its matrix products take the time to read all weights once,
or the time of their FLOPs, whichever is longer. Prefill needs 2 FLOPs per weight (without embeddings) and token, and
causal attention. Every output token counts as one decode step of its sequence, also the first one. A token
uses its own experts, and a step reads those that its rows use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from nanoengine.lab.bench.shapes import Shape

Lengths = tuple[int, int]
"""Numbers of prompt tokens and output tokens of a request."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Measured limits of a device: bytes/s of reading, FLOP/s of matrix products; bytes of an element."""

    bandwidth: float
    flops: float
    itemsize: int = 2

    def of(self, devices: int) -> Limits:
        """The limits of so many devices together, ignoring communication."""
        return replace(self, bandwidth=self.bandwidth * devices, flops=self.flops * devices)


def least_seconds(shape: Shape, limits: Limits, requests: Sequence[Lengths], places: int, cached: int = 0) -> float:
    """The shortest time in seconds for requests that are all present from the start.

    Args:
        places: most requests that run at the same time. If there are more requests, they are distributed evenly.
        cached: tokens that every prompt, except the first, takes from the prefix cache.
    """
    prefill = sum(
        prefill_seconds(shape, limits, prompt - (cached if i else 0), cached if i else 0)
        for i, (prompt, _) in enumerate(requests)
    )
    read = sum(sum(range(prompt, prompt + output)) for prompt, output in requests)
    products = sum(product_seconds(shape, limits, rows) for rows in _rows(requests, places))
    return prefill + read * shape.kv_per_token * limits.itemsize / limits.bandwidth + products


def _rows(requests: Sequence[Lengths], places: int) -> Iterable[int]:
    """The number of rows in each decode step."""
    outputs = [output for _, output in requests]
    if len(outputs) <= places:
        return (sum(output > step for output in outputs) for step in range(max(outputs)))
    steps = max(max(outputs), -(-sum(outputs) // places))
    rows, rest = divmod(sum(outputs), steps)
    return [rows + 1] * rest + [rows] * (steps - rest)


def prefill_seconds(shape: Shape, limits: Limits, tokens: int, cached: int = 0) -> float:
    """Seconds to compute `tokens` of a prompt after `cached` ones."""
    attended = tokens * cached + tokens * tokens / 2
    products = 2 * shape.layers * shape.layer_weights * tokens
    return (products + 4 * shape.layers * shape.heads * shape.head_size * attended) / limits.flops


def product_seconds(shape: Shape, limits: Limits, rows: int) -> float:
    """Seconds for the matrix products of a decode step."""
    used = shape.layers * shape.layer_weights + shape.vocab * shape.hidden
    read = shape.step_weights(rows)
    return max(read * limits.itemsize / limits.bandwidth, 2 * used * rows / limits.flops)


def decode_seconds(shape: Shape, limits: Limits, rows: int, context: float) -> float:
    """Seconds for a decode step of rows that each attend to `context` tokens."""
    read = rows * context * shape.kv_per_token * limits.itemsize
    return product_seconds(shape, limits, rows) + read / limits.bandwidth
