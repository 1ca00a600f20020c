"""A request whose last token is in flight leaves its place in the batch to the next one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanoengine import SamplingParams
from nanoengine.api.errors import ConfigError

from .support import greedy, mock_llm, prompts, tokens_of
from .test_drafts import Oracle, with_device_drafts, with_drafts

LENS = [3, 5, 5, 5, 5, 5, 5, 5]


def answers(folder: Path, overlap: bool, spare_slots: int = 8) -> tuple[list[tuple[int, ...]], int]:
    """Tokens, and steps that it took to make 38 of them, two a step at the most."""
    params = [SamplingParams(temperature=0.7, seed=i, max_tokens=n, ignore_eos=True) for i, n in enumerate(LENS)]
    with mock_llm(folder, max_num_seqs=2, overlap=overlap, spare_slots=spare_slots) as llm:
        outputs = llm.generate([[i + 1] for i in range(len(LENS))], params, use_tqdm=False)
        stats = llm.stats()
    assert stats.free_blocks == stats.num_blocks
    return [output.outputs[0].token_ids for output in outputs], stats.steps


def test_its_place_is_taken_a_step_earlier(tmp_path: Path) -> None:
    tokens, steps = answers(tmp_path, overlap=True)
    assert [len(each) for each in tokens] == LENS
    assert (tokens, steps) == answers(tmp_path, overlap=False)  # where nothing is in flight when the next is scheduled
    assert steps <= 21
    without = answers(tmp_path, overlap=True, spare_slots=0)
    assert without[0] == tokens
    assert without[1] > steps


@pytest.mark.parametrize("drafting", [with_drafts, with_device_drafts], ids=["host", "device"])
@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_it_keeps_its_place_while_drafts_are_in_flight(
    tmp_path: Path, drafting: Callable[..., Oracle], accuracy: float
) -> None:
    """They may be refused, and then it goes on: no step has more rows than `max_num_seqs`."""
    asked = [[i, *prompt] for i, prompt in enumerate(prompts(6, shortest=2, longest=5))]
    want, rows = [greedy(prompt, 6 + i) for i, prompt in enumerate(asked)], list[int]()
    params = [SamplingParams(temperature=0, max_tokens=6 + i, speculate=i % 2 == 0) for i in range(6)]
    with mock_llm(tmp_path, max_num_seqs=1) as llm:
        oracle = drafting(llm, asked, want, tokens=4, accuracy=accuracy)
        launch = llm._built.executor.launch

        def launching(plan: Any) -> Any:
            rows.append(plan.num_rows)
            return launch(plan)

        llm._built.executor.launch = launching  # type: ignore[method-assign]
        assert tokens_of(llm.generate(asked, params, use_tqdm=False)) == want
    assert oracle.drafted > 0
    assert max(rows) == 1


def test_the_option_reaches_the_scheduler(tmp_path: Path) -> None:
    with mock_llm(tmp_path, spare_slots=3) as llm:
        assert llm.engine.scheduler.config.spare_slots == 3
    with pytest.raises(ConfigError, match="spare_slots must be 0 or more"):
        mock_llm(tmp_path, spare_slots=-1)
