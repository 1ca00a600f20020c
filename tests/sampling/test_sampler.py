"""The sampler as a whole: order, fusion, mixed batches, failures, log-probs."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from nanoengine.api import (
    ColumnSpec,
    LogitsProcessor,
    Need,
    Phase,
    ProcessorParams,
    ProcessorRows,
    SamplerSpec,
    StandardOp,
)
from nanoengine.api.errors import PluginError
from nanoengine.api.processors import RaggedColumn
from nanoengine.core.execution.sampler import DrawRows, Sampler
from nanoengine.core.step import ROW_BAD_LOGITS, ROW_FINE, ROW_NOTHING_LEFT
from nanoengine.kernels import sampling
from nanoengine.kernels.choice import BY_DEFAULT
from nanoengine.params.sampling_params import SamplingParams

from .harness import (
    BUILT_IN,
    Batch,
    ShiftedTables,
    StaleTables,
    Tables,
    Tenant,
    draw,
    load_processor,
    make_sampler,
    plan_of,
    resolver,
    rows_of,
    subset,
    tenant,
)

VOCAB = 3000
MIXED: list[dict[str, Any]] = [
    {"temperature": 0},
    {},
    {"temperature": 0.6},
    {"temperature": 0.9, "top_k": 40},
    {"temperature": 1.3, "top_p": 0.9},
    {"top_k": 20, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0, "top_k": 5, "repetition_penalty": 1.5},
    {"temperature": 0.8, "min_p": 0.2, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"allowed_token_ids": [5, 6, 7, 2000]},
    {"bad_words": ["ab", "zz"], "temperature": 0.5},
    {"logit_bias": {17: 12.0, 18: 11.0}, "top_p": 0.95},
    {"top_k": 2500, "top_p": 0.999},
]


def mixed(seed: int = 0) -> tuple[torch.Tensor, list[Tenant]]:
    """A batch in which every processor is wanted by some rows; one tenant in two has a history."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(MIXED), VOCAB, generator=generator) * 3
    tenants = [
        tenant(VOCAB, prompt=[1, 2, 97], output=[97, 98, 97] if i % 2 else [], seed=100 * seed + i, **want)
        for i, want in enumerate(MIXED)
    ]
    return logits, tenants


def sample(sampler: Sampler, logits: torch.Tensor, rows: Batch) -> list[int]:
    token_ids, failed = draw(sampler, logits.clone(), rows)
    assert token_ids.dtype == torch.int64
    assert failed.dtype == torch.int32
    assert not failed.any()
    return token_ids.tolist()


def count_calls(monkeypatch: pytest.MonkeyPatch, sampler: Sampler) -> list[str]:
    """Names of the processors that get called."""
    called: list[str] = []
    original = Sampler._apply

    def spy(self: Sampler, s: Any, logits: torch.Tensor, rows: DrawRows) -> torch.Tensor:
        called.append(s.name)
        return original(self, s, logits, rows)

    monkeypatch.setattr(Sampler, "_apply", spy)
    return called


