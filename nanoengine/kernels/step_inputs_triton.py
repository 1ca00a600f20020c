"""`step_inputs` in Triton: one kernel for what the host writes, one before the model, one after the draw.

None of them waits for the host, nor knows a length. In a graph they are part of the chain of `pdl_triton`: what the
inputs of a step are made of is complete before the first kernel of the model starts, so all others may read it early.
"""

# ruff: noqa: N803
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.host_ring import TURNS
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs
from nanoengine.kernels.step_inputs import Answer, SlotState, StepInputBuffers

_MAX_BLOCK = 1024


@triton.jit(do_not_specialize=["count"])
def _scatter_kernel(words, packed, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < count
    tl.store(words + tl.load(packed + at, here, 0), tl.load(packed + count + at, here, 0), here)


@triton.jit(do_not_specialize=["first"])
def _scatter_counted_kernel(words, sent, first, BLOCK: tl.constexpr, PDL: tl.constexpr):
    wait_for_inputs(PDL)
    release_dependents(PDL)
    count = tl.load(sent)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = at < count
    tl.store(words + tl.load(sent + first + at, here, 0), tl.load(sent + first + count + at, here, 0), here)


@triton.jit(do_not_specialize=["rows", "pad_tokens"])
def _gather_kernel(
    slots, query_start_loc, token_ids, token_ids_stride, num_computed, block_tables, tables_stride_g, columns,
    input_ids, positions, seq_lens, slot_mapping, mapping_stride, out_tables, out_tables_stride_g, rows, pad_tokens,
    BLOCK_SIZE: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (row, part): `BLOCK` of the row's tokens, and of its block table's columns in each group. Behind the last
    row: of the padding's place in the cache."""
    row, part = tl.program_id(0), tl.program_id(1)
    wait_for_inputs(PDL)
    release_dependents(PDL)
    if row == rows:
        beyond = tl.load(query_start_loc + rows) + part * BLOCK + tl.arange(0, BLOCK)
        for g in tl.static_range(GROUPS):
            dummy_block = tl.zeros([BLOCK], slot_mapping.dtype.element_ty)
            tl.store(slot_mapping + g * mapping_stride + beyond, dummy_block, beyond < pad_tokens)
        return
    slot = tl.load(slots + row).to(tl.int64)
    start, end = tl.load(query_start_loc + row), tl.load(query_start_loc + row + 1)
    computed = tl.load(num_computed + slot)
    length = computed + (end - start)
    if part == 0:
        tl.store(seq_lens + row, length.to(tl.int32))
    offset = part * BLOCK + tl.arange(0, BLOCK)
    here = offset < end - start
    position = computed + offset
    tl.store(positions + start + offset, position, here)
    tl.store(input_ids + start + offset, tl.load(token_ids + slot * token_ids_stride + position, here), here)
    used = (length + BLOCK_SIZE - 1) // BLOCK_SIZE
    for g in tl.static_range(GROUPS):
        table = block_tables + g * tables_stride_g + slot * columns
        block = tl.load(table + position // BLOCK_SIZE, here, 0).to(tl.int64)
        mapped = block * BLOCK_SIZE + position % BLOCK_SIZE
        tl.store(slot_mapping + g * mapping_stride + start + offset, mapped, here)
        blocks = tl.load(table + offset, offset < used, 0)
        tl.store(out_tables + g * out_tables_stride_g + row.to(tl.int64) * columns + offset, blocks, offset < columns)


@triton.jit(do_not_specialize=["rows", "draws"])
def _settle_kernel(
    slots, query_start_loc, tokens, token_of_row, drafts, failed, counts, rows, dummy,
    token_ids, token_ids_stride, num_tokens, num_computed, output_counts, vocab, host, width, sent, draws,
    MAX_DRAFTS: tl.constexpr, TURNS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    mine = host
    if host is not None:
        mine = host + (tl.load(sent + 1) & (TURNS - 1)) * (3 * width)
        for i in range(0, draws, tl.num_programs(0) * BLOCK):
            tl.store(mine + i + row, tl.load(tokens + i + row, i + row < draws, 0).to(tl.int32), i + row < draws)
            tl.store(mine + width + i + row, tl.load(failed + i + row, i + row < draws, 0), i + row < draws)
    slot = tl.load(slots + row, inside, dummy).to(tl.int64)
    here = inside & (slot != dummy)
    start, end = tl.load(query_start_loc + row, here, 0), tl.load(query_start_loc + row + 1, here, 0)
    num_drafts = tl.zeros([BLOCK], tl.int32)
    if drafts is not None:
        num_drafts = tl.load(drafts + row, here, 0)
    position = tl.load(num_computed + slot, here, 0) + (end - start - num_drafts)
    first, drawn = row, here
    if token_of_row is not None:
        first = tl.load(token_of_row + row, here, -1)
        drawn = here & (first >= 0)
    known = token_ids + slot * token_ids_stride + position
    kept = tl.zeros([BLOCK], tl.int32)  # drafts that are right
    if drafts is not None:
        fine = tl.load(failed + first, drawn, 1) == 0
        right = drawn & fine
        for j in range(MAX_DRAFTS):
            right = right & (j < num_drafts)
            right = right & (tl.load(known + j, right, -1) == tl.load(tokens + first + j, right, -2))
            right = right & (tl.load(failed + first + j + 1, right, 1) == 0)
            kept += right.to(tl.int32)
        tl.store(counts + row, tl.where(drawn & fine, kept + 1, 0), inside)
        if host is not None:
            tl.store(mine + 2 * width + row, tl.where(drawn & fine, kept + 1, 0), inside)
    for j in range(MAX_DRAFTS + 1):
        keeps = drawn & (j <= kept)
        token = tl.load(tokens + first + j, keeps, 0)
        tl.store(known + j, token.to(tl.int32), keeps)
        if output_counts is not None:
            count = output_counts + slot * vocab + token
            tl.store(count, tl.load(count, keeps, 0) + 1, keeps)
    tl.store(num_computed + slot, position + kept, here)
    tl.store(num_tokens + slot, position + kept + 1, drawn)


def scatter(words: Tensor, packed: Tensor) -> None:
    """`step_inputs.scatter`."""
    count = len(packed) // 2
    if count:
        _scatter_kernel[(triton.cdiv(count, _MAX_BLOCK),)](words, packed, count, BLOCK=_MAX_BLOCK)


def scatter_counted(words: Tensor, sent: Tensor, first: int, most: int) -> None:
    """`step_inputs.scatter_counted`. Its grid depends on `most` alone."""
    _scatter_counted_kernel[(triton.cdiv(most, _MAX_BLOCK),)](
        words, sent, first, BLOCK=_MAX_BLOCK, **pdl_options(words)
    )


def gather(
    state: SlotState,
    slots: Tensor,
    query_start_loc: Tensor,
    out: StepInputBuffers,
    *,
    block_size: int,
    max_query_len: int,
    num_tokens: int | None = None,
    pad_tokens: int = 0,
) -> None:
    """`step_inputs.gather`. Its grid depends on B, `max_query_len` and the number of block-table columns."""
    rows, (groups, _, columns) = len(slots), state.block_tables.shape
    if rows == 0:
        return
    assert state.block_tables.is_contiguous()
    assert out.block_tables.stride()[1:] == (columns, 1), out.block_tables.stride()
    width = max(max_query_len, columns, pad_tokens)
    block = min(_MAX_BLOCK, triton.next_power_of_2(width))
    _gather_kernel[(rows + (pad_tokens > 0), triton.cdiv(width, block))](
        slots, query_start_loc, state.token_ids, state.token_ids.stride(0), state.num_computed,
        state.block_tables, state.block_tables.stride(0), columns,
        out.input_ids, out.positions, out.seq_lens, out.slot_mapping, out.slot_mapping.stride(0),
        out.block_tables, out.block_tables.stride(0), rows, pad_tokens,
        BLOCK_SIZE=block_size, GROUPS=groups, BLOCK=block, **pdl_options(slots),
    )  # fmt: skip


def settle(
    state: SlotState,
    slots: Tensor,
    query_start_loc: Tensor,
    tokens: Tensor,
    token_of_row: Tensor | None = None,
    drafts: Tensor | None = None,
    failed: Tensor | None = None,
    counts: Tensor | None = None,
    answer: Answer | None = None,
    *,
    max_drafts: int = 0,
) -> None:
    """`step_inputs.settle`, in one program for every 128 rows."""
    rows, output_counts = len(slots), state.output_counts
    if rows == 0:
        return
    host = (None, 0, None, 0) if answer is None else (answer.host, answer.host.shape[2], answer.sent, len(tokens))
    _settle_kernel[(triton.cdiv(rows, 128),)](
        slots, query_start_loc, tokens, token_of_row, drafts, failed, counts, rows, len(state.num_tokens) - 1,
        state.token_ids, state.token_ids.stride(0), state.num_tokens, state.num_computed,
        output_counts, 0 if output_counts is None else output_counts.stride(0), *host,
        MAX_DRAFTS=max_drafts, TURNS=TURNS, BLOCK=128, **pdl_options(slots),
    )  # fmt: skip
