"""Too little memory at the start: smaller batches, or an error with figures; and what is measured for it."""

from __future__ import annotations

import gc
import logging
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanoengine import LLM, SamplingParams
from nanoengine.api.errors import ConfigError, DeviceMemoryError
from nanoengine.api.layers import WeightLayer
from nanoengine.core.execution.graphs import CaptureSizes, StepGraphs
from nanoengine.core.execution.slots import SlotTables
from nanoengine.core.execution.step_inputs import StepBuffers, StepSize
from nanoengine.core.step import num_slots
from nanoengine.kernels import sampling
from nanoengine.setup.start import build_model, capture, memory, starter
from nanoengine.setup.start.largest_steps import largest_steps
from nanoengine.setup.start.memory import GpuShare
from nanoengine.setup.start.shortage import StepTooLarge
from nanoengine.testing.checkpoints import tiny_llama
from nanoengine.testing.mock_model import MockAttention, MockModel

from .support import VOCAB, greedy, mock_llm, prompts, tokens_of

GREEDY = SamplingParams(temperature=0, max_tokens=10)
GIB = 1 << 30
OutOfMemory = torch.OutOfMemoryError


def the_runner(llm: LLM) -> Any:
    return llm.engine._executor.runner  # type: ignore[attr-defined]


def run_largest(llm: LLM, *, draws: bool, max_logprobs: int = 20, drafts: int = 0) -> list[int]:
    """The steps that size a GPU's cache; returns their tokens. They leave nothing behind."""
    its, sizes = the_runner(llm), []

    def launch(plan: Any) -> Any:
        sizes.append(plan.num_tokens)
        return its.launch(plan)

    limits, given = its.buffers.limits, {"draws": draws, "max_logprobs": max_logprobs, "drafts": drafts}
    for run in largest_steps(launch, its.tables, its.sampler, limits, **given):
        run()
    tables = its.tables
    assert int(tables.num_tokens.abs().sum()) == int(tables.num_computed.abs().sum()) == 0
    assert (tables.host_num_logprobs == -1).all()
    assert bool(tables.greedy.all())
    assert not tables.host_asks.any()
    assert not tables.vocab_history.tables
    return sizes


@pytest.mark.parametrize("error", [None, MemoryError("none left"), RuntimeError("DefaultAllocator: out of memory")])
def test_a_kv_cache_that_cannot_be_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    released: list[Any] = []
    models: list[weakref.ref[MockModel]] = []
    build = MockModel.__init__

    def init(self: MockModel, *args: Any) -> None:
        build(self, *args)
        models.append(weakref.ref(self))

    def allocate(self: MockAttention, num_layers: int, num_blocks: int) -> None:
        assert error is not None
        raise type(error)(*error.args)  # a fresh one: a traceback keeps frames alive

    monkeypatch.setattr(MockModel, "__init__", init)
    monkeypatch.setattr(MockAttention, "release", lambda self: released.append(self))
    if error is not None:
        monkeypatch.setattr(MockAttention, "allocate", allocate)
    blocks, size = (2 * 10**9, 4096) if error is None else (100, 4)  # 60 TiB
    message = rf"KV cache of {blocks:,} blocks of {size} tokens.*lower engine\.num"
    with pytest.raises(ConfigError, match=message) as caught:
        mock_llm(tmp_path, num_gpu_blocks_override=blocks, block_size=size)
    assert f"{(blocks + 1) * size * 2 * 4:,} bytes" in str(caught.value)
    assert [type(each).__name__ for each in released] == ["MockAttention"]
    del caught
    gc.collect()
    assert models
    assert all(model() is None for model in models), "the model outlives the failed start"


