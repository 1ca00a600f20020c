"""Out of memory in a launch: the step is withdrawn, its rows run in smaller steps and give the very same answers; a
request that does not fit alone fails alone."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.compare import assert_same_until_a_tie, compare
from transformers import AutoModelForCausalLM

from nanoengine import LLM, RequestOutput, SamplingParams
from nanoengine.api.processors import Need
from nanoengine.api.stats import EngineStats
from nanoengine.core.execution import runner as runner_module
from nanoengine.core.execution.executor import InProcessExecutor
from nanoengine.core.execution.slots import SlotTables, VocabHistory
from nanoengine.core.scheduling.scheduler import Scheduler
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
def test_the_answers_of_smaller_steps(tmp_path: Path, monkeypatch: Patch, way: str, tokens: int) -> None:
    options, asked, _ = WAYS[way]
    params = mixed_params(len(asked))
    whole, plain = run(tmp_path, options, asked, params)
    assert plain.steps_withdrawn == 0
    sizes = little_memory(monkeypatch, tokens)
    again, stats = run(tmp_path, options, asked, params)
    assert again == whole
    fits = options.get("max_num_batched_tokens", 2048) <= tokens
    assert (stats.steps_withdrawn > 0) == (not fits)
    assert max(sizes) <= tokens
    assert stats.prompt_tokens == plain.prompt_tokens, "a prompt counts once"
    assert stats.steps_broken == 0
    if not plain.preemptions:
        assert stats.preemptions == stats.resumed_hit_tokens == 0


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("error", SHORTAGES, ids=lambda error: type(error).__name__)
def test_greedy_tokens_of_smaller_steps(
    tmp_path: Path, monkeypatch: Patch, caplog: pytest.LogCaptureFixture, overlap: bool, error: Exception
) -> None:
    little_memory(monkeypatch, 5, error)
    asked = prompts(9)
    with caplog.at_level(logging.WARNING), mock_llm(tmp_path, overlap=overlap) as llm:
        found = tokens_of(llm.generate(asked, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False))
        stats = llm.stats()
    assert stats.steps_withdrawn > 6
    assert stats.preemptions == 0
    assert found == [greedy(p, 12) for p in asked]
    assert len(caplog.messages) == 1, "it is logged once"
    assert caplog.messages[0].startswith(f"a step raised {type(error).__name__}: ")
    assert caplog.messages[0].endswith("; its requests run again in smaller steps")


@pytest.mark.parametrize("overlap", [True, False])
def test_a_decode_batch_that_does_not_fit(tmp_path: Path, monkeypatch: Patch, overlap: bool) -> None:
    """256 rows where memory holds 200: no request is preempted, and memory that is free again is used."""
    asked, count = prompts(256, shortest=2, longest=5), 24
    with mock_llm(tmp_path, max_num_seqs=256, overlap=overlap, num_gpu_blocks_override=8192) as llm:
        for i, prompt in enumerate(asked):
            llm.text_engine.add_request(
                str(i), prompt, SamplingParams(temperature=0, max_tokens=count), final_only=True
            )
        llm.text_engine.step()
        llm.text_engine.step()
        done = {}
        with pytest.MonkeyPatch.context() as patch:
            sizes = little_memory(patch, 200)
            while llm.engine.has_unfinished_requests():
                done |= {output.request_id: output for output in llm.text_engine.step()}
        stats = llm.stats()
        assert tokens_of([done[str(i)] for i in range(256)]) == [greedy(prompt, count) for prompt in asked]
        assert (stats.preemptions, stats.steps_broken) == (0, 0)
        assert 2 <= stats.steps_withdrawn <= 12
        assert max(sizes) == 128
        sizes = little_memory(monkeypatch, 1 << 30)
        tokens = SamplingParams(temperature=0, max_tokens=44)
        assert tokens_of(llm.generate(asked, tokens, use_tqdm=False)) == [greedy(prompt, 44) for prompt in asked]
        assert llm.stats().steps_withdrawn == stats.steps_withdrawn
        assert sizes.count(256) > 20


def _in_logits(monkeypatch: Patch) -> None:
    """The output layer holds two rows, so three prompt log-probs do not fit."""
    compute = MockModel.compute_logits

    def small(self: MockModel, hidden: Any) -> Any:
        if len(hidden) > 2:
            raise fresh(SHORTAGES[0])
        return compute(self, hidden)

    monkeypatch.setattr(MockModel, "compute_logits", small)


def _in_every_third(owner: str, method: str, *, after: bool, every: int = 3) -> Callable[[Patch], None]:
    """Every third call of a method of the runner's parts raises, before or after it has done its work."""

    def patch(monkeypatch: Patch) -> None:
        from nanoengine import kernels
        from nanoengine.core.execution import sampler, slots, step_inputs

        owners: dict[str, Any] = {
            "tables": slots.SlotTables,
            "history": slots.VocabHistory,
            "buffers": step_inputs.StepBuffers,
            "sampler": sampler.Sampler,
            "kernels": kernels.step_inputs,
        }
        original, calls = getattr(owners[owner], method), 0

        def failing(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            result = original(*args, **kwargs) if after or calls % every else None
            if calls % every == 0:
                raise fresh(SHORTAGES[0])
            return result

        monkeypatch.setattr(owners[owner], method, failing)

    return patch


FAULTS: dict[str, Callable[[Patch], None]] = {
    "logits": _in_logits,
    "before the plan's writes": _in_every_third("tables", "write", after=False),
    "after a slot's admission": _in_every_third("tables", "_admit", after=True),
    "after a slot's column": _in_every_third("tables", "_set_column", after=True, every=11),
    "after a slot's counts": _in_every_third("history", "enter", after=True),
    "after the plan's writes": _in_every_third("tables", "write", after=True),
    "before the writes are sent": _in_every_third("buffers", "send", after=False),
    "after the writes are sent": _in_every_third("buffers", "send", after=True),
    "after the gather": _in_every_third("buffers", "gather", after=True),
    "in the draw": _in_every_third("sampler", "sample", after=True),
    "before the tokens are written": _in_every_third("kernels", "settle", after=False),
    "after the tokens are written": _in_every_third("kernels", "settle", after=True),
}


NINE: dict[str, Any] = {"asked": prompts(9, shortest=3, longest=20), "params": mixed_params(9)}
LITTLE = {"max_num_batched_tokens": 32, "max_num_seqs": 6}


@pytest.fixture(scope="module")
def answers_of_nine(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """With enough memory."""
    return run(tmp_path_factory.mktemp("whole"), LITTLE, **NINE)[0]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_wherever_memory_runs_out(
    tmp_path: Path, monkeypatch: Patch, answers_of_nine: list[Any], fault: str, overlap: bool
) -> None:
    """Whatever the slots hold then: they are written anew, counts of tokens too."""
    FAULTS[fault](monkeypatch)
    again, stats = run(tmp_path, LITTLE | {"overlap": overlap}, **NINE)
    assert again == answers_of_nine
    assert stats.steps_withdrawn > 1
    assert stats.preemptions == stats.steps_broken == 0


@pytest.mark.parametrize("overlap", [True, False])
def test_host_processors_samples_and_aborts_in_smaller_steps(tmp_path: Path, monkeypatch: Patch, overlap: bool) -> None:
    """Columns that Python computes from each token, several samples of a prompt, and a request that is aborted."""
    plugin = Path(__file__).parent / "processors_plugin.py"
    asked = prompts(6, shortest=9, longest=20)
    params = [
        SamplingParams(
            max_tokens=14, seed=i, temperature=i % 2 * 0.9, n=1 + i % 3, **({"forbid_last": 3} if i % 2 else {})
        )
        for i in range(6)
    ]

    def answers(limit: int) -> tuple[list[Any], EngineStats]:
        with pytest.MonkeyPatch.context() as patch, mock_llm(tmp_path, plugins=[plugin], overlap=overlap) as llm:
            little_memory(patch, limit)
            for i, (prompt, each) in enumerate(zip(asked, params, strict=True)):
                llm.text_engine.add_request(f"gone {i}", prompt, each)
            for _ in range(4):
                llm.text_engine.step()
            for i in range(6):
                llm.engine.abort_request(f"gone {i}")
            outputs = llm.generate(asked, params, use_tqdm=False)
            check_scheduler(llm.engine.scheduler)
            return told(outputs), llm.stats()

    whole, plenty = answers(1 << 30)
    again, stats = answers(6)
    assert again == whole
    assert (plenty.steps_withdrawn, stats.preemptions) == (0, 0)
    assert stats.steps_withdrawn > 4
    assert stats.free_blocks == stats.num_blocks


def test_memory_that_runs_out_while_counts_are_made(tmp_path: Path) -> None:
    """A table over the vocabulary that could not be filled is made again; it is not used as it is."""
    with mock_llm(tmp_path) as llm:
        llm.text_engine.add_request("0", [3, 3, 5], SamplingParams(temperature=0, max_tokens=9))
        for _ in range(4):
            llm.text_engine.step()
        tables: SlotTables = llm.engine._executor.runner.tables  # type: ignore[attr-defined]
        for need, counted in ((Need.PROMPT_MASK, [3, 5]), (Need.OUTPUT_COUNTS, greedy([3, 3, 5], 4))):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.Tensor, "scatter_add_", lambda *_: (_ for _ in ()).throw(MemoryError("none left")))
                with pytest.raises(MemoryError):
                    tables.history(need)
            (slot,) = tables.num_tokens.nonzero().flatten().tolist()
            assert {*counted} <= {*tables.history(need)[slot].nonzero().flatten().tolist()}


def test_the_step_behind_one_that_failed_does_not_run(tmp_path: Path, monkeypatch: Patch) -> None:
    """Its slot was an earlier request's, and the failed step has not said whose it is now: the blocks that are written
    down there belong to others."""
    long, short, third = prompts(3, shortest=38, longest=40, seed=5)
    asked = [long, short[:8], third]  # the token behind the short one is where its blocks end
    ones = SamplingParams(temperature=0, max_tokens=1)
    with mock_llm(tmp_path, max_num_seqs=1, spare_slots=0, max_num_batched_tokens=16) as llm:
        assert tokens_of(llm.generate(asked[:2], ones, use_tqdm=False)) == [greedy(p, 1) for p in asked[:2]]
        admit, failed = SlotTables._admit, []

        def failing(self: SlotTables, new: Any) -> None:
            if not failed:
                failed.append(new)
                raise fresh(SHORTAGES[1])
            admit(self, new)

        monkeypatch.setattr(SlotTables, "_admit", failing)
        assert tokens_of(llm.generate(asked[2:], ones, use_tqdm=False)) == [greedy(third, 1)]
        assert failed
        assert tokens_of(llm.generate([long], ones, use_tqdm=False)) == [greedy(long, 1)]
        stats = llm.stats()
    assert stats.prefix_hit_tokens >= 36
    assert stats.steps_withdrawn == 2


def test_what_fails_otherwise_runs_nothing_behind_it(tmp_path: Path, monkeypatch: Patch) -> None:
    """Of any error. A step that is launched once the failure is known runs."""
    ran, launch = [], InProcessExecutor.launch
    forward = MockModel.forward

    def failing(self: MockModel, input_ids: Any, *args: Any) -> Any:
        ran.append(len(input_ids))
        if len(ran) == 3:
            raise KeyError("odd")
        return forward(self, input_ids, *args)

    launched: list[int] = []

    def recorded(self: InProcessExecutor, plan: Any) -> Any:
        launched.append(plan.num_tokens)
        return launch(self, plan)

    with mock_llm(tmp_path) as llm:
        monkeypatch.setattr(MockModel, "forward", failing)
        monkeypatch.setattr(InProcessExecutor, "launch", recorded)
        asked = prompts(3)
        found = llm.generate(asked, SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)
    assert tokens_of(found) == [greedy(prompt, 6) for prompt in asked]
    assert len(ran) == len(launched) - 1


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
    assert stats.preemptions == 0
    assert failed.outputs == []
    assert failed.error is not None
    assert failed.error.code == "out_of_memory"
    for text in ("CUDA out of memory", "in a step of a single token", "on a GPU also gpu_memory_utilization"):
        assert text in str(failed.error)


def test_the_error_of_a_failed_request_holds_no_tensors(tmp_path: Path, monkeypatch: Patch) -> None:
    """A client may keep its outputs; the memory that was too little must not stay with them."""
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


@pytest.mark.parametrize("overlap", [True, False])
def test_the_allocator_gives_back_what_a_failed_step_held(tmp_path: Path, monkeypatch: Patch, overlap: bool) -> None:
    """Before the next launch, once no traceback holds the step's tensors; and only then."""
    held: list[weakref.ref[torch.Tensor]] = []
    emptied: list[int] = []
    forward = MockModel.forward

    def hungry(self: MockModel, input_ids: Any, positions: Any, batch: Any) -> Any:
        large = torch.zeros(1 << 10)
        if len(input_ids) > 4:
            held.append(weakref.ref(large))
            raise fresh(SHORTAGES[0])
        return forward(self, input_ids, positions, batch)

    def empty_cache(device: torch.device) -> None:
        assert all(tensor() is None for tensor in held)
        emptied.append(len(held))

    monkeypatch.setattr(MockModel, "forward", hungry)
    with mock_llm(tmp_path, overlap=overlap) as llm:
        monkeypatch.setattr(runner_module, "empty_cache", empty_cache)
        asked = prompts(3)
        found = llm.generate(asked, SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)
    assert tokens_of(found) == [greedy(prompt, 6) for prompt in asked]
    assert emptied == [*range(1, len(held) + 1)]
    assert len(held) > 2


# -- a real model, in the float32 class -------------------------------------------------------------------------------


def test_a_real_model_in_smaller_steps(tmp_path: Path, monkeypatch: Patch) -> None:
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
    again, stats = generate()
    assert plain.steps_withdrawn == 0
    assert stats.steps_withdrawn > 0
    assert stats.preemptions == 0
    assert stats.free_blocks == stats.num_blocks
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    report = compare(model, again, params)
    assert report.positions == 8 * 16
    assert report.prompt_logprobs > 0
    assert assert_same_until_a_tie(model, again, whole, params) > 0.9 * report.positions


# -- mutants: each must give other answers ----------------------------------------------------------------------------


def _forgets_to_send(monkeypatch: Patch) -> None:
    withdraw = Scheduler.withdraw

    def broken(self: Scheduler, steps: Any) -> Any:
        failed = withdraw(self, steps)
        self._roster.unsent.clear()
        return failed

    monkeypatch.setattr(Scheduler, "withdraw", broken)


def _counts_double(monkeypatch: Patch) -> None:
    """The tables of counts go on from what the failed step has left."""
    monkeypatch.setattr(VocabHistory, "enter", lambda self, new: None)


@pytest.mark.parametrize(
    ("fault", "mutant"),
    [
        ("after the plan's writes", _forgets_to_send),
        ("after the tokens are written", _forgets_to_send),
        ("after the tokens are written", _counts_double),
    ],
)
def test_mutants_are_caught(tmp_path: Path, monkeypatch: Patch, fault: str, mutant: Callable[[Patch], None]) -> None:
    asked, params = prompts(12, shortest=2, longest=20), seeded(12)
    options = {"max_num_batched_tokens": 40, "max_num_seqs": 6}
    with mock_llm(tmp_path, **options) as llm:
        good = tokens_of(llm.generate(asked, params, use_tqdm=False))
    FAULTS[fault](monkeypatch)
    mutant(monkeypatch)
    with mock_llm(tmp_path, **options) as llm:
        outputs = llm.generate(asked, params, use_tqdm=False)
        assert llm.stats().steps_withdrawn > 0
    assert any(o.error or o.outputs[0].token_ids != want for o, want in zip(outputs, good, strict=True))
