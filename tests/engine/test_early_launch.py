"""A batch starts to run while it is still being handed over."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanoengine import SamplingParams
from nanoengine.core.engine import Engine
from nanoengine.core.execution.executor import Call

from .support import mock_llm


def test_steps_start_while_requests_are_still_being_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full step's worth of prompts is launched before the last prompt is in; under "priority" none is."""
    prompts = [[i + 1, 2, 3, 4, 5, 6] for i in range(12)]
    added: list[list[int]] = []
    original = Engine.keep_busy

    def watched(self: Engine) -> None:
        original(self)
        added[-1].append(len(self._requests.known))

    monkeypatch.setattr(Engine, "keep_busy", watched)
    tokens = []
    for options in ({}, {"overlap": False}, {"scheduling_policy": "priority"}, {"max_num_batched_tokens": 512}):
        added.append([])
        with mock_llm(tmp_path, **{"max_num_batched_tokens": 24, **options}) as llm:
            outputs = llm.generate(prompts, SamplingParams(temperature=0.8, seed=3, max_tokens=5), use_tqdm=False)
        tokens.append([output.outputs[0].token_ids for output in outputs])
    assert added == [[4, 8, 12], [4, 8, 12], [], []]
    assert tokens[0] == tokens[1] == tokens[2] == tokens[3]


def test_steps_that_have_arrived_make_room_for_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where handles can tell: steps are finished while prompts are being added, one by one."""
    prompts = [[i + 1, 2, 3, 4, 5, 6] for i in range(40)]
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=3, ignore_eos=True)
    finished: list[int] = []
    original = Engine._finish_oldest

    def watched(self: Engine) -> None:
        original(self)
        finished.append(self._requests._num_added)

    def run() -> list[tuple[int, ...]]:
        finished.clear()
        with mock_llm(tmp_path, max_num_batched_tokens=24) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    monkeypatch.setattr(Engine, "_finish_oldest", watched)
    want = run()
    assert finished[0] == 40  # nothing before the last prompt is in
    monkeypatch.setattr(Call, "has_arrived", lambda self: True)
    assert run() == want
    assert finished[0] == 12  # two steps were launched, the third needs room
    assert len([n for n in finished if n < 40]) == 7


def test_steps_end_while_prompts_are_added_behind_those_that_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all places are taken, no step waits for another full step's worth of prompts."""
    prompts = [[i + 1, 2, 3, 4, 5, 6] for i in range(64)]
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=3, ignore_eos=True)
    looked: list[int] = []
    original = Engine.keep_busy

    def watched(self: Engine) -> None:
        looked.append(self._requests._num_added)
        original(self)

    def run() -> list[tuple[int, ...]]:
        looked.clear()
        with mock_llm(tmp_path, max_num_batched_tokens=96, max_num_seqs=4) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    monkeypatch.setattr(Engine, "keep_busy", watched)
    monkeypatch.setattr(Call, "has_arrived", lambda self: True)
    want = run()
    assert looked == [16, *range(24, 65, 8)]
    monkeypatch.setattr("nanoengine.llm.ADDED_BESIDE", 10**9)
    assert run() == want
    assert looked == [16, 32, 48, 64], "only full steps"
