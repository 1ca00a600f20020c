"""What graphs are captured for: the usual row counts exactly, any other padded by little; each kind has its switch."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from typing import Any

import pytest

from nanoengine.api.attention import AttentionCapabilities, BatchLimits, GraphSupport
from nanoengine.core.execution.graphs import CaptureSizes
from nanoengine.core.execution.step_inputs import StepSize
from nanoengine.params.engine_options import EngineOptions
from nanoengine.setup.start.graph_sizes import (
    GRAPH_RESERVE_BYTES,
    capture_sizes,
    decode_sizes,
    first_sizes,
    reserve_bytes,
)
from nanoengine.setup.start.memory import batch_limits


@pytest.mark.parametrize("most", [1, 7, 8, 20, 64, 100, 256, 1000, 1024])
def test_sizes_hold_every_number_of_rows_with_little_padding(most: int) -> None:
    sizes = tuple(size.rows for size in decode_sizes(most))
    assert all(size.plain for size in decode_sizes(most))
    assert sizes == tuple(sorted(set(sizes)))
    assert sizes[-1] == most
    assert {n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024) if n <= most} <= set(sizes)
    for rows in range(1, most + 1):
        assert sizes[bisect_left(sizes, rows)] <= max(2 * rows, rows + 3), rows


def captured(
    graphs: GraphSupport = GraphSupport.ALWAYS, *, decode_queries: int = 16, fused: bool = True, drafts: int = 0,
    max_tokens: int = 2048, **options: Any,
) -> CaptureSizes:  # fmt: skip
    limits = BatchLimits(max_rows=64, max_tokens=max_tokens, max_model_len=128, block_size=16)
    backend = AttentionCapabilities(devices=frozenset({"cuda"}), graphs=graphs, decode_queries=decode_queries)
    given = EngineOptions(**{"device": "cuda", **options})
    return capture_sizes(given, limits, backend, fused=fused, tail=True, drafts=drafts)


@pytest.mark.parametrize("mixed", [True, False])
def test_kernels_of_the_first_steps_are_compiled_ahead(mixed: bool) -> None:
    sizes = sorted(captured(graph_mixed_steps=mixed).sizes, key=lambda size: (-size.tokens, size))
    assert first_sizes(sizes) == [*[StepSize(64, 128)] * mixed, StepSize(64), StepSize(1)]


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


def test_speculation_adds_decode_steps_of_a_token_and_its_drafts() -> None:
    """As far as a step has tokens, where such rows are decode rows to the backend; else, and when off, nothing more."""
    plain = captured()
    more = [size for size in captured(drafts=4).sizes if size not in plain.sizes]
    assert more == [replace(size, query_len=5) for size in decode_sizes(64)]
    assert set(plain.sizes) < set(captured(drafts=4).sizes)
    assert captured(drafts=4, decode_queries=5) == captured(drafts=4)
    small = [size for size in captured(drafts=4, max_tokens=100).sizes if size.query_len > 1]
    assert [size.decode_rows for size in small] == [1, 2, 4, 8, 16]  # of at most 20 rows
    assert captured(drafts=4, decode_queries=4) == captured(drafts=16) == plain
    assert captured(GraphSupport.DECODE, drafts=4) == captured(GraphSupport.DECODE)
    assert captured(fused=False, drafts=4) == captured(fused=False)


def test_steps_of_many_prompts_have_graphs_beyond_the_budget_by_their_padding() -> None:
    """Full steps: prompts alone, or behind as many decode rows as there may be."""
    sizes = [size for size in captured(max_tokens=8192 + 64).sizes if size.prefill_tokens > 2048]
    assert StepSize(0, 8192) in sizes
    assert StepSize(64, 8192) in sizes
    assert max(size.tokens for size in sizes) == 8192 + 64
    assert {size.prefill_rows for size in sizes} == {64}
    options = EngineOptions(
        device="cuda", max_num_seqs=64, max_num_batched_tokens=8192, max_model_len=99, block_size=16
    )
    assert batch_limits(options).max_tokens == 8192 + 64
    for without in ({"enforce_eager": True}, {"graph_mixed_steps": False}, {"device": "cpu"}):
        assert batch_limits(replace(options, **without)).max_tokens == 8192


def test_graphs_of_rows_with_drafts_keep_the_logits_of_all_their_tokens() -> None:
    sizes = CaptureSizes((StepSize(8), StepSize(8, 32), StepSize(4, query_len=5)))
    assert reserve_bytes(sizes, row_bytes=100, token_bytes=7) == (8 + 16 + 20) * 100 + 40 * 7 + GRAPH_RESERVE_BYTES
    assert reserve_bytes(CaptureSizes(), row_bytes=100, token_bytes=7) == 0
