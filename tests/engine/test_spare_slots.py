"""A request whose last token is in flight leaves its place in the batch to the next one."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanoengine import SamplingParams

from .support import mock_llm

LENS = [3, 5, 5, 5, 5, 5, 5, 5]


def answers(folder: Path, overlap: bool) -> tuple[list[tuple[int, ...]], int]:
    """Tokens, and steps that it took to make 38 of them, two a step at the most."""
    params = [SamplingParams(temperature=0.7, seed=i, max_tokens=n, ignore_eos=True) for i, n in enumerate(LENS)]
    with mock_llm(folder, max_num_seqs=2, overlap=overlap) as llm:
        outputs = llm.generate([[i + 1] for i in range(len(LENS))], params, use_tqdm=False)
        stats = llm.stats()
    assert stats.free_blocks == stats.num_blocks
    return [output.outputs[0].token_ids for output in outputs], stats.steps


def test_its_place_is_taken_a_step_earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, steps = answers(tmp_path, overlap=True)
    assert [len(each) for each in tokens] == LENS
    assert (tokens, steps) == answers(tmp_path, overlap=False)  # where nothing is in flight when the next is scheduled
    assert steps <= 21
    for module in ("scheduling.scheduler", "execution.runner"):
        monkeypatch.setattr(f"nanoengine.core.{module}.num_slots", lambda count: count)
    without = answers(tmp_path, overlap=True)
    assert without[0] == tokens
    assert without[1] > steps
