"""The same tokens every way, bit for bit on the mock model; each way is seen to have happened, and mutants to fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoengine import LLM, SamplingParams
from nanoengine.api.stats import EngineStats

from .support import greedy, mock_llm, prompts, tokens_of

COUNT = 24  # output tokens
GREEDY = SamplingParams(temperature=0, max_tokens=COUNT)

Check = Callable[[EngineStats], bool]

# name -> (engine options, prompts, what must have happened)
WAYS: dict[str, tuple[dict[str, Any], list[list[int]], Check]] = {
    "plain": ({}, prompts(8), lambda s: s.preemptions == 0),
    "batch 1": ({"max_num_seqs": 1}, prompts(4), lambda s: s.steps > 4 * COUNT - 8),
    "batch 32": ({"max_num_seqs": 32}, prompts(32), lambda s: s.steps < 3 * COUNT),
    "no overlap": ({"overlap": False}, prompts(8), lambda s: s.steps > 0),
    "chunked": ({"max_num_batched_tokens": 16}, prompts(8, shortest=20, longest=60), lambda s: s.chunks > 8),
    "mixed": ({"max_num_batched_tokens": 24}, prompts(12, longest=50), lambda s: s.mixed_steps > 3),
    "budget below rows": ({"max_num_batched_tokens": 3}, prompts(6, longest=12), lambda s: s.chunks > 6),
    "cached": ({}, prompts(8, shared=21, longest=9) * 2, lambda s: s.prefix_hit_tokens >= 20 * 8),
    "not cached": ({"enable_prefix_caching": False}, prompts(8, shared=21) * 2, lambda s: s.prefix_hit_tokens == 0),
    "preempted": ({"num_gpu_blocks_override": 24}, prompts(8, shortest=6, longest=14), lambda s: s.preemptions > 2),
    "preempted, chunked, cached": (
        {"num_gpu_blocks_override": 24, "max_num_batched_tokens": 7},
        prompts(10, shared=9, longest=10),
        lambda s: s.preemptions > 0 and s.chunks > 0 and s.prefix_hit_tokens > 0,
    ),
    "one-token blocks": ({"block_size": 1}, prompts(6), lambda s: s.steps > 0),
}


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("name", WAYS)
def test_greedy_tokens_are_those_of_the_history(tmp_path: Path, name: str, overlap: bool) -> None:
    options, asked, happened = WAYS[name]
    with mock_llm(tmp_path, **{"overlap": overlap, **options}) as llm:
        found = tokens_of(llm.generate(asked, GREEDY, use_tqdm=False))
        stats = llm.stats()
    assert found == [greedy(p, COUNT) for p in asked]
    assert happened(stats), stats
    assert stats.steps_broken == 0
    assert stats.free_blocks == stats.num_blocks


def seeded(count: int) -> list[SamplingParams]:
    """A different recipe a request, so that a row that reads its neighbour's column gives other tokens."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.3},
        {"temperature": 0.8, "top_k": 11},
        {"temperature": 1.5, "top_p": 0.7},
        {"temperature": 2.0, "min_p": 0.02, "presence_penalty": 0.7},
        {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
        {"temperature": 0},
        {"temperature": 1.1, "logit_bias": {5: 4.0, 17: -3.0}},
        {"temperature": 1.1, "allowed_token_ids": [1, 2, 3, 5, 8, 13, 21, 34, 55, 89]},
    ]
    return [SamplingParams(max_tokens=COUNT, seed=i, **kinds[i % len(kinds)]) for i in range(count)]


@pytest.mark.parametrize("name", WAYS)
def test_seeded_tokens_do_not_depend_on_the_way(tmp_path: Path, name: str) -> None:
    options, asked, happened = WAYS[name]
    params = seeded(len(asked))
    alone = []
    with mock_llm(tmp_path, overlap=False, enable_prefix_caching=False) as llm:
        for prompt, param in zip(asked, params, strict=True):
            alone += tokens_of(llm.generate([prompt], param, use_tqdm=False))
    with mock_llm(tmp_path, **options) as llm:
        together = tokens_of(llm.generate(asked, params, use_tqdm=False))
        assert happened(llm.stats()), llm.stats()
        assert llm.stats().steps_broken == 0
    assert together == alone
    assert len(set(alone)) > len(alone) // 2