def test_a_model_of_one_position(tmp_path: Path) -> None:
    """No room for output: each request gets this error; the largest steps, which size a GPU's cache, still run."""
    with mock_llm(tmp_path, max_model_len=1) as llm:
        (output,) = llm.generate([[5]], SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
        assert output.error is not None
        run_largest(llm, draws=False)
    with mock_llm(tmp_path, max_model_len=2) as llm:
        assert tokens_of(llm.generate([[5]], SamplingParams(temperature=0), use_tqdm=False)) == [greedy([5], 1)]


# -- what is measured --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draws", "asked_for", "measured", "drafts"),
    [(True, 20, 20, 0), (False, 40, 40, 0), (False, -1, VOCAB, 0), (True, 20, 20, 4), (False, 20, 20, 99)],
)
def test_the_largest_steps_fill_the_limits_and_leave_nothing_behind(
    tmp_path: Path, draws: bool, asked_for: int, measured: int, drafts: int
) -> None:
    """As many log-probs as a request may ask for: of every row and draft, and of a prompt; and histories. A plugin's
    processor that would raise is not called."""
    plugin = Path(__file__).parent / "processors_plugin.py"
    with mock_llm(tmp_path, plugins=[plugin], max_num_batched_tokens=700, max_num_seqs=8) as llm:
        seen: list[tuple[int, int]] = []
        original = sampling.token_logprobs

        def logprobs(raw: Any, token_ids: Any, k: int) -> Any:
            tables = the_runner(llm).tables
            seen.append((len(raw), k))
            assert len(raw) == 128 or tables.vocab_history.tables
            return original(raw, token_ids, k)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampling, "token_logprobs", logprobs)
            sizes = run_largest(llm, draws=draws, max_logprobs=asked_for, drafts=drafts)
        drawn = {0: 8, 4: 40, 99: 700}[drafts]  # of 8 rows, within the budget of 700 tokens
        assert sizes == [511, 511, drawn]
        assert seen == [(128, measured), (drawn, measured)]
        asked = prompts(6)
        assert tokens_of(llm.generate(asked, GREEDY, use_tqdm=False)) == [greedy(p, 10) for p in asked]


def test_a_prefill_of_the_same_rows_does_not_hide_what_the_largest_draw_asks_for(tmp_path: Path) -> None:
    """How rows are drawn is kept between steps of the same rows: not here, where they ask for more."""
    with mock_llm(tmp_path, max_num_seqs=1) as llm, pytest.MonkeyPatch.context() as patch:
        seen, original = list[int](), sampling.token_logprobs
        patch.setattr(sampling, "token_logprobs", lambda raw, *rest: (seen.append(len(raw)), original(raw, *rest))[1])
        run_largest(llm, draws=True, max_logprobs=5)
        assert seen == [128, 1]  # of the prompt, and of the draw
        seen.clear()
        assert tokens_of(llm.generate(prompts(2), GREEDY, use_tqdm=False)) == [greedy(p, 10) for p in prompts(2)]
        assert not seen


def fake_gpu(monkeypatch: pytest.MonkeyPatch, free: list[float], total: float = 80) -> torch.device:
    """`mem_get_info` answers with the next of `free`, in GiB."""
    left = iter(free)
    monkeypatch.setattr(memory, "empty_cache", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(next(left) * GIB), int(total * GIB)))
    return torch.device("cuda")


