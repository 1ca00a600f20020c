"""A step's inputs from the tables of the running requests, and its outcome back into them, in plain torch.

Lengths are read on the device: a row's tokens begin at its slot's `num_computed`, whatever the host believes. The last
slot is the dummy, which padding uses: it is read like any other and never written, so it stays of length 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotState:
    """Tables of S slots, the last one a dummy; G KV groups.

    Attributes:
        token_ids: int32 [S, max_model_len + 1]. num_tokens, num_computed: int64 [S]; known tokens, and how many of
            them have their KV.
        block_tables: int32 [G, S, M]; anything behind a slot's last block.
        output_counts: int32 [S, V], how often a slot drew each token; None where nobody asks.
    """

    token_ids: Tensor
    num_tokens: Tensor
    num_computed: Tensor
    block_tables: Tensor
    output_counts: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputBuffers:
    """What `gather` fills, for up to T tokens and B rows.

    Attributes:
        input_ids: int32 [T]. positions: int64 [T]. seq_lens: int32 [B]; context, this step's tokens included.
        slot_mapping: int64 [G, T]; block * block_size + offset of each token. block_tables: int32 [G, B, M]; 0 behind
            a row's last block.
    """

    input_ids: Tensor
    positions: Tensor
    seq_lens: Tensor
    slot_mapping: Tensor
    block_tables: Tensor


def scatter(words: Tensor, packed: Tensor) -> None:
    """words[offsets] = values. words, packed: int32 [N] and [2 K], K different offsets and then K values."""
    offsets, values = packed.chunk(2)
    words.index_copy_(0, offsets.long(), values)


def scatter_counted(words: Tensor, sent: Tensor, first: int, most: int) -> None:
    """`scatter` of sent[first:], whose number only the device knows: sent[0], at most `most`."""
    scatter(words, sent[first : first + 2 * int(sent[0])])


def pick_columns(words: Tensor, slots: Tensor, tables: Tensor, out: Tensor) -> None:
    """Rows of several tables that lie in one tensor.

    Args:
        words: int32 [N], the tables. slots: int [R]. tables: int32 [C, 2], each one's first word and words an element
            (1 or 2). out: int32 [C, W], contiguous, W at least 2 R: the elements of each, one behind the other.
    """
    for column, (first, width) in enumerate(tables.tolist()):
        at = first + slots.long()[:, None] * width + torch.arange(width, device=slots.device)
        out[column, : len(slots) * width] = words[at].flatten()


def gather(
    state: SlotState,
    slots: Tensor,
    query_start_loc: Tensor,
    out: StepInputBuffers,
    *,
    block_size: int,
    max_query_len: int,
    pad_tokens: int = 0,
) -> None:
    """Fill the fronts of the buffers for the B rows of `slots`.

    Args:
        slots: int64 [B]; only the dummy may stand there twice. query_start_loc: int32 [B + 1], offsets of the rows'
            tokens. max_query_len: upper bound of their lengths; not needed here, and the grid of the Triton kernel.
        slots, query_start_loc may also be int32. pad_tokens: so many tokens have a place in the cache, those behind the
            last row in the dummy block.
    """
    lens = query_start_loc.diff()
    rows, row_of_token = len(slots), torch.repeat_interleave(lens)
    tokens = len(row_of_token)
    out.slot_mapping[:, tokens:pad_tokens] = 0
    computed = state.num_computed[slots]
    offset = torch.arange(tokens, device=slots.device) - query_start_loc[row_of_token]
    token_slots, positions = slots[row_of_token], computed[row_of_token] + offset
    out.positions[:tokens] = positions
    out.input_ids[:tokens] = state.token_ids[token_slots, positions]
    out.seq_lens[:rows] = (computed + lens).to(torch.int32)
    used = torch.arange(state.block_tables.shape[2], device=slots.device) < -(-out.seq_lens[:rows, None] // block_size)
    out.block_tables[:, :rows] = state.block_tables[:, slots] * used
    blocks = state.block_tables[:, token_slots, positions // block_size].long()
    out.slot_mapping[:, :tokens] = blocks * block_size + positions % block_size


def record(
    state: SlotState, slots: Tensor, query_start_loc: Tensor, tokens: Tensor, token_of_row: Tensor | None = None
) -> None:
    """A step's last act: what was computed counts as computed, and drawn tokens are appended and counted.

    Args:
        slots, query_start_loc: as for `gather`. tokens: int64 [N], drawn. token_of_row: int32 [B]; which of them is the
            row's, -1: none. None: the rows' own, in order.
    """
    real = slots != len(state.num_tokens) - 1
    lens = query_start_loc.diff()
    state.num_computed[slots[real]] += lens[real]
    if token_of_row is None:
        token_of_row = torch.arange(len(slots), device=slots.device)
    drawn = real & (token_of_row >= 0)
    slots, new = slots[drawn], tokens[token_of_row[drawn].long()]
    positions = state.num_computed[slots]
    state.token_ids[slots, positions] = new.to(torch.int32)
    state.num_tokens[slots] = positions + 1
    if state.output_counts is not None:
        state.output_counts[slots, new] += 1
