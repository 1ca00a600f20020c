"""Step inputs and the record of a step: Triton and plain torch make the bits of a loop over rows and tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from nanoengine.api.attention import BatchLimits
from nanoengine.api.processor_params import ColumnSpec
from nanoengine.core.execution.slots import SlotLimits, SlotTables
from nanoengine.core.execution.step_inputs import (
    GatheredStep,
    StepBuffers,
    StepSize,
    _layout,
    decode_plan,
    pad,
)
from nanoengine.core.step import BlockAppends, NewSlots, ProcessorColumn, StepPlan, flags, i32, i64
from nanoengine.kernels import step_inputs
from nanoengine.kernels.host_ring import TURNS, HostRing
from nanoengine.kernels.step_inputs import Answer, SlotState, StepInputBuffers
from nanoengine.params.engine_plan import ProcessorPlan

pytest.importorskip("triton")
from nanoengine.kernels import step_inputs_triton

SLOTS, LENGTH, BLOCK, VOCAB, ROWS, TOKENS = 8, 60, 4, 50, 6, 48
LIMITS = BatchLimits(max_rows=ROWS, max_tokens=TOKENS, max_model_len=LENGTH, block_size=BLOCK)
IMPLEMENTATIONS = pytest.mark.parametrize("kernels", [step_inputs, step_inputs_triton], ids=["torch", "triton"])

BATCHES = {
    "decode": ([3, 0, 5], [1, 1, 1]),
    "one row": ([7], [1]),
    "ragged": ([2, 6, 1, 4], [1, 1, 17, 5]),
    "one long prompt": ([1], [37]),
    "padded": ([3, 0, SLOTS, SLOTS, SLOTS], [1, 1, 1, 1, 1]),
}


def tables(device: torch.device, groups: int = 2, *, fused: bool = False) -> SlotTables:
    """Every slot with random tokens, a random length, and its own blocks up to that length and 20 tokens more."""
    g = torch.Generator().manual_seed(groups)
    limits = SlotLimits(
        max_slots=SLOTS, max_model_len=LENGTH, vocab_size=VOCAB, num_groups=groups, max_blocks=LIMITS.max_blocks
    )
    out = SlotTables(limits, (), device, fused=fused)
    out.token_ids.copy_(torch.randint(0, VOCAB, out.token_ids.shape, generator=g))
    out.num_computed[:SLOTS] = torch.randint(0, LENGTH - 40, (SLOTS,), generator=g).to(device)
    out.num_tokens.copy_(out.num_computed + 1)
    blocks = torch.randint(1, 1000, out.block_tables.shape, generator=g, dtype=torch.int32).to(device)
    used = torch.arange(LIMITS.max_blocks, device=device) < 15
    out.block_tables.copy_(blocks * used)
    out.block_tables[:, SLOTS] = 0
    return out


def step_buffers(t: SlotTables) -> StepBuffers:
    """With backends that need nothing."""
    return StepBuffers(LIMITS, t, [SimpleNamespace(fill=lambda inputs: None)] * t.limits.num_groups)  # type: ignore[list-item]


def state_of(t: SlotTables, counts: Tensor | None = None) -> SlotState:
    return SlotState(
        token_ids=t.token_ids,
        num_tokens=t.num_tokens,
        num_computed=t.num_computed,
        block_tables=t.block_tables,
        output_counts=counts,
    )


def copy_of(s: SlotState) -> SlotState:
    return SlotState(**{n: None if (x := getattr(s, n)) is None else x.clone() for n in SlotState.__slots__})


def buffers(device: torch.device, groups: int) -> StepInputBuffers:
    """Poisoned, so that what is not written shows."""

    def make(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.full(shape, -77, dtype=dtype, device=device)

    return StepInputBuffers(
        input_ids=make(TOKENS, dtype=torch.int32),
        positions=make(TOKENS, dtype=torch.int64),
        seq_lens=make(ROWS, dtype=torch.int32),
        slot_mapping=make(groups, TOKENS, dtype=torch.int64),
        block_tables=make(groups, ROWS, LIMITS.max_blocks, dtype=torch.int32),
    )


def rows_of(batch: str, device: torch.device) -> tuple[Tensor, Tensor]:
    slots, lens = BATCHES[batch]
    start = torch.tensor([0, *np.cumsum(lens)], dtype=torch.int32, device=device)
    return torch.tensor(slots, device=device), start


def assert_gathered(batch: str, t: SlotTables, out: StepInputBuffers) -> None:
    """Token by token from the tables; nothing beyond them is written, and no row has a block behind its last."""
    slots, lens = BATCHES[batch]
    ids, computed, blocks = t.token_ids.tolist(), t.num_computed.tolist(), t.block_tables.tolist()
    at = 0
    for row, (slot, length) in enumerate(zip(slots, lens, strict=True)):
        positions = range(computed[slot], computed[slot] + length)
        own = slice(at, at + length)
        assert out.positions[own].tolist() == list(positions)
        assert out.input_ids[own].tolist() == [ids[slot][p] for p in positions]
        assert out.seq_lens[row] == computed[slot] + length
        used = -(-(computed[slot] + length) // BLOCK)
        for g, tables_of_group in enumerate(blocks):
            table = tables_of_group[slot]
            assert out.slot_mapping[g, own].tolist() == [table[p // BLOCK] * BLOCK + p % BLOCK for p in positions]
            assert out.block_tables[g, row].tolist() == table[:used] + [0] * (LIMITS.max_blocks - used)
        at += length
    for x in (out.input_ids[at:], out.positions[at:], out.seq_lens[len(slots) :], out.slot_mapping[:, at:]):
        assert (x == -77).all()
    assert (out.block_tables[:, len(slots) :] == -77).all()


@IMPLEMENTATIONS
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("batch", BATCHES)
def test_gather(batch: str, groups: int, kernels: ModuleType, device: torch.device) -> None:
    t, out = tables(device, groups), buffers(device, groups)
    slots, start = rows_of(batch, device)
    longest = max(BATCHES[batch][1])
    kernels.gather(state_of(t), slots, start, out, block_size=BLOCK, max_query_len=longest)
    assert_gathered(batch, t, out)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda t: t.num_computed.add_(1),
        lambda t: t.token_ids.add_(1),
        lambda t: t.block_tables[1].add_(1),
        lambda t: t.block_tables[1].zero_(),
    ],
)
def test_the_comparison_sees_a_wrong_gather(break_it: Callable[[SlotTables], object], device: torch.device) -> None:
    t, out = tables(device), buffers(device, 2)
    broken = tables(device)
    break_it(broken)
    step_inputs_triton.gather(state_of(broken), *rows_of("ragged", device), out, block_size=BLOCK, max_query_len=17)
    with pytest.raises(AssertionError):
        assert_gathered("ragged", t, out)


@IMPLEMENTATIONS
@pytest.mark.parametrize("batch", BATCHES)
def test_settle(batch: str, kernels: ModuleType, device: torch.device) -> None:
    """Every other row drew a token, the rest are chunks of a prompt; padding leaves no trace."""
    t = tables(device)
    state = state_of(t, torch.zeros(SLOTS + 1, VOCAB, dtype=torch.int32, device=device))
    slots, start = rows_of(batch, device)
    drawn = torch.arange(len(slots), device=device) % 2 == 0
    token_of_row = torch.where(drawn, drawn.cumsum(0) - 1, -1).to(torch.int32)
    tokens = torch.arange(int(drawn.sum()), device=device) * 7 % VOCAB
    want = copy_of(state)
    assert want.output_counts is not None
    for row, (slot, length) in enumerate(zip(*BATCHES[batch], strict=True)):
        if slot != SLOTS:
            want.num_computed[slot] += length
            if row % 2 == 0:
                position, token = want.num_computed[slot], tokens[row // 2]
                want.token_ids[slot, position] = token
                want.num_tokens[slot] = position + 1
                want.output_counts[slot, token] += 1
    kernels.settle(state, slots, start, tokens, token_of_row)
    for name in SlotState.__slots__:
        assert torch.equal(getattr(state, name), getattr(want, name)), name
    assert int(want.output_counts.sum()) > 0


@IMPLEMENTATIONS
@pytest.mark.parametrize("seed", range(6))
def test_settle_of_rows_with_drafts(seed: int, kernels: ModuleType, device: torch.device) -> None:
    """Drafts that are right, wrong and both; draws that failed; a chunk, a row without drafts and padding beside
    them."""
    g = torch.Generator().manual_seed(seed)
    t = tables(device)
    state = state_of(t, torch.zeros(SLOTS + 1, VOCAB, dtype=torch.int32, device=device))
    slots, drafts, draws = [3, 0, 5, 1, SLOTS, 7], [3, 0, 5, 2, 0, 0], [4, 1, 6, 3, 0, 0]
    lens = [4, 1, 6, 3, 0, 9]
    tokens = torch.randint(0, VOCAB, (sum(draws),), generator=g).to(device)
    failed = (torch.rand(sum(draws), generator=g) < 0.1).int().to(device)
    want = copy_of(state)
    assert want.output_counts is not None
    counts, at = [], 0
    for slot, num_drafts, num_draws, length in zip(slots, drafts, draws, lens, strict=True):
        if slot == SLOTS or not num_draws:
            want.num_computed[slot] += length
            counts.append(0)
            continue
        known = int(want.num_computed[slot]) + length - num_drafts
        right = int(torch.randint(0, num_drafts + 1, (), generator=g))
        own, fine = tokens[at : at + num_draws], (failed[at : at + num_draws] == 0).tolist()
        for each in (state, want):
            each.token_ids[slot, known : known + num_drafts] = own[:num_drafts]
            if right < num_drafts:
                each.token_ids[slot, known + right] = (own[right] + 1) % VOCAB
        kept = 1
        while kept <= right and fine[kept - 1] and fine[kept]:
            kept += 1
        want.token_ids[slot, known : known + kept] = own[:kept].int()
        want.num_computed[slot], want.num_tokens[slot] = known + kept - 1, known + kept
        want.output_counts[slot] += torch.bincount(own[:kept], minlength=VOCAB)
        counts.append(kept * fine[0])
        at += num_draws
    start = torch.tensor([0, *np.cumsum(lens)], dtype=torch.int32, device=device)
    first = [int(sum(draws[:row])) if draws[row] else -1 for row in range(6)]
    got = torch.full((6,), -77, dtype=torch.int32, device=device)
    kernels.settle(
        state, torch.tensor(slots, device=device), start, tokens, torch.tensor(first, dtype=torch.int32, device=device),
        torch.tensor(drafts, dtype=torch.int32, device=device), failed, got, max_drafts=5,
    )  # fmt: skip
    assert got.tolist() == counts
    for name in SlotState.__slots__:
        assert torch.equal(getattr(state, name), getattr(want, name)), name
    assert seed or max(counts) > 1


@IMPLEMENTATIONS
def test_settle_of_chunks_alone(kernels: ModuleType, device: torch.device) -> None:
    state = state_of(tables(device))
    before = copy_of(state)
    slots, start = rows_of("ragged", device)
    none = torch.full((len(slots),), -1, dtype=torch.int32, device=device)
    kernels.settle(state, slots, start, torch.zeros(0, dtype=torch.int64, device=device), none)
    assert (state.num_computed - before.num_computed)[slots].tolist() == BATCHES["ragged"][1]
    assert torch.equal(state.token_ids, before.token_ids)
    assert torch.equal(state.num_tokens, before.num_tokens)


@IMPLEMENTATIONS
def test_settle_without_counts_every_row_its_token(kernels: ModuleType, device: torch.device) -> None:
    state = state_of(tables(device))
    before = state.num_computed.clone()
    slots, start = rows_of("padded", device)
    tokens = torch.tensor([11, 12, 13, 14, 15], device=device)
    kernels.settle(state, slots, start, tokens)
    for slot, token in ((3, 11), (0, 12)):
        assert state.token_ids[slot, before[slot] + 1] == token
        assert state.num_tokens[slot] == before[slot] + 2
        assert state.num_computed[slot] == before[slot] + 1
    assert state.num_computed[SLOTS] == state.num_tokens[SLOTS] - 1 == 0


def test_decoding_goes_on_from_what_was_recorded(device: torch.device) -> None:
    state, out = state_of(tables(device)), buffers(device, 2)
    slots, start = rows_of("decode", device)
    positions = []
    for tokens in ([5, 6, 7], [8, 9, 10]):
        step_inputs_triton.settle(state, slots, start, torch.tensor(tokens, device=device))
        step_inputs_triton.gather(state, slots, start, out, block_size=BLOCK, max_query_len=1)
        assert out.input_ids[:3].tolist() == tokens
        positions.append(out.positions[:3].clone())
    assert torch.equal(positions[0] + 1, positions[1])


@pytest.mark.gpu
def test_in_a_graph_without_waiting() -> None:
    """One graph, captured on padding: the rows and lengths of a replay are those that are in the buffers then."""
    device = torch.device("cuda")
    t, out = tables(device), buffers(device, 2)
    state = state_of(t)
    slots, start = rows_of("padded", device)
    live = slots.clone()
    slots.fill_(SLOTS)
    tokens = torch.tensor([1, 2, 3, 4, 5], device=device)

    def step() -> None:
        step_inputs_triton.gather(state, slots, start, out, block_size=BLOCK, max_query_len=1)
        step_inputs_triton.settle(state, slots, start, tokens)

    before = copy_of(state)
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(state.num_computed, before.num_computed), "padding left a trace"
    slots.copy_(live)
    graph.replay()
    assert out.positions[:2].tolist() == before.num_computed[live[:2]].tolist()
    step_inputs.settle(before, live, start, tokens)
    for name in ("token_ids", "num_tokens", "num_computed"):
        assert torch.equal(getattr(state, name), getattr(before, name)), name


def test_replace_is_not_needed_for_an_empty_batch(device: torch.device) -> None:
    state, out = state_of(tables(device)), buffers(device, 2)
    empty = torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int32, device=device)
    step_inputs_triton.gather(replace(state), *empty, out, block_size=BLOCK, max_query_len=0)
    step_inputs_triton.settle(state, *empty, torch.zeros(0, dtype=torch.int64, device=device))
    assert (out.positions == -77).all()


@IMPLEMENTATIONS
def test_scatter(kernels: ModuleType, device: torch.device) -> None:
    words = torch.arange(5000, dtype=torch.int32, device=device)
    offsets = torch.randperm(5000, generator=torch.Generator().manual_seed(1))[:1500].int().to(device)
    values = -offsets - 1
    want = words.clone()
    want[offsets.long()] = values
    kernels.scatter(words, torch.cat([offsets, values]))
    assert torch.equal(words, want)
    kernels.scatter(words, torch.zeros(0, dtype=torch.int32, device=device))
    assert torch.equal(words, want)


@IMPLEMENTATIONS
@pytest.mark.parametrize("drafts", [False, True])
def test_what_was_drawn_is_left_for_the_host(kernels: ModuleType, drafts: bool, device: torch.device) -> None:
    """In the turn that the step was sent with, of all draws, those of padding and those that failed included; with
    drafts also how many tokens each row keeps."""
    t, (slots, start) = tables(device), rows_of("padded", device)
    host = torch.full((TURNS, 3, 12), -7, dtype=torch.int32, device=device)
    sent = torch.tensor([0, TURNS + 3], dtype=torch.int32, device=device)  # a blank step's: taken modulo
    failed = torch.tensor([0, 1, 0, 0, 2, 0, 0, 0, 0, 1], dtype=torch.int32, device=device)
    tokens = torch.tensor([5, 0, 49, 0, 7, 1, 2, 3, 4, 0], device=device)
    each, more = {}, None
    if drafts:  # two draws a row; the first row's draft is right, but what follows it failed; the second's is right
        of_row = torch.arange(0, 10, 2, dtype=torch.int32, device=device)
        start = torch.arange(0, 12, 2, dtype=torch.int32, device=device)
        more = torch.ones(5, dtype=torch.int32, device=device)
        counts = torch.full((5,), -7, dtype=torch.int32, device=device)
        for slot, token in ((3, 5), (0, 49)):
            t.token_ids[slot, t.num_computed[slot] + 1] = token
        each = {"drafts": more, "counts": counts, "token_of_row": of_row, "max_drafts": 1}
    else:
        tokens, failed = tokens[:5], failed[:5]
    answer = Answer(host=host, sent=sent)
    kernels.settle(state_of(t), slots, start, tokens, failed=failed, answer=answer, **each)
    assert host[3, 0].tolist() == tokens.tolist() + [-7] * (12 - len(tokens))
    assert host[3, 1].tolist() == failed.tolist() + [-7] * (12 - len(tokens))
    assert host[3, 2].tolist() == ([1, 2, 0, 0, 0] if drafts else [-7] * 5) + [-7] * 7
    assert (host[torch.arange(TURNS) != 3] == -7).all()


def test_turns_are_taken_one_after_the_other(device: torch.device) -> None:
    ring, into = HostRing((3,), device), torch.zeros(3, dtype=torch.int32, device=device)
    for turn in [*range(1, TURNS), 0] * 2:
        ring.next()[:] = turn
        assert ring.turn == turn
    assert [view.tolist() for view in ring.views] == [[turn] * 3 for turn in range(TURNS)]
    ring.next()[:] = 4, 5, 6
    ring.send(2, into)
    assert into.tolist() == [4, 5, 0]


def test_padding_has_a_place_in_the_dummy_block(device: torch.device) -> None:
    for kernels in (step_inputs, step_inputs_triton):
        t, out = tables(device), buffers(device, 2)
        slots, start = rows_of("ragged", device)
        kernels.gather(state_of(t), slots.int(), start, out, block_size=BLOCK, max_query_len=17, pad_tokens=40)
        assert (out.slot_mapping[:, 24:40] == 0).all()
        assert (out.slot_mapping[:, 40:] == -77).all()
        out.slot_mapping[:, 24:40] = -77
        assert_gathered("ragged", t, out)


@pytest.mark.parametrize("fused", [False, True])
def test_what_the_host_writes_arrives_at_once_and_in_order(fused: bool, device: torch.device) -> None:
    """Of admissions, columns and block appends nothing is in the tables before `flush`; a column is reset for its
    next owner and may be set for it in the same step."""
    limits = SlotLimits(max_slots=4, max_model_len=20, vocab_size=VOCAB, num_groups=2, max_blocks=5)
    columns = {"a": ColumnSpec(dtype="float32", default=1.0), "b": ColumnSpec(dtype="bool", default=False)}
    t = SlotTables(limits, (ProcessorPlan(name="s", target="", columns=columns),), device, fused=fused)

    def admitted(slots: list[int]) -> NewSlots:
        n = len(slots)
        return NewSlots(
            slots=i32(slots), token_ids=i32(range(7, 7 + 3 * n)), token_offsets=i32(range(0, 3 * n + 1, 3)),
            prompt_lens=i32([3] * n), num_computed=i32([1] * n), seeds=i64([2**40 + s for s in slots]),
            sample_index=i32([5] * n), greedy=flags([False] * n), min_lens=i32([3] * n),
            stop_offsets=i32([0] * (n + 1)), num_logprobs=i32([-1] * n),
        )  # fmt: skip

    def changed(column: str, slot: int, value: float) -> ProcessorColumn:
        values = np.array([value], np.float32 if column == "a" else np.bool_)
        return ProcessorColumn(processor="s", column=column, slots=i32([slot]), values=values, offsets=i32([0, 1]))

    appends = BlockAppends(group=i32([0, 1]), slot=i32([2, 2]), index=i32([0, 1]), block=i32([8, 9]))
    t.write(StepPlan(new=admitted([2, 0]), columns=(changed("a", 2, 0.5), changed("b", 2, True)), appends=appends))
    assert not t.num_tokens.any()
    t.flush()
    assert t.num_tokens.tolist() == [3, 0, 3, 0, 0]
    assert t.seeds.tolist() == [2**40, 0, 2**40 + 2, 0, 0]
    assert t.token_ids[:3, :3].tolist() == [[10, 11, 12], [0, 0, 0], [7, 8, 9]]
    assert t.greedy.tolist() == [0, 1, 0, 1, 1]
    assert (t.block_tables[0, 2, 0], t.block_tables[1, 2, 1]) == (8, 9)
    every = torch.arange(5, device=device)
    a, b = t.columns["s"]["a"], t.columns["s"]["b"]
    assert a.gather(every).tolist() == [1, 1, 0.5, 1, 1]
    assert b.gather(every).tolist() == [False, False, True, False, False]
    t.write(StepPlan(new=admitted([2]), columns=(changed("a", 2, 0.25),)))
    t.flush()
    assert a.gather(every).tolist() == [1, 1, 0.25, 1, 1]
    assert not b.gather(every).any()


def test_scatter_of_a_number_that_the_device_knows(device: torch.device) -> None:
    for kernels in (step_inputs, step_inputs_triton):
        words = torch.zeros(20, dtype=torch.int32, device=device)
        sent = torch.tensor([3, 0, 0, 0, 77, 5, 19, 0, 8, 9, 7, 77], dtype=torch.int32, device=device)
        kernels.scatter_counted(words, sent, 5, 2048)
        assert words.nonzero().flatten().tolist() == [0, 5, 19]
        assert words[[5, 19, 0]].tolist() == [8, 9, 7]


def poisoned(t: SlotTables) -> StepBuffers:
    """What is not gathered shows."""
    made = step_buffers(t)
    for name in StepInputBuffers.__slots__:
        getattr(made.out, name).fill_(-77)
    return made


@pytest.mark.parametrize("fused", [False, True])
def test_a_decode_graph_writes_and_gathers_what_an_eager_step_does(fused: bool, device: torch.device) -> None:
    appends = BlockAppends(group=i32([0, 1]), slot=i32([0, 0]), index=i32([3, 3]), block=i32([501, 502]))
    size = StepSize(6)
    plan, _ = pad(decode_plan(i32([3, 0, 5]), 0), size, SLOTS)
    t = tables(device, fused=fused)
    t.write(StepPlan(appends=appends))
    want = step_buffers(t).gather(plan)
    assert not t.buffer.pending
    assert t.block_tables[0, 0, 3] == 501

    again = tables(device, fused=True)
    again.write(StepPlan(appends=appends))
    inputs = poisoned(again)
    inputs.send(plan, np.flatnonzero(plan.sampled))
    assert again.buffer.pending, "until the graph has run"
    got = inputs.gather_in_graph(plan, size)
    assert again.block_tables[0, 0, 3] == 501
    assert_same(got, want)
    rows = got.rows
    assert rows.slots.tolist() == [3, 0, 5, SLOTS, SLOTS, SLOTS]
    assert rows.token_of_row is None


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("most", [4096, 2])
def test_a_mixed_graph_writes_and_gathers_what_an_eager_step_does(
    most: int, fused: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two decode rows, a prompt's end and a chunk, in a graph for 3 + 24; more writes than it holds go in front."""
    monkeypatch.setattr("nanoengine.core.execution.step_inputs.MAX_WRITES", most)
    plan = StepPlan(
        slots=i32([2, 6, 1, 4]), num_decode_rows=2, query_lens=i32([1, 1, 15, 5]), starts=i32([0] * 4),
        logits_index=i32([0, 1, 16]), logits_rows=i32([0, 1, 2]), sampled=flags([True] * 3),
        prompt_logprobs=i32([0] * 3),
    )  # fmt: skip
    size = StepSize(3, 24)
    padded, own = pad(plan, size, SLOTS)
    t, again = tables(device, fused=fused), tables(device, fused=True)
    for each in (t, again):
        appends = BlockAppends(group=i32([0] * 3), slot=i32([6] * 3), index=i32([0, 1, 2]), block=i32([9, 8, 7]))
        each.write(StepPlan(appends=appends))
    want = step_buffers(t).gather(padded)
    assert want.rows.token_of_row is not None
    assert want.rows.token_of_row.tolist() == [0, 1, -1, 2, -1, -1, -1, -1, -1, -1, -1]  # of the drawn ones
    inputs = poisoned(again)
    inputs.send(padded, np.flatnonzero(padded.sampled))
    got = inputs.gather_in_graph(padded, size)
    assert_same(got, want)
    assert got.groups[1].slot_mapping[padded.num_tokens :].tolist() == [0] * (size.tokens - padded.num_tokens)
    rows = got.rows
    assert rows.token_of_row is not None
    assert rows.token_of_row.tolist() == [0, 1, -1, 3, -1, -1, -1, -1, -1, -1, -1]
    assert got.rows.logits_index[own].tolist() == [0, 1, 17]  # behind a padded decode row
    assert rows.query_start_loc.tolist() == [0, 1, 2, 3, 18, 23, 23, 23, 23, 23, 23, 23]


