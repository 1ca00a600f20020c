"""A replayed graph against the same work step by step, at the same padded shape, bit for bit, on real layers."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import tiny
from torch import Tensor

from nanoengine import LLM, SamplingParams
from nanoengine.api.model import ForwardBatch
from nanoengine.core.execution.runner import ModelRunner
from nanoengine.core.execution.step_inputs import StepSize
from nanoengine.kernels.draw import DrawColumns
from nanoengine.setup.start import capture

from .support import ON_GPU, need, runner_of, write_wide

pytestmark = pytest.mark.gpu


class Watch:
    """Repeats each replay step by step on the very same buffers, and notes where a bit of a real row differs.

    Repeating is harmless: it writes the same K and V to the same places; a tail's tables are put back before. Padding
    all goes to one place, in any order, so its own logits may be any.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self.runner, self.seen, self.wrong = runner, Counter[str](), Counter[str]()
        graphs: Any = runner.graphs
        assert graphs.used
        self._replay, ready = graphs.replay, graphs.ready
        graphs.replay = self._step
        # A step's own inputs are sent behind this: the pass without a tail is captured before.
        graphs.ready = lambda size, tail: ready(size, None) and ready(size, tail)

    def _note(self, name: str, graph: list[Tensor], eager: list[Tensor]) -> None:
        self.seen[name] += 1
        self.wrong[name] += not all(torch.equal(a, b) for a, b in zip(graph, eager, strict=True))

    def _step(self, size: StepSize, tail: int | None = None) -> Tensor:
        """The step up to its logits, and then whole."""
        state = self._state(0)
        before = [each.clone() for each in state]
        kept = self._replay(size).clone()
        real = self.runner.graphs.gathered[size].rows.slots != self.runner.tables.dummy_slot
        assert real.any()
        eager = self._again(size)
        self._note("mixed" if size.prefill_tokens else "decode", [kept[real]], [eager[real]])
        if tail is not None:
            self._tail(size, tail, before)
        return kept

    def _again(self, size: StepSize, tail: int | None = None) -> Any:
        """What the graph was captured from, on what was sent to it."""
        graphs: Any = self.runner.graphs
        buffers: Any = self.runner.buffers
        if graphs.sizes.inputs or tail is not None:
            buffers.send = lambda plan, drawn: None
            try:
                return graphs.run(size) if tail is None else graphs.run_tail(size, tail)
            finally:
                del buffers.send
        out, model = buffers.out, self.runner.model
        batch = ForwardBatch(num_tokens=size.rows)
        hidden = model(out.input_ids[: size.rows], out.positions[: size.rows], batch)
        return model.compute_logits(hidden)

    def _state(self, rows: int) -> list[Tensor]:
        tables, tail = self.runner.tables, self.runner.graphs.tail
        state = [tables.token_ids, tables.num_tokens, tables.num_computed]
        return state if tail is None or not rows else [*state, tail._tokens[:rows], tail._failed[:rows]]

    def _tail(self, size: StepSize, kind: int, before: list[Tensor]) -> None:
        """The tables of all real slots, and what was drawn for real rows."""
        real = self.runner.graphs.gathered[size].rows.slots != self.runner.tables.dummy_slot

        def outcome() -> list[Tensor]:
            state = self._state(size.rows)
            return [
                *(each[: self.runner.tables.dummy_slot].clone() for each in state[:3]),
                *(e[real] for e in state[3:]),
            ]

        def put_back() -> None:
            for each, old in zip(self._state(0), before, strict=True):
                each.copy_(old)

        put_back()
        self._replay(size, kind)
        graph = outcome()
        put_back()
        for each in self._state(size.rows)[3:]:
            each.fill_(-1)
        if size.prefill_tokens:  # the tail alone, from the graph's logits
            self._replay(size)
        self._again(size, kind)
        self._note("mixed tail" if size.prefill_tokens else "tail", graph, outcome())


def churn(llm: LLM) -> None:
    """Thirty requests over eight slots, of different lengths: decode and mixed steps of many sizes."""
    asked = tiny.prompts(30, shortest=5, longest=60)
    kinds: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 0.9}, {"temperature": 0.9, "top_p": 0.8}]
    params = [SamplingParams(max_tokens=30 - i % 9, ignore_eos=True, **kinds[i % 3]) for i in range(30)]
    outputs = llm.generate(asked, params, use_tqdm=False)
    assert all(o.error is None for o in outputs)
    llm.reset_prefix_cache()
    outputs = llm.generate(asked[:12], params[0], use_tqdm=False)  # greedy alone
    assert all(o.error is None for o in outputs)