def test_an_engine_may_take_its_share_whatever_others_hold(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    share = GpuShare.at_start(fake_gpu(monkeypatch, [40, 30]), 0.25)  # another engine holds half of it
    assert share.limit == 20 * GIB
    assert share.kv_budget(1 << 20, step=2 * GIB, graphs=GIB) == 7 * GIB  # 20 less 10 taken, 2 and 1
    assert not caplog.messages


def test_where_less_is_free_it_takes_what_is_free_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    share = GpuShare.at_start(fake_gpu(monkeypatch, [8, 6]), 0.9)
    assert share.limit == 8 * GIB - memory.SPARE_BYTES
    assert share.kv_budget(1 << 20, step=GIB, graphs=0) == int(4.5 * GIB)
    (message,) = caplog.messages
    assert "8.00 GiB free of 80.00 GiB" in message
    assert "gpu_memory_utilization=0.9 is 72.00 GiB: this engine uses at most 7.50 GiB" in message


def test_no_room_for_a_block_is_an_error_with_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    share = GpuShare.at_start(fake_gpu(monkeypatch, [8, 6, 0.4]), 0.05)
    with pytest.raises(StepTooLarge, match=r"largest step 3\.00 GiB"):
        share.kv_budget(1 << 20, step=3 * GIB, graphs=0)
    with pytest.raises(DeviceMemoryError) as caught:
        share.kv_budget(1 << 20, step=0, graphs=0)
    assert type(caught.value) is DeviceMemoryError, "a smaller step would not help"
    for text in ("80.00 GiB, 8.00 GiB were free", "this engine may use 4.00 GiB", "take 7.60 GiB", "raise engine.gpu"):
        assert text in str(caught.value)


# -- smaller batches ---------------------------------------------------------------------------------------------------


def assert_serves(llm: LLM, tokens: int, seqs: int) -> None:
    """Report, scheduler, tables and buffers have these limits, and requests get their tokens."""
    report, config, its = llm.memory_report, llm.engine.scheduler.config, the_runner(llm)
    assert (report.max_num_batched_tokens, report.max_num_seqs) == (tokens, seqs)
    assert (config.max_num_batched_tokens, config.max_num_seqs) == (tokens, seqs)
    assert its.buffers.limits.max_tokens == tokens
    assert its.tables.limits.max_slots == num_slots(seqs, 8)
    asked = prompts(9, shortest=200, longest=300)
    assert tokens_of(llm.generate(asked, GREEDY, use_tqdm=False)) == [greedy(p, 10) for p in asked]
    assert llm.stats().chunks > 0


def failing_init(monkeypatch: pytest.MonkeyPatch, owner: Any, too_large: Any) -> list[weakref.ref[Any]]:
    """`owner(limits, ...)` runs out of memory where `too_large(limits)`; returns those that were made."""
    original, made = owner.__init__, []

    def init(self: Any, limits: Any, *args: Any, **more: Any) -> None:
        if too_large(limits):
            raise OutOfMemory("CUDA out of memory. Tried to allocate 2.00 GiB")
        original(self, limits, *args, **more)
        made.append(weakref.ref(self))

    monkeypatch.setattr(owner, "__init__", init)
    return made


def test_fewer_tokens_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    failing_init(monkeypatch, StepBuffers, lambda limits: limits.max_tokens > 600)
    tables = failing_init(monkeypatch, SlotTables, lambda limits: False)
    with mock_llm(tmp_path, max_num_batched_tokens=4000) as llm:
        assert_serves(llm, 500, 32)
        gc.collect()
        assert [t() is not None for t in tables] == [False, False, False, True], "what a failed attempt made is kept"
    (message,) = caplog.messages
    assert "memory is too small for max_num_batched_tokens=4000, max_num_seqs=32" in message
    assert "running with max_num_batched_tokens=500, max_num_seqs=32 (OutOfMemoryError: CUDA out of" in message


def test_then_fewer_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    failing_init(monkeypatch, SlotTables, lambda limits: limits.max_slots > num_slots(5, 8))
    with mock_llm(tmp_path, max_num_batched_tokens=300) as llm:
        assert_serves(llm, 256, 4)
    assert len(caplog.messages) == 1


def test_a_kv_cache_that_is_sized_by_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no size is given, what cannot be allocated is tried smaller."""
    allocate, sizes = MockAttention.allocate, []

    def small(self: MockAttention, num_layers: int, num_blocks: int) -> None:
        sizes.append(num_blocks)
        if num_blocks > 1100:
            raise MemoryError("none left")
        allocate(self, num_layers, num_blocks)

    monkeypatch.setattr(MockAttention, "allocate", small)
    with mock_llm(tmp_path, num_gpu_blocks_override=None, max_num_batched_tokens=256) as llm:
        assert_serves(llm, 256, 8)
    assert sizes == [32 * 128 + 1, 16 * 128 + 1, 8 * 128 + 1]


def test_nothing_left_to_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models: list[weakref.ref[MockModel]] = []
    build = MockModel.__init__

    def init(self: MockModel, *args: Any) -> None:
        build(self, *args)
        models.append(weakref.ref(self))

    monkeypatch.setattr(MockModel, "__init__", init)
    failing_init(monkeypatch, SlotTables, lambda limits: True)
    with pytest.raises(DeviceMemoryError) as caught:
        mock_llm(tmp_path)
    for text in ("max_num_batched_tokens=256, max_num_seqs=1", "on cpu", "lower engine.max_model_len", "2.00 GiB"):
        assert text in str(caught.value)
    gc.collect()
    assert len(models) >= 2
    assert all(model() is None for model in models), "the error keeps the model alive"


def test_weights_that_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One error with figures, and nothing stays allocated, though the error is kept."""
    from nanoengine.plugins.models.llama import Llama

    parameters: list[weakref.ref[torch.Tensor]] = []
    sizes: list[int] = []

    def load(model: Llama, *args: Any) -> None:
        parameters.extend(weakref.ref(p) for p in model.parameters())
        sizes.append(sum(p.numel() * p.element_size() for p in model.parameters()))
        raise OutOfMemory("CUDA out of memory")

    monkeypatch.setattr(starter, "load_weights", load)
    monkeypatch.setattr(memory, "gib", lambda num_bytes: f"<{num_bytes}>")
    with pytest.raises(DeviceMemoryError) as caught:
        LLM(tiny_llama(tmp_path / "llama"))
    assert f"the model's weights take <{sizes[0]}> and do not fit: <" in str(caught.value)
    assert "are free on cpu; take a smaller model or dtype" in str(caught.value)
    assert parameters
    assert all(each() is None for each in parameters)


def test_a_model_that_runs_out_while_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoengine.plugins.models.llama import Llama

    build = Llama.__init__

    def init(self: Llama, config: Any, ctx: Any) -> None:
        build(self, config, ctx)
        if ctx.device.type != "meta":
            raise OutOfMemory("CUDA out of memory")

    monkeypatch.setattr(Llama, "__init__", init)
    with pytest.raises(DeviceMemoryError, match=r"the model's weights take \d.*CUDA out of memory"):
        LLM(tiny_llama(tmp_path / "llama"))


@pytest.mark.parametrize("mutant", [False, True])
def test_weights_of_layers_before_the_one_without_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: bool
) -> None:
    """The kept error's traceback has a generator expression of the model, which refers to it."""
    made: list[weakref.ref[WeightLayer]] = []
    add = WeightLayer.add_weight

    def add_some(self: WeightLayer, *args: Any, **more: Any) -> None:
        add(self, *args, **more)
        if self._device.type != "meta":
            made.append(weakref.ref(self))
            if len(made) == 9:
                raise OutOfMemory("CUDA out of memory")

    monkeypatch.setattr(WeightLayer, "add_weight", add_some)
    if mutant:
        monkeypatch.setattr(build_model, "weights_freed_on_error", lambda modules: nullcontext())
    with pytest.raises(DeviceMemoryError, match="CUDA out of memory") as caught:
        LLM(tiny_llama(tmp_path / "llama"))
    gc.collect()
    left = sum(p.numel() for each in made if (layer := each()) is not None for p in layer.parameters())
    assert (left > 0) == mutant
    assert caught.value.__cause__ is not None


