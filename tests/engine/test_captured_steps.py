"""What graphs capture, without a GPU: a stub takes the place of each graph and runs its pass again over the static
buffers, and the kernels of inputs and sampling run in Triton's interpreter. Bit for bit on the mock model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton_interpreter
from torch import Tensor

from nanoengine import LLM, SamplingParams
from nanoengine.api.stats import EngineStats
from nanoengine.core.execution import finish_step, results, runner, step_inputs
from nanoengine.core.execution.finish_step import CapturedTail
from nanoengine.core.execution.graphs import CaptureSizes, StepGraphs
from nanoengine.core.execution.step_inputs import StepSize
from nanoengine.core.step import SuppliedColumn
from nanoengine.kernels.host_ring import TURNS, CopiedBeside
from nanoengine.kernels.ops import Ops
from nanoengine.params.engine_options import EngineOptions
from nanoengine.setup.start import capture as setup_capture
from nanoengine.setup.start import starter
from nanoengine.setup.start.memory import batch_limits
from nanoengine.testing.checkpoints import tiny_qwen3

from . import chain_plugin
from .support import greedy, mock_llm, prompts, tokens_of
from .test_drafts import with_device_drafts, with_drafts
from .test_host_states import CHAIN, JUMPS, chained

triton_interpreter.import_kernels()
paged_attention_triton: Any = pytest.importorskip("nanoengine.kernels.paged_attention_triton")
sampling_triton: Any = pytest.importorskip("nanoengine.kernels.sampling_triton")
pytestmark = pytest.mark.skipif(not triton_interpreter.INSTALLED, reason="triton is not installed")
SIZES = (*map(StepSize, (1, 2, 4)), StepSize(4, 32))
ASKED = prompts(7, shortest=2, longest=24)
GREEDY = SamplingParams(temperature=0, max_tokens=6)


class Replayed:
    """Stands for a CUDA graph: a replay runs the pass into the tensors that the capture made."""

    def __init__(self, run: Any, *, first: bool = True) -> None:
        """first: it runs at once, too."""
        self.run, self.out = run, None
        self.out = self._again() if first else None

    def _again(self) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            return self.run()

    def replay(self) -> None:
        out = self._again()
        if self.out is not None:
            self.out.copy_(out)


class KernelsBeside(Ops):
    """Plain torch for layers, as the mock model has none; inputs and sampling by kernels."""

    name = "triton"


RUN_TAIL = setup_capture._Capture._run_tail


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Steps by graph on a CPU; counts replays by kind. Tails, most of the time in the interpreter, run in steps alone:
    neither when they are captured nor once before (`RUN_TAIL` does that)."""
    seen: Counter[str] = Counter()

    def capture(run: Any, *_: Any) -> tuple[Any, Any]:
        if run.func.__name__ in ("run_tail", "run_masked_tail"):
            return Replayed(run, first=False), None
        graphs = run.func.__self__
        with pytest.MonkeyPatch.context() as patch:
            if graphs.sizes.inputs:  # unlike a capture this runs, maybe in front of a step: over dummy rows
                graphs.prepare(graphs.buffers.blank_plan(run.args[0]), run.args[0])
            else:
                patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            graph = Replayed(run)
        return graph, graph.out

    original = StepGraphs.replay

    def replay(self: StepGraphs, size: StepSize, tail: int | None = None) -> Any:
        kind = "mixed" if size.prefill_tokens else "drafts" if size.query_len > 1 else "decode"
        seen[f"replay {kind}"] += 1
        seen[f"tail {kind}"] += tail is not None
        return original(self, size, tail)

    event = SimpleNamespace(record=lambda stream: None, synchronize=lambda: None, query=lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(results, "_send", lambda tensor: tensor.clone())
    monkeypatch.setattr(setup_capture, "captured", capture)
    monkeypatch.setattr(setup_capture._Capture, "_run_tail", lambda *_, **__: None)
    monkeypatch.setattr(starter, "ops_for", lambda device, **_: KernelsBeside())
    monkeypatch.setattr(starter, "capture_sizes", lambda *_, **__: CaptureSizes(SIZES, tail=True, inputs=True))
    monkeypatch.setattr(StepGraphs, "replay", replay)
    with triton_interpreter.interpreted():
        yield seen


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"fuse_kernels": False},
        {"fuse_attention": False},
        {"fuse_products": False},
        {"kernels": {"attention_codes": False}},
    ],
)
def test_layers_get_the_operations_that_the_options_ask_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    asked: dict[str, Any] = {}

    def ops_for(device: torch.device, *, cache: Path, **options: Any) -> Ops:
        asked.update(options)
        return Ops()

    monkeypatch.setattr(starter, "ops_for", ops_for)
    with mock_llm(tmp_path, **given):
        pass
    names = {"fuse": "fuse_kernels", "attends_qkv": "fuse_attention", "products": "fuse_products"}
    defaults = EngineOptions()
    assert asked.pop("kernels").has("attention_codes") == ("kernels" not in given)
    assert asked == {argument: given.get(option, getattr(defaults, option)) for argument, option in names.items()}


