"""The torch backend against a naive float64 reference, one query and one head at a time."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from paged_case import Case, history, run
from torch import Tensor

from nanoengine.api import AttentionLayerSpec, AttentionNeed, BatchLimits, KVSpec, StepInputs
from nanoengine.params.speculation import MAX_DRAFTS
from nanoengine.plugins.attention_backends import pieces
from nanoengine.plugins.attention_backends.pieces import Rows, plan_pieces
from nanoengine.plugins.attention_backends.torch_paged import TorchPaged
from nanoengine.plugins.attention_backends.triton_paged import TritonPaged
from nanoengine.testing.mock_model import MockAttention

# float32: rounding only. The others: rounding of the output (2**-9, 2**-12 relative) and of the probabilities.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    decode = [(1, rng.randint(1, 60)) for _ in range(rng.randint(0, 7))]
    prefill = [
        (count, count + rng.choice([0, rng.randint(0, 50)]))
        for count in (
            rng.choice([1, 2, 3, rng.randint(1, 40), rng.randint(100, 300)]) for _ in range(rng.randint(0, 4))
        )
    ]
    kv_heads = rng.choice([1, 2, 3])
    return Case(
        rows=decode + prefill or [(1, 1)],
        heads=kv_heads * rng.choice([1, 2, 3]),
        kv_heads=kv_heads,
        head_size=rng.choice([8, 20, 33, 64]),
        block_size=rng.choice([1, 4, 16]),
        window=rng.choice([None, None, 3, 64]),
        soft_cap=rng.choice([None, None, 5.0]),
        dtype=rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
        seed=seed,
        padded_rows=0 if prefill else rng.choice([0, 3]),
        tail=rng.choice([0, 5]),
        host_slack=rng.choice([0, 1]),
        with_sinks=rng.choice([False, False, True]),
        causal=rng.choice([True, True, False]),
    )


def error(case: Case, backend: type[TorchPaged] = TorchPaged) -> float:
    out, want = run(backend, case), case.reference()
    assert out.dtype == case.dtype
    assert out.isfinite().all()  # padding included
    return float((out[: len(want)].double() - want).abs().max())


@pytest.mark.parametrize("seed", range(40))
def test_random_batches(seed: int) -> None:
    case = random_case(seed)
    assert error(case) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 7])
def test_every_path_in_one_mixed_step(dtype: torch.dtype, soft_cap: float | None, window: int | None) -> None:
    """Single queries in more than one batch, short rows padded together, a long row in chunks on a long context."""
    mixed_step(soft_cap=soft_cap, window=window, dtype=dtype)


@pytest.mark.parametrize("more", [{"with_sinks": True}, {"causal": False}, {"with_sinks": True, "causal": False}])
@pytest.mark.parametrize("window", [None, 7])
def test_sinks_and_attention_that_looks_ahead_in_every_path(window: int | None, more: dict[str, bool]) -> None:
    mixed_step(window=window, **more)


def mixed_step(*, dtype: torch.dtype = torch.float32, **more: Any) -> None:
    rows = [(1, 4), (1, 300), (1, 5), (3, 9), (7, 7), (200, 330), (1, 2)]
    case = Case(rows=rows, head_size=12, dtype=dtype, tail=3, **more)
    groups = plan_pieces(Rows.of(case.inputs()), case.block_size, 10_000)
    assert [g.queries for g in groups] == [1, 1, 7, 200]
    assert error(case) < TOLERANCE[dtype]


class Overestimated(Case):
    """The host knows upper bounds only, of any row."""

    def inputs(self) -> StepInputs:
        made = super().inputs()
        return replace(made, seq_lens_host=tuple(n + 7 for n in made.seq_lens_host))


@pytest.mark.parametrize("decode_queries", [1, 16])
def test_rows_that_may_have_drafts_need_no_exact_lengths(decode_queries: int) -> None:
    """On a context so long that a row without drafts would be computed from the host's lengths."""
    rows = [(16, 1200), (3, 40), (1, 9), (16, 50)]
    assert pieces.LONG < 16 * 1200
    case = Overestimated(rows=rows, decode_queries=decode_queries, max_model_len=1300)
    assert error(case) < TOLERANCE[case.dtype]