def assert_same(got: GatheredStep, want: GatheredStep) -> None:
    tokens = len(want.positions)
    assert torch.equal(got.input_ids[:tokens], want.input_ids)
    assert torch.equal(got.positions[:tokens], want.positions)
    assert torch.equal(got.rows.slots, want.rows.slots)
    assert torch.equal(got.rows.logits_index, want.rows.logits_index)
    for a, b in zip(got.groups, want.groups, strict=True):
        assert torch.equal(a.block_tables, b.block_tables)
        assert torch.equal(a.seq_lens, b.seq_lens)
        assert torch.equal(a.slot_mapping[:tokens], b.slot_mapping)
        assert torch.equal(a.query_start_loc, b.query_start_loc)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("batch", ["decode", "ragged"])
def test_rows_and_writes_are_one_upload(
    batch: str, fused: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots, lens = BATCHES[batch]
    decode = len(slots) if max(lens) == 1 else 0
    t, sent = tables(device, fused=fused), list[int]()
    made, original = step_buffers(t), HostRing.send
    t.write(StepPlan(appends=BlockAppends(group=i32([1]), slot=i32([slots[0]]), index=i32([0]), block=i32([77]))))
    monkeypatch.setattr(HostRing, "send", lambda self, count, into: (sent.append(count), original(self, count, into)))
    monkeypatch.delattr(torch, "from_numpy")  # nothing else is sent
    plan = StepPlan(slots=i32(slots), num_decode_rows=decode, query_lens=i32(lens), starts=i32([0] * len(slots)))
    got = made.gather(plan)
    assert len(sent) == 1
    assert t.block_tables[1, slots[0], 0] == got.groups[1].block_tables[0, 0] == 77


def test_blank_rows_leave_no_trace(device: torch.device) -> None:
    """Whatever the step before left: the end of a step is run once before it is captured."""
    t = tables(device, fused=True)
    inputs, plan = poisoned(t), decode_plan(i32([2, 6, 1, 4]), 0)
    inputs.send(plan, np.flatnonzero(plan.sampled))
    before = copy_of(state_of(t))

    def record(size: StepSize) -> None:
        rows = inputs._rows(_layout(size.rows, size.rows, plain=size.plain))
        tokens = torch.zeros(size.rows, dtype=torch.int64, device=device)
        step_inputs_triton.settle(state_of(t), rows.slots, rows.query_start_loc, tokens, rows.token_of_row)

    def left_no_trace() -> bool:
        names = ("token_ids", "num_tokens", "num_computed")
        return all(torch.equal(getattr(before, name), getattr(t, name)) for name in names)

    inputs.sent.fill_(SLOTS)  # as `setup/start/capture.py` does
    record(StepSize(2, 24))
    record(StepSize(ROWS))
    assert left_no_trace()
    inputs.send(plan, np.flatnonzero(plan.sampled))
    record(StepSize(ROWS))
    assert not left_no_trace()
