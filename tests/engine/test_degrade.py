"""Out of memory in a launch: the step runs in parts and gives the very same answers; what cannot run fails alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.compare import assert_same_until_a_tie, compare
from transformers import AutoModelForCausalLM

from nanoengine import LLM, RequestOutput, SamplingParams
from nanoengine.core.execution import split
from nanoengine.core.execution.split import Part
from nanoengine.core.scheduling.messages import EngineStats
from nanoengine.testing.checkpoints import tiny_llama
from nanoengine.testing.invariants import check_scheduler
from nanoengine.testing.mock_model import MockModel

from .support import greedy, mock_llm, prompts, tokens_of
from .test_same_tokens import WAYS, seeded

POISON = 96
CPU_SHORTAGE = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error code 12"
SHORTAGES = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError("none left"), RuntimeError(CPU_SHORTAGE)]

Patch = pytest.MonkeyPatch


def fresh(error: Exception) -> Exception:
    """A traceback keeps frames alive, so each raise gets an error of its own."""
    return type(error)(*error.args)


def little_memory(monkeypatch: Patch, tokens: int, error: Exception = SHORTAGES[0]) -> list[int]:
    """A forward pass of more than `tokens` tokens runs out of memory; returns the sizes of those that ran."""
    sizes: list[int] = []
    forward = MockModel.forward

    def small(self: MockModel, input_ids: Any, positions: Any, batch: Any) -> Any:
        if len(input_ids) > tokens:
            raise fresh(error)
        sizes.append(len(input_ids))
        return forward(self, input_ids, positions, batch)

    monkeypatch.setattr(MockModel, "forward", small)
    return sizes


def mixed_params(count: int) -> list[SamplingParams]:
    """Greedy and seeded of every kind; some with log-probs, some with those of the prompt."""
    return [
        params.replace(logprobs=i % 4 if i % 2 else None, prompt_logprobs=2 if i % 3 == 0 else None)
        for i, params in enumerate(seeded(count))
    ]


def told(outputs: Sequence[RequestOutput]) -> list[Any]:
    """All that a request's output says of its tokens."""
    assert all(output.error is None for output in outputs)
    return [(o.prompt_logprobs, [(s.token_ids, s.finish_reason, s.logprobs) for s in o.outputs]) for o in outputs]


def run(tmp_path: Path, options: dict[str, Any], asked: Any, params: Any) -> tuple[list[Any], EngineStats]:
    with mock_llm(tmp_path, **options) as llm:
        outputs = llm.generate(asked, params, use_tqdm=False)
        stats = llm.stats()
        check_scheduler(llm.engine.scheduler)
    assert stats.free_blocks == stats.num_blocks
    return told(outputs), stats


@pytest.mark.parametrize(
    ("way", "tokens"), [*((way, 3) for way in WAYS), ("mixed", 1), ("cached", 10), ("chunked", 15)]
)
def test_the_answers_of_a_step_in_parts(tmp_path: Path, monkeypatch: Patch, way: str, tokens: int) -> None:
    options, asked, _ = WAYS[way]
    params = mixed_params(len(asked))
    whole, plain = run(tmp_path, options, asked, params)
    assert plain.steps_split == 0
    sizes = little_memory(monkeypatch, tokens)
    parts, stats = run(tmp_path, options, asked, params)
    assert parts == whole
    fits = options.get("max_num_batched_tokens", 2048) <= tokens
    assert (stats.steps_split > 0) == (not fits)
    assert max(sizes) <= tokens
    assert replace(stats, steps_split=0) == plain, "splitting a step must not change what the scheduler does"


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("error", SHORTAGES, ids=lambda error: type(error).__name__)
def test_greedy_tokens_of_steps_in_parts(
    tmp_path: Path, monkeypatch: Patch, caplog: pytest.LogCaptureFixture, overlap: bool, error: Exception
) -> None:
    little_memory(monkeypatch, 5, error)
    asked = prompts(9)
    with caplog.at_level(logging.WARNING), mock_llm(tmp_path, overlap=overlap) as llm:
        found = tokens_of(llm.generate(asked, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False))
        assert llm.stats().steps_split > 9
    assert found == [greedy(p, 12) for p in asked]
    assert len(caplog.messages) == 1, "it is said once"
    assert f"tokens in 9 rows ran out of memory and is run in parts: {type(error).__name__}" in caplog.messages[0]


def _in_logits(monkeypatch: Patch) -> None:
    """The output layer holds two rows, so three prompt log-probs do not fit."""
    compute = MockModel.compute_logits

    def small(self: MockModel, hidden: Any) -> Any:
        if len(hidden) > 2:
            raise fresh(SHORTAGES[0])
        return compute(self, hidden)

    monkeypatch.setattr(MockModel, "compute_logits", small)