@pytest.mark.parametrize("seed", range(6))
def test_fused_equals_processors_one_by_one(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, tenants = mixed(seed)
    rows = rows_of(VOCAB, tenants)
    fused, staged = make_sampler(VOCAB, fuse=True), make_sampler(VOCAB, fuse=False)
    called = count_calls(monkeypatch, fused)
    by_search = sample(fused, logits, rows)
    assert called == ["allowed_token_ids", "bad_words", "logit_bias", "penalties"]
    called.clear()
    assert sample(staged, logits, rows) == by_search
    assert called[4:] == ["temperature", "top_k", "top_p", "min_p"]
    # As on a device: shapes that do not depend on data, everything sorted at once.
    monkeypatch.setattr(sampling, "on_host", lambda tensor: False)
    assert sample(fused, logits, rows) == by_search
    assert sample(staged, logits, rows) == by_search


def test_a_row_draws_the_same_alone_and_in_any_batch() -> None:
    for fuse in (True, False):
        sampler = make_sampler(VOCAB, fuse=fuse)
        logits, tenants = mixed(9)
        rows = rows_of(VOCAB, tenants)
        together = sample(sampler, logits, rows)
        for r in range(len(tenants)):
            assert sample(sampler, logits[r : r + 1], subset(rows, [r])) == [together[r]]
            assert sample(sampler, logits[r : r + 1], rows_of(VOCAB, [tenants[r]])) == [together[r]]
        order = [7, 3, 0, 11, 4]
        assert sample(sampler, logits[order], subset(rows, order)) == [together[r] for r in order]


@pytest.mark.parametrize("tables", [ShiftedTables, StaleTables])
def test_wrong_columns_change_tokens(tables: type[Tables]) -> None:
    """The comparison above would see them."""
    logits, tenants = mixed(9)
    right, wrong = Tables(VOCAB, slots=len(tenants)), tables(VOCAB, slots=len(tenants))
    for table in (right, wrong):
        for slot in range(len(tenants)):
            table.enter(slot, tenant(VOCAB, temperature=5.0, top_k=3, allowed_token_ids=[1, 2, 3]))
            table.enter(slot, tenants[slot])
    sampler, slots = make_sampler(VOCAB, fuse=True), list(range(len(tenants)))
    expected = sample(sampler, logits, rows_of(VOCAB, tenants))
    assert sample(sampler, logits, right.rows(slots)) == expected
    assert sample(sampler, logits, wrong.rows(slots)) != expected


def test_registration_order_across_phases_is_no_matter() -> None:
    logits, tenants = mixed(3)
    expected = sample(make_sampler(VOCAB, fuse=True), logits, rows_of(VOCAB, tenants))
    backwards = tuple(reversed(BUILT_IN.values()))
    for fuse in (True, False):
        sampler = make_sampler(VOCAB, fuse=fuse, specs=backwards)
        assert sample(sampler, logits, rows_of(VOCAB, tenants, backwards)) == expected


def test_seed_position_and_sample_index_all_count() -> None:
    logits = torch.zeros(1, VOCAB)
    sampler = make_sampler(VOCAB, fuse=True)
    rows = rows_of(VOCAB, [tenant(VOCAB, seed=5)])
    base = sample(sampler, logits, rows)
    assert sample(sampler, logits, rows) == base
    for name in ("seeds", "positions", "sample_index"):
        assert sample(sampler, logits, replace(rows, **{name: getattr(rows, name) + 1})) != base
    assert sample(sampler, logits, replace(rows, slots=rows.slots + 3)) == base


def test_greedy_takes_the_lowest_of_the_likeliest_and_makes_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_noise(*args: Any) -> None:
        raise AssertionError("noise was made for greedy rows")

    monkeypatch.setattr(sampling, "noise_bits", no_noise)
    sampler = make_sampler(VOCAB, fuse=True)
    called = count_calls(monkeypatch, sampler)
    logits = torch.zeros(2, VOCAB)
    logits[0, [70, 30]] = 2.0
    logits[1, [5, 6]] = 1.0
    rows = rows_of(VOCAB, [tenant(VOCAB, temperature=0, top_k=1), tenant(VOCAB, temperature=0, logit_bias={6: 0.5})])
    assert sample(sampler, logits, rows) == [30, 6]
    assert called == ["logit_bias"]  # processors that cannot change the arg-max were skipped


@pytest.mark.parametrize("fuse", [True, False])
def test_greedy_beside_random(fuse: bool) -> None:
    logits = torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(1))
    tenants = [tenant(VOCAB, temperature=0 if r % 3 else 0.7, top_p=0.9, seed=r) for r in range(20)]
    tokens = sample(make_sampler(VOCAB, fuse=fuse), logits, rows_of(VOCAB, tenants))
    agree = [token == best for token, best in zip(tokens, logits.argmax(-1).tolist(), strict=True)]
    assert all(agree[r] for r in range(20) if r % 3)
    assert not all(agree)


def test_temperature_is_not_ignored() -> None:
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).expand(400, -1) * 2
    sampler = make_sampler(50, fuse=True)
    distinct = []
    for temperature in (0.1, 1.0, 8.0):
        tenants = [tenant(50, temperature=temperature, seed=s) for s in range(400)]
        distinct.append(len(set(sample(sampler, logits, rows_of(50, tenants)))))
    assert distinct[0] < distinct[1] < distinct[2]


# Stop set, failures ---------------------------------------------------------------------------------------------------


def stopping(rows: Batch, stop: list[list[int]], min_lens: list[int]) -> Batch:
    width = max(map(len, stop)) + 1
    values = torch.tensor([s + [0] * (width - len(s)) for s in stop])  # padding: id 0, which must stay possible
    ragged = RaggedColumn(values, torch.tensor([len(s) for s in stop], dtype=torch.int32))
    return replace(rows, stop_ids=ragged, min_lens=torch.tensor(min_lens), any_min_tokens=True)


