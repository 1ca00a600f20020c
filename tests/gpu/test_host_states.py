"""Host states on a GPU, bit for bit on the mock model: forward passes by graphs and step by step, masks by the kernel
and by torch; and a step is launched before the one before it is awaited."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import chain_plugin
from engine.support import greedy, mock_llm, prompts, tokens_of
from engine.test_host_states import CHAIN, JUMPS, PLUGIN, asked_together, chained, watched

from nanoengine import SamplingParams

from .support import ON_GPU, runner_of
from .test_same_tokens import MODES, WAYS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", ["plain", "chunked", "preempted", "cached", "churn"])
def test_the_tokens_are_those_of_the_history(tmp_path: Path, way: str, mode: str) -> None:
    options, asked, happened = WAYS[way]
    kinds, lengths = [CHAIN, JUMPS, SamplingParams(temperature=0)], [24 - i % 7 for i in range(len(asked))]
    params = [kinds[i % 3].replace(max_tokens=length) for i, length in enumerate(lengths)]
    with mock_llm(tmp_path, plugins=[PLUGIN], **{**ON_GPU, **options, **MODES[mode]}) as llm:
        found = tokens_of(llm.generate(asked, params, use_tqdm=False))
        stats = llm.stats()
    each = enumerate(zip(asked, lengths, strict=True))
    want = [(chained(p, n), chained(p, n, -5), greedy(p, n))[i % 3] for i, (p, n) in each]
    assert found == want
    assert happened(stats), stats
    assert (stats.graph_steps > 0) is ("graphs" in mode)
    assert stats.free_blocks == stats.num_blocks


@pytest.mark.parametrize("options", [{}, {"enforce_eager": True}, {"fuse_kernels": False}], ids=str)
def test_draws_are_those_of_a_cpu(tmp_path: Path, options: Mapping[str, Any]) -> None:
    """Random rows with masks, and rows without any beside them."""
    asked = prompts(12, seed=6)
    params = [CHAIN.replace(temperature=1.5, chain=9 * (i % 3), seed=i, top_p=0.9) for i in range(12)]
    found = []
    for device in ({"device": "cpu"}, {**ON_GPU, **options}):
        with mock_llm(tmp_path / device["device"], plugins=[PLUGIN], **device) as llm:
            found.append(tokens_of(llm.generate(asked, params, use_tqdm=False)))
    assert found[0] == found[1]


def test_a_step_is_launched_before_the_one_before_it_is_awaited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mock_llm(tmp_path, plugins=[PLUGIN], **ON_GPU) as llm:
        llm.generate([[1, 2]], CHAIN, use_tqdm=False)  # compiles
        events = watched(llm, monkeypatch)
        assert tokens_of(llm.generate([[1, 2]], CHAIN.replace(max_tokens=6), use_tqdm=False)) == [chained([1, 2], 6)]
    first = events[0][1]
    for n in range(first + 1, first + 6):
        at = events.index(("launch", n))
        assert events[at : at + 3] == [("launch", n), ("wait", n - 1), ("supply", n)]


def test_a_supply_waits_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's alarm stays silent while columns are sent and the tail is launched behind them."""
    from nanoengine.core.execution.runner import ModelRunner

    supply, calls = ModelRunner._supply, [0]

    def watched_supply(*args: Any) -> Any:
        calls[0] += 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            return supply(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with mock_llm(tmp_path, plugins=[chain_plugin], **ON_GPU) as llm:
        params = [CHAIN, CHAIN.replace(temperature=1.2, seed=3), CHAIN.replace(pair=(3, 4), pair_walks=True)]
        want = tokens_of(llm.generate(prompts(3), params, use_tqdm=False))
        monkeypatch.setattr(ModelRunner, "_supply", watched_supply)
        assert tokens_of(llm.generate(prompts(3), params, use_tqdm=False)) == want
    assert calls[0] > 5


@pytest.mark.parametrize(("together", "on"), [(False, True), (True, True), (True, False)])
def test_late_steps_end_in_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: bool, on: bool) -> None:
    """Tokens of a CPU, and no late step that is replayed ends in an eager tail. States that are asked together write
    their masks where they are sent from. on: the kernels and the copy that masks have by default."""
    seen = asked_together(monkeypatch) if together else []
    asked = prompts(7, seed=6)
    params = [CHAIN.replace(temperature=1.5 * (i % 2), chain=9 * (i % 3), seed=i, top_k=7 * (i % 2)) for i in range(6)]
    params.append(CHAIN.replace(wrong="nothing", wrong_at=4))
    found = []
    kernels = {} if on else {"mask_in_scan": False, "masks_beside": False}
    for device in ({"device": "cpu"}, {**ON_GPU, "kernels": kernels}):
        with mock_llm(tmp_path / device["device"], plugins=[chain_plugin], **device) as llm:
            outputs = llm.generate(asked, params, use_tqdm=False)
            tail = runner_of(llm).graphs.tail
            stats = llm.stats()
        found.append([o.error.code if o.error is not None else o.outputs[0].token_ids for o in outputs])
    assert found[0] == found[1]
    assert found[1][-1] == "nothing_left"
    assert stats.graph_tails == stats.graph_steps + stats.mixed_graph_steps > 5
    assert tail is not None
    assert (tail._mask.stream is not None) is on
    assert (max(seen, default=0) > 2) is together