def make(folder: Path, kind: str, mode: str, dtype: str, *, lazy: bool = False) -> LLM:
    options: dict[str, Any] = {
        "lazy_graphs": lazy,
        **ON_GPU, **need(mode), "dtype": dtype, "max_num_seqs": 8, "max_model_len": 512, "num_gpu_blocks_override": 300,
        "block_size": 256 if mode == "flash_attn" else 16,
    }  # fmt: skip
    return LLM(write_wide(kind, folder), **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("mode", ["triton", "flash_attn"])
def test_replays_are_the_eager_steps(tmp_path: Path, mode: str, kind: str, dtype: str) -> None:
    if mode == "flash_attn" and dtype == "float32":
        pytest.skip("not what flash-attn takes")
    lazy = dtype == "bfloat16"
    with make(tmp_path, kind, mode, dtype, lazy=lazy) as llm:
        if kind == "qwen3":  # as a server's, which has waited for its first request
            count = 0
            while llm._built.executor.call("nanoengine.setup.start.capture:capture_next") == [True]:
                count += 1
            assert (count > 10) is lazy
        watch = Watch(runner_of(llm))
        churn(llm)
        stats = llm.stats()
    print(f"\n{watch.seen}")
    assert not +watch.wrong
    assert stats.steps_broken == 0
    assert watch.seen["decode"] == stats.graph_steps > 20
    assert watch.seen["tail"] > 20
    assert watch.seen["tail"] + watch.seen["mixed tail"] == stats.graph_tails
    assert watch.seen["mixed"] == stats.mixed_graph_steps
    assert (watch.seen["mixed"] > 5) == (watch.seen["mixed tail"] > 5) == (mode == "triton")


@pytest.mark.parametrize("mode", ["triton", "flash_attn"])
def test_what_is_compiled_in_front_of_a_capture_leaves_the_cache_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """But the dummy block: flash_attn writes K and V without Triton, whose kernels do not run meanwhile."""
    compile_ahead, same = capture._Capture.compile_ahead, list[bool]()

    def watched(self: Any, run: Any, *processes: Any) -> None:
        kept = [cache for backend in backends for cache in backend._kv]
        before = [cache[:, 1:].clone() for cache in kept]
        compile_ahead(self, run, *processes)
        same.append(all(torch.equal(a, b[:, 1:]) for a, b in zip(before, kept, strict=True)))

    with make(tmp_path, "qwen3", mode, "bfloat16", lazy=True) as llm:
        backends: Any = runner_of(llm).backends
        monkeypatch.setattr(capture._Capture, "compile_ahead", watched)
        churn(llm)
    assert len(same) > 5
    assert all(same)


def test_weights_that_moved_are_caught(tmp_path: Path) -> None:
    """Mutant: a parameter gets new memory and new values after the capture; graphs still read the old."""
    with make(tmp_path, "llama", "triton", "bfloat16") as llm:
        runner = runner_of(llm)
        norm = next(p for name, p in runner.model.named_parameters() if "norm" in name)
        old, norm.data = norm.data, norm.data.clone() * 2
        watch = Watch(runner)
        churn(llm)
    assert not torch.equal(old, norm.data)
    assert watch.wrong["decode"] == watch.seen["decode"] > 0
    assert watch.wrong["mixed"] == watch.seen["mixed"] > 0
    assert watch.wrong["tail"] > 0  # that graph is a whole decode step
    assert not watch.wrong["mixed tail"]  # and this one begins at the logits


def test_a_tail_that_reads_other_columns_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: each row has its neighbour's parameters."""
    with make(tmp_path, "llama", "triton", "bfloat16") as llm:
        runner: Any = runner_of(llm)
        watch, draw = Watch(runner), runner.sampler.draw

        def shifted(kind: int, logits: Tensor, c: DrawColumns, *rest: Any) -> None:
            draw(kind, logits, replace(c, at=c.at.roll(1, 0)), *rest)

        monkeypatch.setattr(runner.sampler, "draw", shifted)
        churn(llm)
    assert watch.wrong["tail"] > 0
    assert watch.wrong["mixed tail"] > 0
    assert not watch.wrong["decode"]


def test_an_older_engine_s_garbage_does_not_break_a_capture(tmp_path: Path) -> None:
    """Graphs in reference cycles end when the garbage collector comes by: never while another one is captured."""
    gc.collect()
    before = gc.get_threshold()
    gc.disable()
    with make(tmp_path / "one", "llama", "triton", "bfloat16") as llm:
        cycle: list[Any] = [runner_of(llm).graphs]
        cycle.append(cycle)
    del llm, cycle
    gc.set_threshold(1, 1, 1)
    gc.enable()
    try:
        with make(tmp_path / "two", "llama", "triton", "bfloat16") as llm:
            assert runner_of(llm).graphs.used, llm.memory_report.eager_reason
    finally:
        gc.set_threshold(*before)
    assert gc.isenabled()