def test_min_tokens_masks_the_stop_set_until_its_position() -> None:
    logits = torch.zeros(3, 10)
    logits[:, 4] = 9.0
    logits[:, 7] = 8.0
    logits[:, 0] = 7.0
    rows = rows_of(10, [tenant(10, prompt=[1, 1], output=[1], temperature=0) for _ in range(3)])
    rows = stopping(rows, [[4, 7], [4, 7], []], [4, 3, 4])  # the token to be drawn is at position 3
    assert sample(make_sampler(10, fuse=True), logits, rows) == [0, 4, 4]
    off = replace(rows, any_min_tokens=False)
    assert sample(make_sampler(10, fuse=True), logits, off) == [4, 4, 4]


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("host", [True, False])
@pytest.mark.parametrize("greedy", [True, False])
def test_a_broken_row_fails_alone(fuse: bool, host: bool, greedy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not host:
        monkeypatch.setattr(sampling, "on_host", lambda tensor: False)
    want = {"temperature": 0} if greedy else {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.01}
    wants = [want] * 7
    wants[5] = want | {"logit_bias": {i: -float("inf") for i in range(200)}}
    logits = torch.randn(7, 200, generator=torch.Generator().manual_seed(1))
    sampler = make_sampler(200, fuse=fuse)
    sound = sample(sampler, logits, rows_of(200, [tenant(200, seed=r, **want) for r in range(7)]))
    logits[1, 150] = torch.nan
    logits[2, 3] = torch.inf
    logits[3] = -torch.inf
    logits[4, 100:] = -torch.inf  # padding: legal
    rows = rows_of(200, [tenant(200, seed=r, **w) for r, w in enumerate(wants)])
    tokens, failed = draw(sampler, logits, rows)
    bad, none_left = ROW_BAD_LOGITS, ROW_NOTHING_LEFT
    assert failed.tolist() == [ROW_FINE, bad, bad, bad, ROW_FINE, none_left, ROW_FINE]
    assert tokens[failed != ROW_FINE].tolist() == [0] * 4
    assert [int(tokens[r]) for r in (0, 6)] == [sound[r] for r in (0, 6)]
    assert int(tokens[4]) < 100


# Processors of others -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NucleusParams(ProcessorParams):
    nucleus: float = 1.0
    columns: ClassVar = {"share": ColumnSpec(dtype="float32", default=1.0, op=StandardOp.TOP_P)}

    def pack(self, ctx: Any) -> dict[str, float]:
        return {"share": self.nucleus}


class Nucleus(LogitsProcessor):
    phase = Phase.TRUNCATE
    argmax_invariant = True

    def apply(self, logits: torch.Tensor, rows: ProcessorRows) -> torch.Tensor:
        raise RuntimeError("called, though its column is a standard operation")


@dataclass(frozen=True)
class OddParams(ProcessorParams):
    odd_only: bool = False
    columns: ClassVar = {"odd_only": ColumnSpec(dtype="bool", default=False)}


class Odd(LogitsProcessor):
    """Removes even ids."""

    phase = Phase.TRUNCATE

    def apply(self, logits: torch.Tensor, rows: ProcessorRows) -> torch.Tensor:
        even = torch.arange(logits.shape[1]) % 2 == 0
        return logits.masked_fill(rows.column("odd_only")[:, None] & even, -torch.inf)


def with_processor(
    name: str, params: type[ProcessorParams], processor: type[LogitsProcessor]
) -> tuple[SamplerSpec, ...]:
    return (*BUILT_IN.values(), SamplerSpec(name=name, params=params, target=f"{__name__}:{processor.__name__}", api=1))


def test_fusion_goes_by_operation_not_by_name() -> None:
    specs = with_processor("nucleus", NucleusParams, Nucleus)
    logits, _ = mixed(1)

    def rows(**params: Any) -> Batch:
        made = [
            Tenant(resolver(VOCAB, specs).resolve(SamplingParams(temperature=0.9, **params)), seed=r) for r in range(12)
        ]
        return rows_of(VOCAB, made, specs)

    sampler = make_sampler(VOCAB, fuse=True, specs=specs)
    assert sample(sampler, logits, rows(nucleus=0.3)) == sample(sampler, logits, rows(top_p=0.3))
    assert sample(sampler, logits, rows(nucleus=0.3)) != sample(sampler, logits, rows())
    with pytest.raises(RuntimeError, match="called") as caught:
        sample(make_sampler(VOCAB, fuse=False, specs=specs), logits, rows(nucleus=0.3))
    assert f"in logits processor 'nucleus' ({__name__}:Nucleus)" in caught.value.__notes__
    with pytest.raises(RuntimeError, match="called"):  # two processors with one operation: both are called, in order
        sample(sampler, logits, rows(nucleus=0.3, top_p=0.5))


def test_another_truncation_processor_is_called_after_the_standard_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = with_processor("odd", OddParams, Odd)
    wants = [{"top_k": 3, "odd_only": True}, {"top_k": 3}, {"odd_only": True}, {}] * 3
    made = [Tenant(resolver(VOCAB, specs).resolve(SamplingParams(**w)), seed=r) for r, w in enumerate(wants)]
    sampler = make_sampler(VOCAB, fuse=True, specs=(specs[-1], *specs[:-1]))
    called = count_calls(monkeypatch, sampler)
    logits = torch.randn(12, VOCAB, generator=torch.Generator().manual_seed(2))
    logits[:, [1, 2, 3]] += 20
    tokens = sample(sampler, logits, rows_of(VOCAB, made, specs))
    assert called == ["top_k", "odd"]
    assert {tokens[r] for r in (0, 4, 8)} <= {1, 3}
    assert {tokens[r] for r in (1, 5, 9)} <= {1, 2, 3}


@pytest.mark.parametrize("fuse", [True, False])
def test_a_greedy_row_is_drawn_as_alone_where_a_processor_behind_truncation_changes_the_arg_max(fuse: bool) -> None:
    """Truncation changes no arg-max by itself, and may leave nothing that the processor behind it keeps."""
    specs = with_processor("odd", OddParams, Odd)
    wants = [{"temperature": 0, "top_k": k, "odd_only": True} for k in (1, 2, 50)] + [{"temperature": 0, "top_k": 1}]
    made = [Tenant(resolver(VOCAB, specs).resolve(SamplingParams(**w))) for w in (*wants, {"top_p": 0.9})]
    sampler, logits = make_sampler(VOCAB, fuse=fuse, specs=specs), torch.zeros(5, VOCAB)
    logits[:, 4], logits[:, 7] = 9.0, 8.0
    tokens, failed = draw(sampler, logits.clone(), rows_of(VOCAB, made, specs))
    assert failed.tolist() == [ROW_NOTHING_LEFT, ROW_FINE, ROW_FINE, ROW_FINE, ROW_FINE]
    assert tokens[1:4].tolist() == [7, 7, 4]
    for row, one in enumerate(made):
        alone = draw(sampler, logits[:1].clone(), rows_of(VOCAB, [one], specs))
        assert (int(alone[0]), int(alone[1])) == (int(tokens[row]), int(failed[row]))
    assert not rows_of(VOCAB, made[3:4], specs).plan(sampler).called, "where nothing comes behind it, it is skipped"


@dataclass(frozen=True)
class LateTemperatureParams(ProcessorParams):
    late: float = 1.0
    columns: ClassVar = {"late": ColumnSpec(dtype="float32", default=1.0, op=StandardOp.TEMPERATURE)}


class LateTemperature(LogitsProcessor):
    """Temperature of what truncation leaves."""

    phase = Phase.TRUNCATE
    argmax_invariant = True

    def apply(self, logits: torch.Tensor, rows: ProcessorRows) -> torch.Tensor:
        return sampling.scale_by_temperature_(logits, rows.column("late"))


@dataclass(frozen=True)
class EndsParams(ProcessorParams):
    most: int = 0
    least: float = 0.0
    columns: ClassVar = {
        "least": ColumnSpec(dtype="float32", default=0.0, op=StandardOp.MIN_P),
        "most": ColumnSpec(dtype="int32", default=0, op=StandardOp.TOP_K),
    }


class Ends(LogitsProcessor):
    """Top-k and min-p in one, so that top-p comes behind min-p."""

    phase = Phase.TRUNCATE
    argmax_invariant = True

    def apply(self, logits: torch.Tensor, rows: ProcessorRows) -> torch.Tensor:
        cut = sampling.truncation_threshold(logits, top_k=rows.column("most"), min_p=rows.column("least"))
        return sampling.truncate_(logits, cut)


@pytest.mark.parametrize(
    ("params", "processor", "wants", "together"),
    [
        (LateTemperatureParams, LateTemperature, {"late": 3.0}, {"late": 3.0, "top_p": 0.5}),
        (EndsParams, Ends, {"most": 30, "least": 0.05, "temperature": 2.0}, {"least": 0.3, "top_p": 0.6}),
    ],
)
def test_operations_in_another_order_than_the_fused_one_are_called_one_by_one(
    params: type[ProcessorParams], processor: type[LogitsProcessor], wants: Any, together: Any
) -> None:
    """Else a row's token would depend on whether another row's processor keeps the batch from being fused."""
    specs = with_processor("other", params, processor)
    made = [
        Tenant(resolver(VOCAB, specs).resolve(SamplingParams(**(together if r % 2 else wants))), seed=r)
        for r in range(40)
    ]
    fused, called = (make_sampler(VOCAB, fuse=fuse, specs=specs) for fuse in (True, False))
    logits = torch.randn(40, VOCAB, generator=torch.Generator().manual_seed(5)) * 2
    for start, names in ((0, set()), (1, {"other", "top_p"})):
        rows = rows_of(VOCAB, made[start::2], specs)
        assert sample(fused, logits[:20], rows) == sample(called, logits[:20], rows)
        assert {p.name for p in rows.plan(fused).called} == names


class Narrow(LogitsProcessor):
    phase = Phase.BIAS

    def apply(self, logits: torch.Tensor, rows: ProcessorRows) -> torch.Tensor:
        return logits[:, :-1]


class Wordy(LogitsProcessor):
    """Does in `apply` what its argument does."""

    phase = Phase.BIAS

    def __init__(self, act: Any) -> None:
        self.act = act

    def apply(self, logits: torch.Tensor, rows: ProcessorRows) -> torch.Tensor:
        return self.act()


@pytest.mark.parametrize(
    ("act", "error", "words"),
    [
        (lambda: None, PluginError, "returned None of type NoneType, not the logits, a Tensor"),
        (lambda: [1.0] * 1000, PluginError, "of type list, not the logits"),
        (lambda: sys.exit(3), PluginError, r"called sys\.exit\(3\)"),
        (lambda: sys.exit(), PluginError, r"called sys\.exit\(\)"),
        (lambda: {}["gone"], KeyError, "gone"),
    ],
)
def test_a_processor_that_breaks_is_named_with_its_origin(act: Any, error: type[Exception], words: str) -> None:
    plan = replace(plan_of(BUILT_IN["logit_bias"]), target="made_up:Wordy", origin="plugin file /some/x.py")
    with pytest.raises(error, match=words) as caught:
        draw(
            Sampler([(plan, Wordy(act))], 20, fuse=True),
            torch.zeros(1, 20),
            rows_of(20, [tenant(20, logit_bias={1: 1.0})]),
        )
    whole = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert "logits processor 'logit_bias' (Wordy of plugin file /some/x.py)" in whole
    assert len(str(caught.value)) < 250


def test_misbehaving_processors_are_named() -> None:
    plan = plan_of(BUILT_IN["logit_bias"])
    rows = rows_of(20, [tenant(20, logit_bias={1: 1.0})])
    with pytest.raises(
        PluginError, match=r"'logit_bias' \(.*LogitBias\) returned .*\(1, 19\) instead of the .*\(1, 20\)"
    ):
        draw(Sampler([(plan, Narrow(None))], 20, fuse=True), torch.zeros(1, 20), rows)  # type: ignore[arg-type]


def test_needs_are_declared() -> None:
    sampler = make_sampler(20, fuse=True)
    assert sampler.needs == {Need.OUTPUT_COUNTS, Need.PROMPT_MASK, Need.TOKEN_IDS}
    assert sampler.choose({"penalties": True}, random=True).needs == {Need.OUTPUT_COUNTS, Need.PROMPT_MASK}
    assert sampler.choose({"top_k": True}, random=True).needs == frozenset()
    assert load_processor(BUILT_IN["penalties"], 20).phase == Phase.PENALTY


@pytest.mark.parametrize(
    ("wanted", "asked", "called", "ops", "captured", "sharded"),
    [
        ("", {"random": False}, "", "", True, True),
        ("temperature", {"random": True}, "", "temperature", True, True),
        ("temperature top_k", {"random": False}, "", "", True, True),  # an arg-max stays what it is
        ("temperature top_k min_p", {"random": True}, "", "temperature top_k min_p", True, False),
        ("temperature", {"random": True, "logprobs": True}, "", "temperature", False, False),
        ("temperature", {"random": True, "min_tokens": True}, "", "temperature", False, False),
        ("temperature penalties", {"random": True}, "penalties", "temperature", False, True),
        ("logit_bias", {"random": False}, "logit_bias", "", False, False),
    ],
)
def test_how_rows_are_drawn_is_chosen_by_what_they_want(
    wanted: str, asked: dict[str, bool], called: str, ops: str, captured: bool, sharded: bool
) -> None:
    pytest.importorskip("triton")
    specs = [(plan_of(spec), load_processor(spec, 50)) for spec in BUILT_IN.values()]
    of_rows = dict.fromkeys(wanted.split(), asked["random"])
    plan = Sampler(specs, 50, fuse=True, kernels=BY_DEFAULT).choose(of_rows, **asked)
    assert [p.name for p in plan.called] == called.split()
    assert {op.value for op in plan.ops} == set(ops.split())
    assert (plan.captured, plan.sharded) == (plan.tail if captured else None, sharded)
    assert plan.reads_only == (not called and not plan.min_tokens)
    assert plan.tail == (0 if not plan.random else 2 if "top_k" in ops else 1)
    plain = Sampler(specs, 50, fuse=False).choose(of_rows, **asked)
    assert not plain.ops
    assert (plain.tail, plain.captured) == (None, None)


def test_a_processor_that_reads_counts_is_called_for_greedy_rows_too() -> None:
    """Whatever it does to an arg-max: a captured draw does not count, and a host processor may turn the row random."""

    class Repeats(LogitsProcessor):
        phase = Phase.TRUNCATE
        argmax_invariant = True
        needs = frozenset({Need.OUTPUT_COUNTS})

        def apply(self, logits: torch.Tensor, rows: ProcessorRows) -> torch.Tensor:
            return logits

    plan = replace(plan_of(BUILT_IN["min_p"]), name="repeats", columns={"on": ColumnSpec(dtype="bool", default=False)})
    sampler = Sampler([(plan, Repeats(None))], 50, fuse=True)  # type: ignore[arg-type]
    assert [p.name for p in sampler.choose({"repeats": False}, random=False).called] == ["repeats"]


# Log-probs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 5, 40])
def test_logprobs_against_numpy(k: int) -> None:
    generator = np.random.default_rng(0)
    logits = generator.integers(-6, 6, (9, 40)).astype(np.float32)  # many ties
    logits[0, :3] = (-0.0, 0.0, -np.inf)
    chosen = generator.integers(3, 40, 9)
    logprob, rank, ids, values = (
        t.numpy() for t in sampling.token_logprobs(torch.from_numpy(logits), torch.from_numpy(chosen), k)
    )
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(1, keepdims=True))
    for r in range(9):
        best = np.lexsort((np.arange(40), -logits[r].astype(np.float64)))[:k]
        assert ids[r].tolist() == best.tolist()
        np.testing.assert_allclose(values[r], exact[r, best], atol=1e-5)
        np.testing.assert_allclose(logprob[r], exact[r, chosen[r]], atol=1e-5)
        assert rank[r] == 1 + (logits[r] > logits[r, chosen[r]]).sum()
    assert (rank.dtype, ids.dtype, values.dtype, values.shape) == (np.int32, np.int32, np.float32, (9, k))


def test_logprobs_of_a_row_do_not_depend_on_its_batch() -> None:
    logits = torch.randn(17, 4097, generator=torch.Generator().manual_seed(3)) * 4
    chosen = torch.arange(17)
    batch = sampling.token_logprobs(logits, chosen, 3)
    for r in range(17):
        alone = sampling.token_logprobs(logits[r : r + 1], chosen[r : r + 1], 3)
        assert all(a[0].numpy().tobytes() == b[r].numpy().tobytes() for a, b in zip(alone, batch, strict=True))


def test_ranks_are_those_of_the_log_probs() -> None:
    """Logits that differ may have one log-prob: a drawn token's rank is what it has when it is listed."""
    logits = torch.tensor([[30.0, 1.0000001, 1.0000002, 0.5]])
    values, ranks, top_ids, top_values = sampling.token_logprobs(logits, torch.tensor([1]), 3)
    assert top_ids.tolist() == [[0, 2, 1]]
    assert top_values[0, 1] == top_values[0, 2] == values[0]
    assert ranks.tolist() == [2]
