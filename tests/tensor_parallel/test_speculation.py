"""Drafts on two ranks: they are made in the scheduler's process and sent in the plan; every rank keeps the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine import replay_drafter
from engine.support import mock_llm, prompts, tokens_of
from engine.test_same_tokens import seeded

REPLAY = {"method": "replay", "accuracy": 0.7}


@pytest.mark.parametrize("drafter", [REPLAY, {"method": "follow_on_device"}], ids=["host", "device"])
def test_two_ranks_say_the_same_with_drafts(tmp_path: Path, drafter: dict[str, Any]) -> None:
    """Under pressure: chunks, prefix hits, preemption; right and wrong drafts."""
    asked = [[i, *prompt] for i, prompt in enumerate(prompts(8, shared=9, longest=12))]
    params = [each.replace(allowed_token_ids=[5, 9, 17]) for each in seeded(len(asked))]
    options = {"num_gpu_blocks_override": 40, "max_num_batched_tokens": 24}
    speculation = {**drafter, "tokens": 4, "min_acceptance": 0.0}
    with mock_llm(tmp_path, **options) as llm:
        want = tokens_of(llm.generate(asked, params, use_tqdm=False))
    with mock_llm(
        tmp_path, plugins=[replay_drafter], speculation=speculation, tensor_parallel_size=2, device="cpu", **options
    ) as llm:
        for _ in range(2):
            assert tokens_of(llm.generate(asked, params, use_tqdm=False)) == want
        stats = llm.stats()
    assert 0 < stats.accepted < stats.drafted
    assert stats.preemptions > 0
    assert stats.chunks > 0
    assert stats.free_blocks == stats.num_blocks
