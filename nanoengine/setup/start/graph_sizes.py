"""Which steps are captured as CUDA graphs, and how much memory the graphs need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from nanoengine.api.attention import AttentionCapabilities, BatchLimits, GraphSupport
from nanoengine.core.execution.graphs import CaptureSizes
from nanoengine.core.execution.step_inputs import StepSize
from nanoengine.kernels.paged_attention_plan import graph_rows
from nanoengine.params.engine_options import EngineOptions

GRAPH_RESERVE_BYTES = 256 << 20  # memory of the graphs in addition to logits and activations
_MOST_ROWS = 1024  # beyond them only `max_rows`
MIXED_DECODE_ROWS = (64, 128, 256)  # of mixed steps
_PREFILL_TOKENS = (128, 256, 384, 480, 576, 672, 768, 864, 960, 1088, 1280, 1536, 2048)
_MANY_PREFILL_TOKENS = (2560, 3072, 4096, 5120, 6144, 7168, 8192)
_MORE_PREFILL_TOKENS = (*range(128, 1089, 64), 1216, 1408, 1664, 2048)
_TOGETHER_TOKENS = range(1152, 1537, 64)  # of prompts that enter together, behind nearly all decode rows


def decode_sizes(max_rows: int) -> tuple[StepSize, ...]:
    """Decode steps to capture: 1, 2, 4 rows, then coarser with size, up to `max_rows`."""
    rows = {min(graph_rows(n), max_rows) for n in range(1, min(max_rows, _MOST_ROWS) + 1)}
    return tuple(map(StepSize, sorted({*rows, max_rows})))


def mixed_sizes(max_rows: int, max_tokens: int) -> tuple[StepSize, ...]:
    """The mixed steps to capture, up to `max_rows` and `max_tokens`."""
    decode = sorted({min(n, max_rows) for n in MIXED_DECODE_ROWS})
    prefill = _PREFILL_TOKENS if len(decode) > 2 else _MORE_PREFILL_TOKENS  # about the same number of graphs
    sizes = [StepSize(d, p) for d in decode for p in prefill]
    sizes += [StepSize(decode[-1], p) for p in _TOGETHER_TOKENS if p not in prefill]
    # Where many prompts come at once: alone, or behind as many decode rows as there may be; since each graph keeps the
    # logits of its rows, few of those.
    sizes += [StepSize(0, p) for p in _MANY_PREFILL_TOKENS]
    sizes += [StepSize(decode[-1], p) for p in _MANY_PREFILL_TOKENS if p in (4096, 8192)]
    return tuple(size for size in sizes if size.tokens <= max_tokens)


def draft_sizes(max_rows: int, max_tokens: int, drafts: int) -> tuple[StepSize, ...]:
    """The steps of rows with up to `drafts` drafts each to capture: of so many rows as decode steps, up to
    `max_tokens`. None without drafts."""
    sizes = (replace(size, query_len=1 + drafts) for size in decode_sizes(max_rows) if drafts)
    return tuple(size for size in sizes if size.tokens <= max_tokens)


def capture_sizes(
    options: EngineOptions,
    limits: BatchLimits,
    backend: AttentionCapabilities,
    *,
    fused: bool,
    tail: bool,
    drafts: int = 0,
) -> CaptureSizes:
    """The steps to capture, for these options and what the attention backend supports.

    `fused`: inputs are gathered by kernels that can pad tokens. `tail`: sampling can be captured too. `drafts`: the
    most that speculation gives a row; 0: it is off.
    """
    if torch.device(options.device).type != "cuda" or options.enforce_eager or backend.graphs < GraphSupport.DECODE:
        return CaptureSizes()
    sizes, inputs = decode_sizes(limits.max_rows), fused and backend.graphs >= GraphSupport.ALWAYS
    if inputs and drafts < backend.decode_queries:
        sizes += draft_sizes(limits.max_rows, limits.max_tokens, drafts)
    if inputs and options.graph_mixed_steps:
        sizes += mixed_sizes(limits.max_rows, limits.max_tokens)
    return CaptureSizes(sizes, inputs=inputs, tail=tail and options.fuse_sampling)


def first_sizes(sizes: Sequence[StepSize]) -> Sequence[StepSize]:
    """What an engine's first steps are likely to be: a short prompt, whose kernels take longest to compile, the most
    rows, whose memory is measured, and one row. sizes: the smallest last."""
    plain = [size for size in sizes if size.plain]
    mixed = [size for size in sizes if size.decode_rows and size.prefill_tokens]
    return [*mixed[-1:], *plain[:1], sizes[-1]]


def reserve_bytes(sizes: CaptureSizes, row_bytes: int, token_bytes: int) -> int:
    """Bytes that the graphs need, if a row of logits takes `row_bytes` and the model takes `token_bytes` per token.

    Each graph keeps its logits. All graphs share a memory pool of the size that the largest one needs.
    """
    tokens = max((size.tokens for size in sizes.sizes), default=0)
    held = sum(size.logits for size in sizes.sizes) * row_bytes + tokens * token_bytes
    return held + GRAPH_RESERVE_BYTES if sizes.sizes else 0