def _in_every_third(owner: str, method: str, *, after: bool) -> Callable[[Patch], None]:
    """Every third call of a method of the runner's parts raises, before or after it has done its work."""

    def patch(monkeypatch: Patch) -> None:
        from nanoengine.core.execution import sampler, slots, step_inputs

        owners: dict[str, Any] = {
            "tables": slots.SlotTables,
            "buffers": step_inputs.StepBuffers,
            "sampler": sampler.Sampler,
        }
        original, calls = getattr(owners[owner], method), 0

        def failing(self: Any, *args: Any) -> Any:
            nonlocal calls
            calls += 1
            result = original(self, *args) if after or calls % 3 else None
            if calls % 3 == 0:
                raise fresh(SHORTAGES[0])
            return result

        monkeypatch.setattr(owners[owner], method, failing)

    return patch


FAULTS: dict[str, Callable[[Patch], None]] = {
    "logits": _in_logits,
    "before the plan's writes": _in_every_third("tables", "write", after=False),
    "after the plan's writes": _in_every_third("tables", "write", after=True),
    "before the writes are sent": _in_every_third("buffers", "send", after=False),
    "after the writes are sent": _in_every_third("buffers", "send", after=True),
    "after the gather": _in_every_third("buffers", "gather", after=True),
    "in the draw": _in_every_third("sampler", "sample", after=True),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wherever_memory_runs_out(tmp_path: Path, monkeypatch: Patch, fault: str) -> None:
    """Before any slot has moved: a launch may be repeated, its writes too."""
    asked = prompts(9, shortest=3, longest=20)
    params = mixed_params(9)
    options = {"max_num_batched_tokens": 32, "max_num_seqs": 6}
    whole, _ = run(tmp_path, options, asked, params)
    FAULTS[fault](monkeypatch)
    parts, stats = run(tmp_path, options, asked, params)
    assert parts == whole
    assert stats.steps_split > 3


@pytest.mark.parametrize("overlap", [True, False])
def test_memory_that_runs_out_while_slots_move(tmp_path: Path, monkeypatch: Patch, overlap: bool) -> None:
    """Too late to launch again: its requests are computed again one by one, and give the same tokens."""
    from nanoengine.kernels import step_inputs

    asked, params = prompts(6), seeded(6)
    whole, _ = run(tmp_path, {"overlap": overlap}, asked, params)
    original, calls = step_inputs.record, 0

    def failing(*args: Any) -> None:
        nonlocal calls
        calls += 1
        original(*args)
        if calls == 5:
            raise fresh(SHORTAGES[0])

    monkeypatch.setattr(step_inputs, "record", failing)
    again, stats = run(tmp_path, {"overlap": overlap}, asked, params)
    assert again == whole
    assert stats.preemptions >= 6
    assert stats.steps_split == 0


@pytest.mark.parametrize("overlap", [True, False])
def test_only_a_request_that_cannot_fit_fails(tmp_path: Path, monkeypatch: Patch, overlap: bool) -> None:
    """One token of it is too much, whatever else runs."""
    forward = MockModel.forward

    def short_of_memory(self: MockModel, input_ids: Any, positions: Any, batch: Any) -> Any:
        if (input_ids == POISON).any() or len(input_ids) > 4:
            raise fresh(SHORTAGES[0])
        return forward(self, input_ids, positions, batch)

    monkeypatch.setattr(MockModel, "forward", short_of_memory)
    asked = [p for p in prompts(40, seed=3, longest=14) if POISON not in [*p, *greedy(p, 12)]][:7]
    asked.insert(3, [1, 2, 3, POISON, 4, 5])
    with mock_llm(tmp_path, overlap=overlap) as llm:
        outputs = llm.generate(asked, SamplingParams(temperature=0, max_tokens=10), use_tqdm=False)
        failed = outputs.pop(3)
        assert tokens_of(outputs) == [greedy(p, 10) for i, p in enumerate(asked) if i != 3]
        stats = llm.stats()
        check_scheduler(llm.engine.scheduler)
    assert stats.free_blocks == stats.num_blocks
    assert failed.outputs == []
    assert failed.error is not None
    assert failed.error.code == "out_of_memory"
    for text in ("CUDA out of memory", "with a single token left of its step", "on a GPU also gpu_memory_utilization"):
        assert text in str(failed.error)


def test_the_error_of_a_failed_request_holds_no_tensors(tmp_path: Path, monkeypatch: Patch) -> None:
    """A client may keep its outputs; the memory that was too little must not stay with them."""
    import weakref

    held: list[weakref.ref[torch.Tensor]] = []

    def hungry(self: MockModel, input_ids: Any, positions: Any, batch: Any) -> Any:
        large = torch.zeros(1 << 10)
        held.append(weakref.ref(large))
        raise fresh(SHORTAGES[0])

    monkeypatch.setattr(MockModel, "forward", hungry)
    with mock_llm(tmp_path) as llm:
        (output,) = llm.generate([[1, 2, 3]], SamplingParams(temperature=0), use_tqdm=False)
    assert output.error is not None
    assert output.error.__cause__ is not None
    assert len(held) >= 2
    assert all(each() is None for each in held)


def test_steps_of_several_ranks_are_not_split(tmp_path: Path, monkeypatch: Patch) -> None:
    little_memory(monkeypatch, 2)
    with mock_llm(tmp_path) as llm:
        runner: Any = llm.engine._executor.runner  # type: ignore[attr-defined]
        assert runner.splits_steps
        runner.splits_steps = False
        one, two = llm.generate([[1, 2, 3, 4], [5]], SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
        assert llm.stats().steps_split == 0
    assert one.error is not None
    assert one.error.code == "out_of_memory"
    assert tokens_of([two]) == [greedy([5], 3)]


# -- a real model, in the float32 class -------------------------------------------------------------------------------


def test_a_real_model_in_parts(tmp_path: Path, monkeypatch: Patch) -> None:
    from nanoengine.plugins.models.llama import Llama

    folder = tiny_llama(tmp_path / "llama", std=0.2)
    options: dict[str, Any] = {"max_num_seqs": 8, "num_gpu_blocks_override": 256, "block_size": 4}
    asked = [[token % 90 + 1 for token in p] for p in prompts(8, shortest=5, longest=30, shared=6)]
    params = [
        SamplingParams(max_tokens=16, seed=i, ignore_eos=True, temperature=i % 2 * 0.8, logprobs=2, prompt_logprobs=1)
        for i in range(8)
    ]

    def generate() -> tuple[list[RequestOutput], EngineStats]:
        with LLM(folder, attention="torch", **options) as llm:
            outputs = llm.generate(asked, params, use_tqdm=False)
            return outputs, llm.stats()

    whole, plain = generate()
    forward = Llama.forward

    def small(self: Any, input_ids: Any, *args: Any) -> Any:
        if len(input_ids) > 7:
            raise fresh(SHORTAGES[2])
        return forward(self, input_ids, *args)

    monkeypatch.setattr(Llama, "forward", small)
    parts, stats = generate()
    assert plain.steps_split == 0
    assert stats.steps_split > 0
    assert stats.free_blocks == stats.num_blocks
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    report = compare(model, parts, params)
    assert report.positions == 8 * 16
    assert report.prompt_logprobs > 0
    assert assert_same_until_a_tie(model, parts, whole, params) > 0.9 * report.positions


# -- mutants: each must give other answers ----------------------------------------------------------------------------

_halves, _merged = split.halves, split.merged


def _forgets_admission(part: Part) -> tuple[Part, Part]:
    """The front brings no columns: every request of the step samples by the defaults."""
    front, rest = _halves(part)
    return Part(replace(front.plan, columns=()), front.first_row), rest


def _writes_twice(part: Part) -> tuple[Part, Part]:
    front, rest = _halves(part)
    return front, Part(replace(rest.plan, appends=part.plan.appends, new=part.plan.new), rest.first_row)


def _repeats_a_row(part: Part) -> tuple[Part, Part]:
    """The front's last row runs again behind, in place of the row that belongs there."""
    front, rest = _halves(part)
    slots = rest.plan.slots.copy()
    if len(slots) > 1:
        slots[-1] = front.plan.slots[-1]
    return front, Part(replace(rest.plan, slots=slots), rest.first_row)


def _swaps_results(plan: Any, results: Any) -> Any:
    result = _merged(plan, results)
    return replace(result, token_ids=result.token_ids[::-1].copy())


@pytest.mark.parametrize(
    ("name", "mutant"),
    [
        ("halves", _forgets_admission),
        ("halves", _writes_twice),
        ("halves", _repeats_a_row),
        ("merged", _swaps_results),
    ],
)
def test_mutants_are_caught(tmp_path: Path, monkeypatch: Patch, name: str, mutant: Any) -> None:
    """Whatever the mutant does, requests that end well end with other tokens than they should."""
    asked, params = prompts(12, shortest=2, longest=20), seeded(12)
    options = {"max_num_batched_tokens": 40}
    with mock_llm(tmp_path, **options) as llm:
        good = tokens_of(llm.generate(asked, params, use_tqdm=False))
    little_memory(monkeypatch, 8)
    monkeypatch.setattr(split, name, mutant)
    with mock_llm(tmp_path, **options) as llm:
        outputs = llm.generate(asked, params, use_tqdm=False)
        assert llm.stats().steps_split > 0
    well = [(o.outputs[0].token_ids, want) for o, want in zip(outputs, good, strict=True) if o.error is None]
    assert any(found != want for found, want in well)