def test_close_gives_everything_back(tmp_path: Path) -> None:
    llm = LLM(tiny_llama(tmp_path / "llama"), max_num_seqs=4, num_gpu_blocks_override=64)
    llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, presence_penalty=0.5, logprobs=1), use_tqdm=False)
    its = the_runner(llm)
    held = [weakref.ref(t) for t in (*its.model.parameters(), its.tables.token_ids, its.buffers.out.input_ids)]
    held += [weakref.ref(t) for backend in its.backends for t in vars(backend).values() if isinstance(t, torch.Tensor)]
    assert len(held) > 10
    del its
    llm.close()
    gc.collect()
    assert all(each() is None for each in held)


# -- graphs, on a seam of stubs ----------------------------------------------------------------------------------------


class EagerGraph:
    """Stands for a CUDA graph on a CPU: a replay runs the captured pass, over the static buffers, into its logits."""

    def __init__(self, run: Any) -> None:
        self.run, self.logits = run, run()

    def replay(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            self.logits.copy_(self.run())


def eager_graph(run: Any, *_: Any) -> tuple[Any, torch.Tensor]:
    graph = EagerGraph(run)
    return graph, graph.logits


def capturing(monkeypatch: pytest.MonkeyPatch, captured: Any) -> None:
    """Decode graphs on a CPU, each made by `captured(run, ...)`."""

    def sizes(options: Any, *args: Any, **more: Any) -> CaptureSizes:
        return CaptureSizes() if options.enforce_eager else CaptureSizes(tuple(map(StepSize, (1, 2, 4, 8, 16))))

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(starter, "capture_sizes", sizes)
    monkeypatch.setattr(capture, "captured", captured)


def test_graphs_give_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    capturing(monkeypatch, eager_graph)
    asked = prompts(11)
    with mock_llm(tmp_path) as llm:
        assert tokens_of(llm.generate(asked, GREEDY, use_tqdm=False)) == [greedy(p, 10) for p in asked]
        assert llm.stats().graph_steps > 5
        assert llm.memory_report.eager_reason == ""


@pytest.mark.parametrize("lazy", [True, False])
def test_graphs_are_captured_when_a_step_first_wants_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lazy: bool
) -> None:
    made: list[int] = []

    def captured(run: Any, *_: Any) -> Any:
        made.append(run.args[0].decode_rows)
        return eager_graph(run)

    capturing(monkeypatch, captured)
    ahead = list[Any]()  # runs whose kernels are compiled
    monkeypatch.setattr(capture._Capture, "compile_ahead", lambda self, run, *_: ahead.append(run))
    with mock_llm(tmp_path, lazy_graphs=lazy) as llm:
        assert made == ([1] if lazy else [16, 8, 4, 2, 1])
        assert len(ahead) == 1
        for count in (3, 4, 2):
            asked = prompts(count)
            assert tokens_of(llm.generate(asked, GREEDY, use_tqdm=False)) == [greedy(p, 10) for p in asked]
        assert made == ([1, 4, 2] if lazy else [16, 8, 4, 2, 1])
        assert [run.args for run in ahead[1:]] == ([([StepSize(4)], ()), ([StepSize(2)], ())] if lazy else [])
        assert llm.stats().graph_steps > 20