def test_backends_take_as_many_queries_as_speculation_may_bring() -> None:
    most = 1 + MAX_DRAFTS
    assert most == pieces.DRAFT_QUERIES
    assert min(cls.capabilities.decode_queries for cls in (TorchPaged, TritonPaged, MockAttention)) >= most


def test_a_mutant_that_takes_the_lengths_of_drafts_for_exact_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "DRAFT_QUERIES", 15)
    case = Overestimated(rows=[(16, 1200), (3, 40)], max_model_len=1300)
    assert error(case) > 1e-2


class SeesOneAhead(TorchPaged):
    """Causal mask off by one."""

    def _mask(self, ahead: Tensor, out: Tensor, *most: Any) -> Tensor:
        return super()._mask(ahead - 1, out, *most)


class MissesItself(TorchPaged):
    def _mask(self, ahead: Tensor, out: Tensor, *most: Any) -> Tensor:
        return super()._mask(torch.where(ahead == 0, 1, ahead), out, *most)


class ReadsTheNextBlock(TorchPaged):
    def _fill_index(self, inputs: StepInputs, group: Any, used: int) -> Tensor:
        return super()._fill_index(replace(inputs, block_tables=inputs.block_tables.roll(1, dims=0)), group, used)


class StoresBesides(TorchPaged):
    def fill(self, inputs: StepInputs) -> None:
        super().fill(replace(inputs, slot_mapping=(inputs.slot_mapping - 1).clamp(min=0)))


class MixesHeads(TorchPaged):
    def _gather(self, layer: int, piece: Any) -> tuple[Tensor, Tensor]:
        keys, values = super()._gather(layer, piece)
        return keys, values.roll(1, dims=1)


class IgnoresSinks(TorchPaged):
    def attend(self, layer: int, spec: AttentionLayerSpec, q: Tensor) -> Tensor:
        return super().attend(layer, replace(spec, sinks=None), q)


class SinksOfOtherHeads(TorchPaged):
    def attend(self, layer: int, spec: AttentionLayerSpec, q: Tensor) -> Tensor:
        assert spec.sinks is not None
        return super().attend(layer, replace(spec, sinks=spec.sinks.roll(1)), q)


class LooksNotAhead(TorchPaged):
    def __init__(self, spec: KVSpec, limits: BatchLimits, device: torch.device) -> None:
        super().__init__(replace(spec, causal=True), limits, device)


class SeesThePadding(TorchPaged):
    """Looks ahead beyond the row's end, to the end of its last block."""

    def _mask(self, ahead: Tensor, out: Tensor, *most: Any) -> Tensor:
        return super()._mask(ahead, out, *(each + 1 for each in most))


class LeavesOldValues(TorchPaged):
    def _clear_tails(self, inputs: StepInputs) -> None: ...


@pytest.mark.parametrize(
    "mutant", [LeavesOldValues, SeesOneAhead, MissesItself, ReadsTheNextBlock, StoresBesides, MixesHeads]
)
@pytest.mark.parametrize(
    "rows", [[(1, 30), (1, 17), (1, 3)], [(5, 9), (6, 6)], [(150, 200), (160, 161)]], ids=["decode", "short", "long"]
)
def test_mutants_are_caught(mutant: type[TorchPaged], rows: list[tuple[int, int]]) -> None:
    case = Case(rows=rows)
    assert error(case) < TOLERANCE[torch.float32]
    try:
        wrong = error(case, mutant)
    except AssertionError:  # a row that may look at nothing is not finite
        return
    assert wrong > 100 * TOLERANCE[torch.float32]


@pytest.mark.parametrize("mutant", [IgnoresSinks, SinksOfOtherHeads, LooksNotAhead, SeesThePadding])
@pytest.mark.parametrize("rows", [[(5, 9), (6, 6)], [(150, 201), (160, 161)]], ids=["short", "long"])
def test_mutants_of_features_are_caught(mutant: type[TorchPaged], rows: list[tuple[int, int]]) -> None:
    case = Case(rows=rows, with_sinks=True, causal=False)
    assert error(case) < TOLERANCE[torch.float32]
    assert error(case, mutant) > 100 * TOLERANCE[torch.float32]