def run_staggered(
    llm: LLM, asked: Sequence[Sequence[int]], every: int, abort: Sequence[int]
) -> dict[str, tuple[int, ...]]:
    """Requests arrive every few steps; those in `abort` are aborted four steps later."""
    done: dict[str, tuple[int, ...]] = {}
    step = arrived = 0
    while arrived < len(asked) or llm.text_engine.has_unfinished_requests():
        if step % every == 0 and arrived < len(asked):
            llm.text_engine.add_request(str(arrived), asked[arrived], GREEDY)
            arrived += 1
        for i in abort:
            if step == i * every + 4:
                llm.engine.abort_request(str(i))
        for output in llm.text_engine.step():
            if output.finished:
                done[output.request_id] = output.outputs[0].token_ids
                assert output.outputs[0].finish_reason == ("abort" if int(output.request_id) in abort else "length")
        step += 1
    return done


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("blocks", [1024, 30])
def test_staggered_arrival_and_aborts_beside(tmp_path: Path, overlap: bool, blocks: int) -> None:
    asked, abort = prompts(14, shared=5, longest=20), [2, 5, 9]
    with mock_llm(tmp_path, overlap=overlap, num_gpu_blocks_override=blocks) as llm:
        done = run_staggered(llm, asked, 3, abort)
        stats = llm.stats()
    for i, prompt in enumerate(asked):
        expected = greedy(prompt, COUNT)
        if i in abort:
            assert done[str(i)] == expected[: len(done[str(i)])]
            assert len(done[str(i)]) < COUNT
        else:
            assert done[str(i)] == expected
    assert stats.prefix_hit_tokens > 0
    assert (stats.preemptions > 0) == (blocks == 30)
    assert stats.free_blocks == stats.num_blocks


@given(data=st.data())
@settings(max_examples=15)
def test_any_engine_gives_the_same_tokens(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    draw = data.draw
    asked = prompts(
        draw(st.integers(1, 8)),
        seed=draw(st.integers(0, 99)),
        longest=draw(st.integers(1, 30)),
        shared=draw(st.integers(0, 12)),
    )
    options = {
        "max_num_seqs": draw(st.integers(1, 6)),
        "max_num_batched_tokens": draw(st.integers(1, 40)),
        "block_size": draw(st.sampled_from([1, 2, 4, 8])),
        "num_gpu_blocks_override": draw(st.integers(66, 120)),
        "enable_prefix_caching": draw(st.booleans()),
        "overlap": draw(st.booleans()),
        "scheduling_policy": draw(st.sampled_from(["fcfs", "priority"])),
    }
    eos = draw(st.lists(st.integers(0, 96), max_size=12))
    with mock_llm(tmp_path_factory.mktemp("any"), eos=eos, **options) as llm:
        found = tokens_of(llm.generate(asked, GREEDY, priority=[i % 3 for i in range(len(asked))], use_tqdm=False))
        stats = llm.stats()
    assert found == [greedy(p, COUNT, eos) for p in asked]
    assert stats.free_blocks == stats.num_blocks


# -- mutants: each breaks one thing, and the comparison above must see it ---------------------------------------------


def _stale_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot keeps its last owner's columns of one value."""
    from nanoengine.core.execution.slots import FixedTable

    monkeypatch.setattr(FixedTable, "reset", lambda self, slots: None)


def _stale_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot keeps its last owner's ragged columns."""
    from nanoengine.core.execution.slots import RaggedTable

    monkeypatch.setattr(RaggedTable, "reset", lambda self, slots: None)


def _token_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoengine.kernels import step_inputs

    original = step_inputs.settle

    def settle(state: Any, slots: Any, start_loc: Any, tokens: Any, *drawn: Any, **sizes: Any) -> None:
        original(state, slots, start_loc, tokens.roll(1), *drawn, **sizes)

    monkeypatch.setattr(step_inputs, "settle", settle)


def _hits_unwritten_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoengine.core.execution.slots import SlotTables

    original = SlotTables.write

    def write(self: SlotTables, plan: Any) -> None:
        original(self, plan)
        self.block_tables[:, :, 1] = 1

    monkeypatch.setattr(SlotTables, "write", write)


def _one_position_late(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoengine.kernels import step_inputs

    original = step_inputs.settle

    def settle(state: Any, slots: Any, start_loc: Any, *drawn: Any, **sizes: Any) -> None:
        original(state, slots, start_loc, *drawn, **sizes)
        state.num_computed[slots] -= (start_loc.diff() > 1).long()

    monkeypatch.setattr(step_inputs, "settle", settle)


MUTANTS = [_stale_numbers, _stale_lists, _token_not_written, _hits_unwritten_blocks, _one_position_late]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: Callable[..., None]) -> None:
    """Every request still ends well, with other tokens: a mutant that merely crashes shows nothing.

    Many requests over few slots, so that slots change owners while others want what the last owner wanted.
    """
    asked = prompts(32, shortest=6, longest=30)
    params = [p.replace(seed=8 * turn + i) for turn in range(4) for i, p in enumerate(seeded(8)[:: 1 - turn % 2 * 2])]

    def run() -> list[tuple[int, ...]]:
        with mock_llm(tmp_path, max_num_batched_tokens=40, max_num_seqs=3) as llm:
            return tokens_of(llm.generate(asked, params, use_tqdm=False))

    good = run()
    mutant(monkeypatch)
    bad = run()
    assert [len(tokens) for tokens in bad] == [len(tokens) for tokens in good] == [COUNT] * 32
    assert sum(one != other for one, other in zip(bad, good, strict=True)) > 0
