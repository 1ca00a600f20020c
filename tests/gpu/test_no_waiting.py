"""Launching a step never waits for the GPU: torch's alarm stays silent, and a launch returns while the GPU sleeps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoengine import LLM, RequestOutput, SamplingParams

from .support import need, runner_of, write_wide

pytestmark = [pytest.mark.gpu, pytest.mark.alone]
LENGTH = 60
SLEEP = 0.06  # seconds
CYCLES = int(SLEEP * 2.1e9)  # no GPU so far runs faster

# What rows may ask: by the captured tail, and step by step.
RECIPES: list[dict[str, Any]] = [
    {"temperature": 0.8},
    {"temperature": 0},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.7, "logprobs": 3},
    {"temperature": 1.0, "presence_penalty": 0.5, "repetition_penalty": 1.1},
    {"temperature": 0.8, "min_tokens": 10, "stop_token_ids": [5, 6]},
    {"temperature": 0, "prompt_logprobs": 2},
    {"temperature": 0.8, "logit_bias": {4: 2.0}},
]


def make(folder: Path, mode: str, **more: Any) -> LLM:
    options: dict[str, Any] = {
        "device": "cuda", "dtype": "bfloat16", "max_num_seqs": 16, "max_num_batched_tokens": 512, "seed": 1,
        "max_model_len": 512, "block_size": 256 if mode.startswith("flash_attn") else 16,
        "num_gpu_blocks_override": 200, **need(mode), **more,
    }  # fmt: skip
    return LLM(write_wide("qwen3", folder), **options)


@pytest.fixture(scope="module", params=["torch", "triton eager", "triton", "flash_attn eager", "flash_attn"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def llm(mode: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """One engine a mode: the tests of a mode run one after the other."""
    with make(tmp_path_factory.mktemp("model"), mode) as made:
        yield made


def params(i: int, plain: bool) -> SamplingParams:
    return SamplingParams(max_tokens=LENGTH, ignore_eos=True, **RECIPES[i % (3 if plain else len(RECIPES))])


def prompt(i: int) -> list[int]:
    """Every third one begins as the others of its kind do: a prefix hit."""
    return [1 + i % 3, *([7] * 40 if i % 3 == 0 else [i % 100]), *range(3 + i)]


@contextmanager
def alarm() -> Iterator[None]:
    """Whatever makes torch wait for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def twenty_steps(llm: LLM, *, plain: bool) -> list[RequestOutput]:
    """All outputs of requests some of which come, and one of which is aborted, while the alarm is on."""
    done: list[RequestOutput] = []

    def round_of(tag: str, guard: Callable[[], Any]) -> None:
        for i in range(8):
            llm.text_engine.add_request(f"{tag}{i}", prompt(i), params(i, plain))
        for _ in range(8):
            done.extend(o for o in llm.text_engine.step() if o.finished)
        with guard():
            for i in range(20):
                if i % 3 == 0:
                    llm.text_engine.add_request(f"{tag}late {i}", prompt(i), params(i // 3, plain))
                if i == 10:
                    llm.engine.abort_request(f"{tag}2")
                done.extend(o for o in llm.text_engine.step() if o.finished)
        while llm.text_engine.has_unfinished_requests():
            done.extend(o for o in llm.text_engine.step() if o.finished)

    @contextmanager
    def nothing() -> Iterator[None]:
        yield

    round_of("warm ", nothing)  # compiles kernels, makes what is made when first needed
    llm.reset_prefix_cache()
    done.clear()
    round_of("", alarm)
    return done


def faults(outputs: list[RequestOutput]) -> list[str]:
    """An alarm ends its step: the engine runs the step's requests again, and blames one that is alone in it."""
    return [str(o.error) for o in outputs if o.error is not None]


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "everything"])
def test_no_step_waits(llm: LLM, monkeypatch: pytest.MonkeyPatch, mode: str, plain: bool) -> None:
    broken: list[str] = []
    before, original = llm.stats(), llm.engine._broken
    monkeypatch.setattr(llm.engine, "_broken", lambda error: (broken.append(f"{error}"), original(error)))
    outputs = twenty_steps(llm, plain=plain)
    stats = llm.stats()
    assert not broken
    assert not faults(outputs)
    assert len(outputs) == 8 + 7
    lens = [len(o.outputs[0].token_ids) for o in outputs if o.outputs[0].finish_reason == "length"]
    assert lens == [LENGTH] * len(lens)
    assert sum(o.outputs[0].finish_reason == "abort" for o in outputs) == 1
    assert stats.mixed_steps - before.mixed_steps > 5
    assert (stats.graph_steps > before.graph_steps) == (mode in ("triton", "flash_attn"))
    if plain:
        assert (stats.graph_tails > before.graph_tails) == (mode in ("triton", "flash_attn"))
        assert (stats.mixed_graph_steps > before.mixed_graph_steps) == (mode == "triton")


def test_the_alarm_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: each step asks the device for one number."""
    from nanoengine.core.execution.runner import ModelRunner

    original = ModelRunner.forward

    def forward(self: ModelRunner, plan: Any) -> Any:
        self.tables.num_tokens[0].item()
        return original(self, plan)

    with make(tmp_path, "triton") as llm:
        monkeypatch.setattr(ModelRunner, "forward", forward)
        outputs = twenty_steps(llm, plain=True)
    assert any("synchroniz" in fault for fault in faults(outputs)), faults(outputs)


def launch_under_a_sleeping_gpu(llm: LLM, *, admit: bool) -> tuple[bool, float]:
    """(whether a launch returned before the sleep in front of it ended, seconds it took)."""
    engine: Any = llm.engine
    for i in range(6):
        engine.add_request(f"{admit} {i}", prompt(i), params(i, plain=True))
    for _ in range(8):
        engine.step()
    assert len(engine._in_flight) == 1
    if admit:
        engine.add_request(f"{admit} late", prompt(7), params(7, plain=True))
        engine._drain_inbox()
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    asleep = torch.cuda.Event()
    asleep.record()
    begun = time.perf_counter()
    engine._launch_ahead(engine._depth)
    took, early = time.perf_counter() - begun, not asleep.query()
    assert len(engine._in_flight) == 2
    plan = engine._in_flight[-1].step.plan
    assert (len(plan.new.slots), plan.num_decode_rows) == (int(admit), 6)
    while engine.has_unfinished_requests():
        assert all(o.error is None for o in engine.step())
    return early, took


@pytest.mark.parametrize("admit", [False, True], ids=["decode", "mixed"])
def test_a_launch_returns_while_the_gpu_sleeps(llm: LLM, mode: str, admit: bool) -> None:
    launch_under_a_sleeping_gpu(llm, admit=admit)  # compiles
    early, took = launch_under_a_sleeping_gpu(llm, admit=admit)
    print(f"\n{mode}: launched in {took * 1e3:.2f} ms under a sleep of {SLEEP * 1e3:.0f} ms")
    assert early
    assert took < SLEEP / 2


def test_a_launch_that_waits_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make(tmp_path, "triton") as llm:
        runner = runner_of(llm)
        original = runner.launch
        monkeypatch.setattr(runner, "launch", lambda plan: (original(plan), torch.cuda.synchronize())[0])
        early, took = launch_under_a_sleeping_gpu(llm, admit=False)
    assert not early
    assert took > SLEEP / 2