@pytest.mark.parametrize(("lazy", "fails"), [(True, False), (True, True), (False, False)])
def test_graphs_that_no_step_wanted_are_captured_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lazy: bool, fails: bool
) -> None:
    """As a server does while it has no request; until none is left, or one fails."""
    made = list[int]()

    def captured(run: Any, *_: Any) -> Any:
        made.append(run.args[0].decode_rows)
        if broken and made[-1] == 16:
            raise RuntimeError("not in a capture")
        return eager_graph(run)

    capturing(monkeypatch, captured)
    broken = False
    with mock_llm(tmp_path, lazy_graphs=lazy) as llm:

        def more() -> list[bool]:
            return llm._built.executor.call("nanoengine.setup.start.capture:capture_next")

        if not lazy:
            assert more() == [False]
            return
        asked = prompts(3)
        assert tokens_of(llm.generate(asked, GREEDY, use_tqdm=False)) == [greedy(p, 10) for p in asked]
        assert made == [1, 4]
        assert [more(), more()] == [[True], [True]]
        broken = fails
        assert [more(), more()] == [[not fails], [False]]
        assert made == [1, 4, 2, 8, 16, *[16] * fails]  # what fails is tried twice
        asked = prompts(9)
        assert tokens_of(llm.generate(asked, GREEDY, use_tqdm=False)) == [greedy(p, 10) for p in asked]
        assert made == [1, 4, 2, 8, 16, *[16] * fails]


@pytest.mark.parametrize("started", [True, False])
def test_a_start_that_compiles_kernels_compiles_those_of_later_steps_too(
    monkeypatch: pytest.MonkeyPatch, started: bool
) -> None:
    """Else the request that first wants such a step waits until they are compiled."""
    sizes, made = (StepSize(64, 128), *map(StepSize, (16, 8, 4, 2, 1))), object.__new__(capture._Capture)
    made.sizes, made.device, ran = list(sizes), torch.device("cpu"), list[StepSize]()
    monkeypatch.setattr(capture._Capture, "run_once", lambda self, sizes: ran.extend(sizes))
    monkeypatch.setattr(capture._Capture, "compile_ahead", lambda self, run, *_: run())
    processes: Any = SimpleNamespace(are_started=started)
    capture._compile_ahead(made, processes, later=True)
    first = [sizes[0], sizes[1], sizes[-1]]
    assert ran == first + (list(sizes[2:-1]) if started else [])


@pytest.mark.parametrize("fault", ["memory", "memory of the run before it", "other"])
def test_a_capture_that_fails_in_a_step_leaves_only_its_size_eager_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    tried, broken, pools = list[int](), [True], list[object]()

    def captured(run: Any, *_: Any) -> Any:
        tried.append(run.args[0].decode_rows)
        if broken and tried[-1] == 4:
            raise OutOfMemory("CUDA out of memory") if fault == "memory" else RuntimeError("not in a capture")
        return eager_graph(run)

    def run_out(self: StepGraphs, size: StepSize) -> Any:
        if broken and size.decode_rows == 4 and fault == "memory of the run before it":
            raise OutOfMemory("CUDA out of memory")
        return run(self, size)

    capturing(monkeypatch, captured)
    run = StepGraphs.run
    monkeypatch.setattr(StepGraphs, "run", run_out)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: pools.append(object()))
    monkeypatch.setattr(capture._Attempts, "FIRST", 8)
    with caplog.at_level(logging.WARNING), mock_llm(tmp_path, lazy_graphs=True) as llm:

        def replayed(count: int) -> int:
            asked, before = prompts(count), llm.stats()
            assert tokens_of(llm.generate(asked, GREEDY, use_tqdm=False)) == [greedy(p, 10) for p in asked]
            now = llm.stats()
            assert now.graph_steps - before.graph_steps + now.uncaptured_steps - before.uncaptured_steps >= 9
            return now.graph_steps - before.graph_steps

        assert replayed(2) >= 9
        assert replayed(3) == 0
        assert tried.count(4) == (2 if fault != "memory of the run before it" else 1)
        assert replayed(2) >= 9
        assert tried.count(2) == (1 if fault == "other" else 2), "graphs whose memory was given back are made again"
        assert len(pools) == (1 if fault == "other" else 2)
        before = tried.count(4)
        for _ in range(2):  # with those above some 30 steps that want it
            assert replayed(3) == 0
        assert tried.count(4) == 2 * before
        broken.clear()
        while not replayed(3):
            assert tried.count(4) == 2 * before
        assert tried.count(4) == 2 * before + 1
        assert replayed(2) >= 9
        stats = llm.stats()
        assert 40 < stats.uncaptured_steps < 80
        assert stats.steps_broken == stats.steps_withdrawn == stats.preemptions == 0
    (message,) = caplog.messages
    assert message.startswith("no CUDA graph of StepSize(decode_rows=4")
    assert ("OutOfMemoryError" if fault != "other" else "RuntimeError: not in a capture") in message