def test_block_ids_do_not_matter() -> None:
    rows = [(1, 30), (1, 17), (9, 20), (150, 170)]
    one, other = Case(rows=rows), Case(rows=rows)
    other.blocks = [[case_block % (one.num_blocks - 1) + 1 for case_block in table] for table in one.blocks]
    assert one.blocks != other.blocks
    torch.testing.assert_close(run(TorchPaged, one), run(TorchPaged, other), atol=5e-6, rtol=0)


def test_a_row_does_not_depend_on_its_company() -> None:
    rows = [(1, 30), (1, 300), (3, 20), (150, 170)]
    together = run(TorchPaged, case := Case(rows=rows))
    first = 0
    for i, (count, _) in enumerate(rows):
        alone = Case(rows=[rows[i]])
        alone.queries, alone.keys, alone.values = [case.queries[i]], [case.keys[i]], [case.values[i]]
        out = run(TorchPaged, alone)
        torch.testing.assert_close(out, together[first : first + count], atol=5e-6, rtol=0)
        first += count


def test_layers_do_not_share_blocks() -> None:
    case = Case(rows=[(1, 9)])
    backend = TorchPaged(case.kv_spec, case.limits, torch.device("cpu"))
    backend.allocate(2, case.num_blocks)
    history(backend, case, layer=0)
    backend.fill(case.inputs())
    right = backend.forward(0, case.spec, *case.step_qkv())
    empty = backend.forward(1, case.spec, *case.step_qkv())
    assert (right - case.reference()).abs().max() < 5e-6
    assert (empty - right).abs().max() > 1e-2


def test_decode_rebuilds_no_buffer() -> None:
    case = Case(rows=[(1, 30), (1, 17)], max_model_len=200)
    backend = TorchPaged(case.kv_spec, case.limits, torch.device("cpu"))
    backend.allocate(1, 200)

    def buffers() -> list[int]:
        piece = backend._pieces[0]
        held = [piece.index, piece.chunks[0].mask, backend._scratch, backend._slots, backend._kv]
        return [tensor.data_ptr() for tensor in held]

    seen = []
    for step in range(100):
        grown = Case(rows=[(1, 30 + step), (1, 17 + step)], max_model_len=200)
        backend.fill(grown.inputs())
        backend.forward(0, case.spec, *grown.step_qkv())
        seen.append(buffers())
    assert all(pointers == seen[0] for pointers in seen)


def test_plan_holds_every_row_once_within_bounds() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        counts = [1] * rng.randint(0, 20) + [rng.choice([1, 2, 30, 500]) for _ in range(rng.randint(0, 20))]
        lens = [count + rng.choice([0, rng.randint(0, 400)]) for count in counts]
        size = rng.choice([1, 16])
        rows = Rows(tuple(counts), tuple(lens), tuple(sum(counts[:i]) for i in range(len(counts) + 1)))
        most = max([-(-n // size) * size for n in lens], default=size)
        groups = plan_pieces(rows, size, most)
        assert sorted(row for group in groups for row in group.rows) == list(range(len(counts)))
        for group in groups:
            assert len(group.rows) * group.blocks * size <= most
            assert all(counts[row] <= group.queries and lens[row] <= group.blocks * size for row in group.rows)
            waste = sum(group.blocks - -(-lens[row] // size) for row in group.rows)
            assert group.queries > 1 or waste <= pieces.DECODE_WASTE


def test_capabilities_and_memory() -> None:
    need = AttentionNeed(device="cpu", dtype="float32", head_sizes=frozenset({20}), block_size=1)
    assert TorchPaged.unsupported(need) == []
    assert "not float64" in TorchPaged.unsupported(replace(need, dtype="float64"))[0]
    spec = KVSpec(num_kv_heads=3, head_size=64, dtype="bfloat16")
    limits = BatchLimits(max_rows=2, max_tokens=8, max_model_len=64, block_size=16)
    backend = TorchPaged(spec, limits, torch.device("cpu"))
    backend.allocate(5, 7)
    assert backend._kv.nbytes == 5 * 7 * TorchPaged.kv_block_bytes(spec, 16)
    backend.release()
    assert backend._kv.nbytes == 0