@pytest.mark.parametrize("overlap", [True, False])
def test_greedy_tokens_are_those_of_the_mock_model(
    tmp_path: Path, captured: Counter[str], monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    if overlap:
        monkeypatch.setattr(setup_capture._Capture, "_run_tail", RUN_TAIL)
    with mock_llm(tmp_path, max_num_seqs=4, max_num_batched_tokens=36, overlap=overlap) as llm:
        assert tokens_of(llm.generate(ASKED, GREEDY, use_tqdm=False)) == [greedy(p, 6) for p in ASKED]
        stats = llm.stats()
    assert stats.graph_steps == captured["replay decode"] > 3
    assert stats.mixed_graph_steps == captured["replay mixed"] > 1
    assert stats.graph_tails == captured["tail decode"] + captured["tail mixed"] > 5


def test_many_prompts_are_one_step_without_decode_rows_or_behind_them(
    tmp_path: Path, captured: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More prompts than a graph of few tokens has rows for; the next ones come while the first ones decode."""
    monkeypatch.setattr(step_inputs, "FEW_TOKENS", 50)
    sizes = CaptureSizes((StepSize(1), StepSize(12), StepSize(0, 100), StepSize(12, 100)), tail=True, inputs=True)
    monkeypatch.setattr(starter, "capture_sizes", lambda *_, **__: sizes)
    monkeypatch.setattr(starter, "batch_limits", lambda options: replace(batch_limits(options), max_tokens=112))
    asked = prompts(12, shortest=8, longest=12)
    with mock_llm(tmp_path, max_num_seqs=12, max_num_batched_tokens=100, lazy_graphs=True) as llm:
        assert tokens_of(llm.generate(asked, GREEDY, use_tqdm=False)) == [greedy(p, 6) for p in asked]
        stats = llm.stats()
    assert stats.mixed_graph_steps == captured["replay mixed"] == captured["tail mixed"] > 1
    assert stats.mixed_steps > 0
    assert stats.chunks > 0


def test_graphs_whose_inputs_are_gathered_in_front_of_them(
    tmp_path: Path, captured: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode steps of a backend that cannot fill its inputs in a graph; the tails are captured all the same."""
    sizes = CaptureSizes(tuple(size for size in SIZES if not size.prefill_tokens), tail=True)
    monkeypatch.setattr(starter, "capture_sizes", lambda *_, **__: sizes)
    with mock_llm(tmp_path, max_num_seqs=4, max_num_batched_tokens=36) as llm:
        assert tokens_of(llm.generate(ASKED, GREEDY, use_tqdm=False)) == [greedy(p, 6) for p in ASKED]
    assert captured["replay decode"] == captured["tail decode"] > 3
    assert not captured["replay mixed"]


def test_seeded_draws_and_what_no_tail_does(tmp_path: Path, captured: Counter[str]) -> None:
    """Rows with log-probs and penalties take the eager way behind a replayed step; the others a captured draw."""
    params = [
        SamplingParams(seed=1, max_tokens=6, temperature=0.8),
        SamplingParams(seed=2, max_tokens=6, temperature=1.2, top_p=0.8, top_k=20),
        SamplingParams(seed=3, max_tokens=6, temperature=0.9, presence_penalty=0.5),
        SamplingParams(seed=4, max_tokens=6, temperature=0.7, logprobs=2),
    ]
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 36}
    with mock_llm(tmp_path / "graphs", **options) as llm:
        each = [llm.generate(ASKED[:4], one, use_tqdm=False) for one in params]
        together = llm.generate(ASKED[:4], params, use_tqdm=False)
        steps = llm.stats()
    assert steps.graph_tails < steps.graph_steps + steps.mixed_graph_steps
    assert captured["tail decode"] > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(starter, "ops_for", lambda device, **_: Ops())
        patch.setattr(starter, "capture_sizes", lambda *_, **__: CaptureSizes())
        with mock_llm(tmp_path / "eager", **options) as llm:
            assert [tokens_of(llm.generate(ASKED[:4], one, use_tqdm=False)) for one in params] == [
                tokens_of(outputs) for outputs in each
            ]
            assert tokens_of(llm.generate(ASKED[:4], params, use_tqdm=False)) == tokens_of(together)


@pytest.mark.parametrize("drafting", [with_drafts, with_device_drafts], ids=["host", "device"])
def test_rows_with_drafts(
    tmp_path: Path, captured: Counter[str], monkeypatch: pytest.MonkeyPatch, drafting: Any
) -> None:
    """One graph holds rows of one to four tokens; what its captured tail does not do comes behind it, eagerly."""
    sizes = CaptureSizes((*SIZES, StepSize(2, query_len=4), StepSize(4, query_len=4)), tail=True, inputs=True)
    monkeypatch.setattr(starter, "capture_sizes", lambda *_, **__: sizes)
    params = [
        SamplingParams(seed=1, max_tokens=6, temperature=0.8),
        SamplingParams(temperature=0, max_tokens=6),
        SamplingParams(seed=2, max_tokens=6, temperature=1.2, top_p=0.8, top_k=20),
        SamplingParams(seed=3, max_tokens=6, temperature=0.9, presence_penalty=0.5),
    ]
    with mock_llm(tmp_path, max_num_seqs=4, max_num_batched_tokens=36) as llm:
        want = tokens_of(llm.generate(ASKED[:4], params, use_tqdm=False))
        oracle = drafting(llm, ASKED[:4], want, tokens=3, accuracy=0.7)
        captured.clear()
        for count in (1, 4):
            found = tokens_of(llm.generate(ASKED[:count], params[:count], use_tqdm=False))
            assert found == want[:count]
        assert llm.stats().steps_broken == 0
    assert captured["replay drafts"] > captured["tail drafts"] > 0
    assert 0 < oracle.accepted < oracle.drafted


@pytest.mark.parametrize("missing", ["run mixed", "run_tail mixed", "run_tail decode", "run drafts"])
def test_only_steps_whose_graph_cannot_be_captured_are_eager(
    tmp_path: Path, captured: Counter[str], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """One of the kinds runs out of memory in each capture, which drops all others: they are captured again."""
    sizes, stub = (*SIZES, StepSize(4, query_len=4)), setup_capture.captured

    def capture(run: Any, *rest: Any) -> Any:
        kind = "mixed" if run.args[0].prefill_tokens else "drafts" if run.args[0].query_len > 1 else "decode"
        if missing == f"{run.func.__name__} {kind}":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stub(run, *rest)

    monkeypatch.setattr(setup_capture, "captured", capture)
    monkeypatch.setattr(starter, "capture_sizes", lambda *_, **__: CaptureSizes(sizes, tail=True, inputs=True))
    with mock_llm(tmp_path, max_num_seqs=4, max_num_batched_tokens=36, lazy_graphs=True) as llm:
        want = [greedy(p, 6) for p in ASKED[:4]]
        assert tokens_of(llm.generate(ASKED[:4], GREEDY, use_tqdm=False)) == want
        with_device_drafts(llm, ASKED[:4], want, tokens=3, accuracy=0.7)
        assert tokens_of(llm.generate(ASKED[:4], GREEDY, use_tqdm=False)) == want
        stats = llm.stats()
    kinds = {"mixed", "decode", "drafts"} - {missing.split()[1]}
    assert all(captured[f"replay {kind}"] > 0 for kind in kinds), captured
    assert captured[f"replay {missing.split()[1]}"] == 0
    assert stats.uncaptured_steps > 0
    assert stats.steps_broken == stats.steps_withdrawn == 0


def test_what_is_compiled_between_steps_writes_k_and_v_to_the_dummy_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend may write them without Triton, and the kernel that says where does not run: the step before did."""
    made, mapping, seen = object.__new__(setup_capture._Capture), torch.tensor([[48, 49]]), list[Any]()
    made.device, out = torch.device("cuda"), SimpleNamespace(slot_mapping=mapping)
    made._finish = SimpleNamespace(tables=SimpleNamespace(flush=lambda: None))  # type: ignore[assignment]
    made._graphs = SimpleNamespace(buffers=SimpleNamespace(out=out))  # type: ignore[assignment]
    monkeypatch.setattr(setup_capture, "compiling_ahead", nullcontext)
    made.compile_ahead(lambda: seen.append(mapping.tolist()))
    assert seen == [[[0, 0]]]


@pytest.mark.parametrize("inputs", [True, False])
def test_inputs_of_a_start_wait_for_those_that_the_gpu_has_not_copied(
    monkeypatch: pytest.MonkeyPatch, inputs: bool
) -> None:
    """A GPU that lags behind, as others use it: a turn of pinned memory is not taken again before its copy was made."""
    made, sent, most = object.__new__(setup_capture._Capture), [0], [0]
    made._stream, made.device, made._tails = SimpleNamespace(), torch.device("cpu"), ()  # type: ignore[assignment]
    made.sizes = [StepSize(rows) for rows in range(40, 0, -1)]

    def send(*_: Any) -> None:
        sent[0] += 1
        most[0] = max(most[0], sent[0])

    def copied() -> None:
        sent[0] = 0

    made._graphs = SimpleNamespace(run=send, sizes=SimpleNamespace(inputs=inputs))  # type: ignore[assignment]
    monkeypatch.setattr(setup_capture._Capture, "_run_tail", lambda *_, **__: None)
    monkeypatch.setattr(setup_capture._Capture, "_capture", (lambda *_: None) if inputs else send)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=copied))
    made.run_once()
    made.captures(smallest=False)
    assert most[0] <= TURNS - 2  # two steps may be in flight besides
    sent[0] = -100
    made.run_once(made.sizes[:1])
    assert sent[0] == -99  # one step's inputs wait for nothing, as a step may be running


def test_rows_with_drafts_on_attention_kernels(
    tmp_path: Path, captured: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real model on the Triton backend: a graph for four rows of four tokens each has three, of one to four."""
    sizes = CaptureSizes((StepSize(4), StepSize(4, query_len=4)), tail=True, inputs=True)
    monkeypatch.setattr(starter, "capture_sizes", lambda *_, **__: sizes)
    several, seen = paged_attention_triton.attend_several, list[tuple[int, int]]()

    def attend(q: Tensor, *args: Any, **options: Any) -> None:
        starts, pad = args[5], options["pad_tokens"]
        seen.append((int(starts[-1]), pad))
        several(q, *args, **options)
        assert not args[2][starts[-1] :].any()

    monkeypatch.setattr(paged_attention_triton, "attend_several", attend)
    folder = tiny_qwen3(tmp_path, seed=1, std=0.2, num_key_value_heads=2, num_attention_heads=4, head_dim=16)
    params = [SamplingParams(temperature=t, seed=3, max_tokens=8, ignore_eos=True) for t in (0, 1.1, 0)]
    asked = [[5, 6, 7, 8, 9], [3, 1, 4], [*range(20, 41)]]
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 36, "max_model_len": 40, "num_gpu_blocks_override": 32}
    with LLM(folder, attention="triton", device="cpu", dtype="float32", block_size=16, **options) as llm:
        want = tokens_of(llm.generate(asked, params, use_tqdm=False))
        oracle = with_drafts(llm, asked, want, tokens=3, accuracy=0.8)
        captured.clear()
        assert tokens_of(llm.generate(asked, params, use_tqdm=False)) == want
    assert 0 < oracle.accepted < oracle.drafted
    assert captured["tail drafts"] > 1
    assert {pad for _, pad in seen} == {16}
    assert min(real for real, _ in seen) < 12


def late_outputs(tmp_path: Path, **options: Any) -> tuple[list[Any], EngineStats]:
    """Rows with masks beside rows without, more of them than a step holds; greedy, random and truncated."""
    params = [
        CHAIN.replace(max_tokens=6),
        GREEDY.replace(max_tokens=5),
        CHAIN.replace(temperature=0.9, seed=4, chain=17, top_k=5, max_tokens=4),
        CHAIN.replace(wrong="nothing", wrong_at=2),
        CHAIN.replace(temperature=1.3, seed=3, chain=9, max_tokens=3),
    ]
    with mock_llm(tmp_path, plugins=[chain_plugin], max_num_seqs=4, max_num_batched_tokens=36, **options) as llm:
        outputs = llm.generate(ASKED[:5], params, use_tqdm=False)
        stats = llm.stats()
    return [o.error.code if o.error is not None else o.outputs[0].token_ids for o in outputs], stats


@pytest.fixture
def late_wanted(tmp_path: Path) -> list[Any]:
    return late_outputs(tmp_path / "eager")[0]


@pytest.mark.parametrize(("failures", "on"), [(0, True), (1, False), (99, True)])
def test_masks_that_come_late_and_the_draw_behind_them(
    tmp_path: Path,
    late_wanted: list[Any],
    captured: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
    failures: int,
    on: bool,
) -> None:
    """No late step that is replayed ends eagerly. A tail that cannot be captured runs launch by launch. on: the kernels
    and the copy that masks have by default; all draw the same. What differs with the number of rows ran before."""
    made, tried, graphs, dry = setup_capture._Capture._made, list[Any](), set[Any](), Counter[Any]()
    draw, in_scan, beside = sampling_triton.sample, Counter[bool](), list[bool]()

    def capture(self: Any, run: Any) -> Any:
        if run.func.__name__ == "run_masked_tail":
            tried.append(run.args)
            if len(tried) <= failures:
                raise RuntimeError("not in a capture")
            graphs.add(run.args)
        return made(self, run)

    def dry_run(self: Any, size: StepSize, kind: int, logits: Tensor, *, masked: bool = False) -> None:
        dry[size.rows, kind] += 1 + masked

    def sample(*args: Any, **given: Any) -> None:
        masked = given["mask"] is not None
        if given["at"] is not None and (masked or given["raw_tops"] is not None):  # in a captured tail
            in_scan[masked] += 1
        draw(*args, **given)

    def copied(*args: Any, **given: Any) -> CopiedBeside:
        beside.append(given["beside"])
        return CopiedBeside(*args, **given)

    monkeypatch.setattr(setup_capture._Capture, "_made", capture)
    monkeypatch.setattr(setup_capture._Capture, "_run_tail", dry_run)
    monkeypatch.setattr(sampling_triton, "sample", sample)
    monkeypatch.setattr(finish_step, "CopiedBeside", copied)
    sizes = CaptureSizes((StepSize(4), StepSize(4, 32)), tail=True, inputs=True)
    monkeypatch.setattr(starter, "capture_sizes", lambda *_, **__: sizes)
    assert late_wanted[0] == chained(ASKED[0], 6)
    assert late_wanted[3] == "nothing_left"
    kernels = {} if on else {"mask_in_scan": False, "masks_beside": False}
    found, stats = late_outputs(tmp_path, lazy_graphs=False, kernels=kernels)
    assert found == late_wanted
    assert dry == dict.fromkeys(product((4, 12), range(3)), 3)  # without a mask, and behind one
    assert (set(in_scan), beside) == ({on}, [on])
    assert in_scan[on] > 3
    assert stats.graph_tails == stats.graph_steps + stats.mixed_graph_steps > 4
    assert len(tried) == (4 if failures == 99 else len(graphs) + failures)  # two sizes, twice
    assert bool(graphs) is (failures < 99)
    assert captured["tail decode"] + captured["tail mixed"] < stats.graph_tails - 3


def test_late_columns_that_no_static_tail_has_are_put_in_eagerly(tmp_path: Path, captured: Counter[str]) -> None:
    others: list[dict[str, Any]] = [{"pair": (3, 4), "pair_walks": True}, {"logprobs": 1}, {"min_tokens": 3}]
    short = CHAIN.replace(max_tokens=4)
    params, before = [short, *(short.replace(**other) for other in others)], 0
    with mock_llm(tmp_path, plugins=[chain_plugin], max_num_seqs=4, max_num_batched_tokens=36) as llm:
        for one in params:
            (output,) = llm.generate([ASKED[0]], one, use_tqdm=False)
            assert output.error is None
            if one.logprobs or one is short:
                assert output.outputs[0].token_ids == chained(ASKED[0], 4)
            tails = llm.stats().graph_tails
            assert (tails > 2) if one is short else (tails == before), one
            before = tails


def test_a_forced_run_ends_in_the_static_tail(
    tmp_path: Path, captured: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of several tokens, each with a mask of its own."""
    sizes = CaptureSizes((*SIZES, StepSize(4, query_len=16)), tail=True, inputs=True)
    monkeypatch.setattr(starter, "capture_sizes", lambda *_, **__: sizes)
    with mock_llm(tmp_path, plugins=[chain_plugin], max_num_seqs=4, max_num_batched_tokens=80) as llm:
        outputs = llm.generate(ASKED[:2], [JUMPS, CHAIN.replace(max_tokens=4)], use_tqdm=False)
        stats = llm.stats()
    count = JUMPS.max_tokens or 0
    assert tokens_of(outputs) == [chained(ASKED[0], count, -5), chained(ASKED[1], 4)]
    assert captured["replay drafts"] > 0
    assert stats.graph_tails == stats.graph_steps + stats.mixed_graph_steps


def test_masks_in_the_room_that_is_sent(tmp_path: Path, captured: Counter[str]) -> None:
    """Masks that were written where they are sent from, as those elsewhere, go to the places of their draws."""
    with mock_llm(tmp_path, max_num_seqs=4, max_num_batched_tokens=36) as llm:
        tail = llm._built.executor.runner.graphs.tail
        assert tail is not None
        words = tail.host_mask.shape[1]
        apart = of_column([3], np.arange(3, 3 + words, dtype=np.int32)[None])
        every = product([True, False], [[0, 1, 2], [0, 2], [2, 1], [1, 2], []], [0, 2], [True, False])
        for in_room, draws, shift, another in every:
            own = np.array([0, 1 + shift, 2 + shift, 3 + shift])
            tail.host_mask[:] = 5
            values = np.arange(7, 7 + len(draws) * words, dtype=np.int32).reshape(len(draws), words)
            want = np.full((6, words), -1, np.int32)
            want[own[draws]] = values
            want[own[3]] = apart.values if another else -1
            given = tail.host_mask[: len(draws)] if in_room else values
            given[:] = values
            tail.write_mask(6, own, [of_column(draws, given)] * bool(draws) + [apart] * another)
            assert (tail.host_mask[:6] == want).all(), (in_room, draws, shift, another)


def of_column(draws: list[int], values: Any) -> SuppliedColumn:
    offsets = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
    return SuppliedColumn(
        processor="x", column="y", draws=np.array(draws, np.int32), values=values.ravel(), offsets=offsets
    )


def masks_of_earlier_steps(patch: pytest.MonkeyPatch) -> None:
    """Rows without a mask keep what an earlier step had in their place."""
    write = CapturedTail.write_mask

    def broken(self: CapturedTail, draws: int, own: Any, supplied: Any) -> None:
        before, free = self.host_mask.copy(), np.ones(draws, np.bool_)
        write(self, draws, own, supplied)
        for each in supplied:
            free[own[each.draws]] = False
        self.host_mask[np.flatnonzero(free)] = before[np.flatnonzero(free)]

    patch.setattr(CapturedTail, "write_mask", broken)


def masks_of_other_rows(patch: pytest.MonkeyPatch) -> None:
    write = CapturedTail.write_mask

    def broken(self: CapturedTail, draws: int, own: Any, supplied: Any) -> None:
        write(self, draws, np.roll(own, 1), supplied)

    patch.setattr(CapturedTail, "write_mask", broken)


def no_masks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CopiedBeside, "send", lambda *_: None)


@pytest.mark.parametrize("mutant", [masks_of_earlier_steps, masks_of_other_rows, no_masks])
def test_mutants_of_late_masks_are_caught(
    tmp_path: Path, late_wanted: list[Any], captured: Counter[str], monkeypatch: pytest.MonkeyPatch, mutant: Any
) -> None:
    mutant(monkeypatch)
    assert late_outputs(tmp_path)[0] != late_wanted


def test_what_was_sent_for_a_graph_that_did_not_run_is_sent_again(
    tmp_path: Path, captured: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The columns of the slot's last owner are reset in a step whose graph is not replayed, as memory runs out."""
    raised: list[int] = []

    def run_out(group: Any) -> None:
        if not raised:
            raised.append(1)
            raise MemoryError("another rank ran out of memory")

    with mock_llm(tmp_path, max_num_seqs=4, max_num_batched_tokens=36) as llm:

        def tokens() -> list[Any]:
            return tokens_of(llm.generate([ASKED[1]], SamplingParams(seed=2, max_tokens=12), use_tqdm=False))

        expected = tokens()
        last_owner = SamplingParams(temperature=0.1, top_k=2, seed=1, max_tokens=3)
        llm.generate([ASKED[0]], last_owner, use_tqdm=False)
        monkeypatch.setattr(type(llm._built.executor.runner.tp), "begin_forward", run_out)
        assert tokens() == expected
        stats = llm.stats()
    assert stats.steps_withdrawn
    assert stats.graph_tails > 20


def test_a_mutant_that_shifts_the_rows_of_mixed_steps_is_caught(
    tmp_path: Path, captured: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = StepGraphs.replay

    def replay(self: StepGraphs, size: StepSize) -> Any:
        logits = original(self, size)
        return logits.copy_(logits.roll(1, 0)) if size.prefill_tokens else logits

    monkeypatch.setattr(StepGraphs, "replay", replay)
    with mock_llm(tmp_path, max_num_seqs=4, max_num_batched_tokens=36) as llm:
        outputs = llm.generate(ASKED, GREEDY, use_tqdm=False)
    assert [o.outputs[0].token_ids if o.outputs else () for o in outputs] != [greedy(p, 6) for p in ASKED]


class Routes(KernelsBeside):
    """Plain torch, which notes the logits and the experts of each routing in a replay."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def route(self, logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        ids, weights = super().route(logits, *rest)
        if torch.cuda.is_current_stream_capturing():
            self.seen.append((logits.clone(), ids.clone()))
        return ids, weights


EXPERTS, LAYERS = 8, 2
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 61, "hidden_size": 32,
    "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "moe_intermediate_size": 16, "num_experts": EXPERTS, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    "rope_theta": 100.0,
}  # fmt: skip


@pytest.mark.parametrize("masked", [True, False])
def test_padding_of_captured_steps_goes_to_no_expert(
    tmp_path: Path, captured: Counter[str], monkeypatch: pytest.MonkeyPatch, masked: bool
) -> None:
    """Padding is token 0, whose hidden states are NaN here, and no prompt has it. Unmasked it would have experts."""
    ops, steps = Routes(), list[tuple[int, int]]()
    original = runner.pad

    def pad(plan: Any, size: StepSize, dummy_slot: int) -> Any:
        steps.append((plan.num_tokens, size.tokens))
        return original(plan, size, dummy_slot)

    monkeypatch.setattr(starter, "ops_for", lambda device, **_: ops)
    monkeypatch.setattr(runner, "pad", pad)
    if not masked:
        monkeypatch.setattr(starter, "RealTokens", lambda *_: None)
    (tmp_path / "config.json").write_text(json.dumps(MOE))
    asked = [[1 + token % 60 for token in prompt] for prompt in ASKED[:5]]
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 36, "max_model_len": 40, "num_gpu_blocks_override": 64}
    given: dict[str, Any] = {"load_format": "dummy", "enable_prefix_caching": False, "lazy_graphs": False, **options}
    with LLM(tmp_path, attention="triton", **given) as llm:
        llm.model.model.embed_tokens.weight.data[0] = float("nan")
        llm.model.lm_head.weight.data[0] = 0.0  # never the highest
        ops.seen.clear()  # of the captures
        tokens_of(llm.generate(asked, GREEDY, use_tqdm=False))
        stats = llm.stats()
    assert stats.graph_steps > 3
    assert stats.mixed_graph_steps > 1
    assert any(real < size for real, size in steps)
    assert any(logits.isnan().any() for logits, _ in ops.seen)
    routed = [int((ids < EXPERTS).all(1).sum()) for _, ids in ops.seen]
    wanted = [real for real, _ in steps for _ in range(LAYERS)]
    assert (routed == wanted) is masked
    nan = [ids[logits.isnan().any(1)] for logits, ids in ops.seen]
    assert bool((torch.cat(nan) == EXPERTS).all()) is masked
