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
        output_counts: int32 [S, V], how often a slot drew each token; None if no processor reads it.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Where the host reads what a step drew.

    Attributes:
        host: int32 [TURNS, 3, W], of an `AnswerRing`: tokens and failures of the draws, and how many each row keeps,
            where there are drafts.
        sent: int32; its second word is the step's turn.
    """

    host: Tensor
    sent: Tensor


def scatter(words: Tensor, packed: Tensor) -> None:
    """words[offsets] = values. words, packed: int32 [N] and [2 K], K different offsets and then K values."""
    offsets, values = packed.chunk(2)
    words.index_copy_(0, offsets.long(), values)


def scatter_counted(words: Tensor, sent: Tensor, first: int, most: int) -> None:
    """`scatter` of sent[first:], whose number only the device knows: sent[0], at most `most`."""
    scatter(words, sent[first : first + 2 * int(sent[0])])


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
    """Fill the fronts of the buffers for the B rows of `slots`.

    Args:
        slots: int [B]; only the dummy may be in it twice. query_start_loc: int32 [B + 1], offsets of the rows' tokens.
        max_query_len: upper bound of their lengths; the grid of the Triton kernel, not needed here.
        num_tokens: their sum, so that nothing waits for the device; not needed by the Triton kernel.
        pad_tokens: so many tokens have a place in the cache, those behind the last row in the dummy block.
    """
    slots, lens, rows = slots.long(), query_start_loc.diff(), len(slots)
    row_of_token = torch.repeat_interleave(lens, output_size=num_tokens)
    tokens = len(row_of_token)
    computed = state.num_computed[slots]
    token_slots = slots[row_of_token]
    before_first = (computed - query_start_loc[:-1])[row_of_token]
    positions = torch.add(before_first, torch.arange(tokens, device=slots.device), out=out.positions[:tokens])
    out.input_ids[:tokens] = state.token_ids[token_slots, positions]
    out.seq_lens[:rows] = computed + lens
    first_of_block = torch.arange(state.block_tables.shape[2], device=slots.device) * block_size
    out.block_tables[:, :rows] = state.block_tables[:, slots] * (first_of_block < out.seq_lens[:rows, None])
    blocks = state.block_tables[:, token_slots, positions // block_size].long()
    out.slot_mapping[:, :tokens] = blocks * block_size + positions % block_size
    if pad_tokens:
        out.slot_mapping[:, tokens:pad_tokens] = 0


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
    """A step's last act: what was computed counts as computed, and drawn tokens are appended and counted.

    The last `drafts` tokens of a row are guesses, in the token table behind its known tokens. Draft j is right if it is
    token j - 1 of those drawn for the row; the row keeps what was drawn up to the first wrong draft, so at least one
    token, and its lengths grow by what it keeps. A draw that failed is not kept behind a draft, and ends the row too.

    Args:
        slots, query_start_loc: as for `gather`. tokens: int64 [N], drawn. token_of_row: int32 [B]; which of them is the
            row's first, -1: none. None: the rows' own, in order.
        drafts: int32 [B], 0 where a row has none; at most `max_drafts`. failed: int32 [N], 0: fine. counts: int32 [B],
            written: how many tokens a row keeps. All three where a row may have drafts.
        answer: what was drawn is written there, too; then there must be `failed`.
    """
    slots, lens = slots.long(), query_start_loc.diff().long()
    drawn = real = slots != len(state.num_tokens) - 1
    if drafts is not None:
        lens = lens - drafts
    known = state.num_computed[slots] + lens * real  # where the first drawn token goes
    state.num_computed[slots] = known
    if not len(tokens):
        return
    first = torch.arange(len(slots), device=slots.device)
    if token_of_row is not None:
        drawn, first = real & (token_of_row >= 0), token_of_row.clamp(min=0).long()
    more = torch.zeros_like(first)  # drafts that are right
    if drafts is not None:
        assert failed is not None and counts is not None
        going = drawn
        for j in range(max_drafts):
            here, ahead = first + j, (first + j + 1).clamp(max=len(tokens) - 1)
            here = here.clamp(max=len(tokens) - 1)
            draft = state.token_ids[slots, (known + j).clamp(max=state.token_ids.shape[1] - 1)]
            right = (draft == tokens[here]) & (failed[here] == 0) & (failed[ahead] == 0)
            going = going & (drafts > j) & right
            more += going
        counts.copy_(torch.where(drawn & (failed[first] == 0), more + 1, 0))
    if answer is not None:
        assert failed is not None
        host = answer.host[int(answer.sent[1]) % len(answer.host)]
        host[0, : len(tokens)], host[1, : len(tokens)] = tokens, failed
        if counts is not None:
            host[2, : len(counts)] = counts
    for j in range(max_drafts + 1):
        kept, positions = drawn & (more >= j), (known + j).clamp(max=state.token_ids.shape[1] - 1)
        token = tokens[(first + j).clamp(max=len(tokens) - 1)]  # rows without one write what is there: no shape depends
        state.token_ids[slots, positions] = torch.where(kept, token.int(), state.token_ids[slots, positions])
        if state.output_counts is not None:
            state.output_counts.index_put_((slots, token), kept.int(), accumulate=True)
    state.num_computed[slots] += more * real
    state.num_tokens[slots] = torch.where(drawn, known + more + 1, state.num_tokens[slots])


def write_drafts(token_ids: Tensor, slots: Tensor, num_tokens: Tensor, drafts: Tensor, vocab_size: int) -> None:
    """Puts drafts behind the known tokens of their slots.

    Args:
        token_ids: int32 [S, W], the table; its last row is the dummy, which gets what is no id, or has no place.
        slots, num_tokens: int64 [R]. drafts: int32 [R, K].
    """
    dummy, width, column = len(token_ids) - 1, token_ids.shape[1], torch.arange(drafts.shape[1], device=slots.device)
    slots, places = slots[:, None], num_tokens[:, None] + column
    kept = (drafts >= 0) & (drafts < vocab_size) & (places < width) & (slots != dummy)
    to = torch.where(kept, slots, dummy), torch.where(kept, places, column)
    token_ids[to] = torch.where(kept, drafts, 0)
