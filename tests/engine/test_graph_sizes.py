"""What graphs are captured for: the usual row counts exactly, any other padded by little; each kind has its switch."""

from __future__ import annotations

from bisect import bisect_left
from typing import Any

import pytest

from nanoengine.api.attention import BatchLimits, GraphSupport
from nanoengine.core.execution.graphs import CaptureSizes
from nanoengine.params.engine_options import EngineOptions
from nanoengine.setup.start.graph_sizes import capture_sizes, decode_sizes


@pytest.mark.parametrize("most", [1, 7, 8, 20, 64, 100, 256, 1000, 1024])
def test_sizes_hold_every_number_of_rows_with_little_padding(most: int) -> None:
    sizes = tuple(size.rows for size in decode_sizes(most))
    assert all(size.plain for size in decode_sizes(most))
    assert sizes == tuple(sorted(set(sizes)))
    assert sizes[-1] == most
    assert {n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if n <= most} <= set(sizes)
    for rows in range(1, most + 1):
        assert sizes[bisect_left(sizes, rows)] <= max(2 * rows, rows + 3), rows


def captured(supported: GraphSupport = GraphSupport.ALWAYS, *, fused: bool = True, **options: Any) -> CaptureSizes:
    limits = BatchLimits(max_rows=64, max_tokens=2048, max_model_len=128, block_size=16)
    return capture_sizes(EngineOptions(**{"device": "cuda", **options}), limits, supported, fused=fused, tail=True)


def test_each_kind_of_graph_can_be_switched_off() -> None:
    every = captured()
    decode = decode_sizes(64)
    assert every.sizes[: len(decode)] == decode
    assert all(size.prefill_tokens for size in every.sizes[len(decode) :])
    assert len(every.sizes) > len(decode)
    assert every.tail
    assert every.inputs
    assert captured(enforce_eager=True) == captured(device="cpu") == captured(GraphSupport.NEVER) == CaptureSizes()
    assert captured(graph_mixed_steps=False) == CaptureSizes(decode, tail=True, inputs=True)
    assert captured(fuse_sampling=False) == CaptureSizes(every.sizes, inputs=True)
    assert captured(GraphSupport.DECODE) == captured(fused=False) == CaptureSizes(decode, tail=True)