def test_no_pool_is_used_again_whose_graphs_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not one in which only captures failed: torch raises an internal error, and a later capture cannot begin."""
    tried, pools = list[int](), list[list[Any]]()  # of each pool references to its graphs

    def captured(run: Any, pool: list[Any], *_: Any) -> Any:
        assert not pool or any(graph() is not None for graph in pool)
        tried.append(run.args[0].decode_rows)
        if tried[-1] == 4 and len(tried) < 8:
            pool.append(lambda: None)
            raise OutOfMemory("CUDA out of memory")
        graph, logits = eager_graph(run)
        pool.append(weakref.ref(graph))
        return graph, logits

    def new_pool() -> list[Any]:
        pools.append([])
        return pools[-1]

    capturing(monkeypatch, captured)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", new_pool)
    monkeypatch.setattr(capture._Attempts, "FIRST", 2)
    with mock_llm(tmp_path, lazy_graphs=True) as llm:
        asked = prompts(3)
        for _ in range(6):
            assert tokens_of(llm.generate(asked, GREEDY, use_tqdm=False)) == [greedy(p, 10) for p in asked]
        assert llm.stats().graph_steps >= 9
    assert tried == [1, *[4] * 7]
    assert len(pools) == 6  # of the first and the two tries behind it one


def test_a_failed_capture_is_said_once_and_every_step_is_eager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def captured(run: Any, *_: Any) -> Any:
        EagerGraph(run)  # it fails late: what it did to the tables must not stay
        raise RuntimeError("operation not permitted when stream is capturing")

    capturing(monkeypatch, captured)
    asked = prompts(11)
    with caplog.at_level(logging.WARNING), mock_llm(tmp_path) as llm:
        assert tokens_of(llm.generate(asked, GREEDY, use_tqdm=False)) == [greedy(p, 10) for p in asked]
        assert llm.stats().graph_steps == 0
        assert llm.memory_report.eager_reason.startswith("RuntimeError: operation not permitted")
        assert llm.memory_report.max_num_batched_tokens == 2048
    (message,) = caplog.messages
    assert message.startswith("CUDA graph capture failed, running eagerly: RuntimeError: operation not permitted")


def test_a_capture_out_of_memory_is_tried_with_smaller_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: dict[int, None] = {}

    def captured(run: Any, *_: Any) -> Any:
        tokens = run.func.__self__.buffers.limits.max_tokens
        tried[tokens] = None
        if tokens > 600:
            raise OutOfMemory("CUDA out of memory")
        return eager_graph(run)

    capturing(monkeypatch, captured)
    with mock_llm(tmp_path) as llm:
        assert_serves(llm, 512, 32)
        assert llm.stats().graph_steps > 0
        assert llm.memory_report.eager_reason == ""
    assert list(tried) == [2048, 1024, 512]


def test_a_capture_that_never_fits_ends_eager_and_not_with_fewer_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def captured(run: Any, *_: Any) -> Any:
        raise OutOfMemory("CUDA out of memory")

    capturing(monkeypatch, captured)
    with mock_llm(tmp_path) as llm:
        assert_serves(llm, 256, 32)
        assert llm.stats().graph_steps == 0
        assert llm.memory_report.eager_reason == "memory ran out while graphs were captured"
    (message,) = caplog.messages
    assert "running with max_num_batched_tokens=256, max_num_seqs=32, no graphs (CaptureOutOfMemory" in message
