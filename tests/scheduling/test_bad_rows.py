"""A token whose KV is not finite breaks all that reads it: only the requests that hold this token themselves fail."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sched_harness import VOCAB, BreakingLoop, random_ops, run_ops

from nanoengine.core.request import Request, Status
from nanoengine.core.scheduling import commit
from nanoengine.core.scheduling.block_manager import BlockManager
from nanoengine.core.scheduling.messages import Update
from nanoengine.core.step import ROW_BAD_LOGITS, ROW_FINE, StepPlan, StepResult
from nanoengine.testing.mock_runner import MockRunner

BAD = VOCAB  # a token that only prompts hold


class NanRunner(MockRunner):
    """KV is NaN where a row with such a token wrote it, or one that read NaN; rows that read NaN have bad logits."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.nan = np.zeros(self.kv.shape, dtype=np.bool_)
        self.fail_row = lambda plan, row: ROW_BAD_LOGITS if self.is_bad(plan, row) else ROW_FINE

    def is_bad(self, plan: StepPlan, row: int) -> bool:
        return self._reads_nan(int(plan.slots[row]), int(plan.starts[row] + plan.query_lens[row]))

    def _reads_nan(self, slot: int, length: int) -> bool:
        positions = np.arange(length)
        blocks = self.block_tables[:, slot, positions // self.block_size]
        return bool(self.nan[np.arange(len(self.nan))[:, None], blocks, positions % self.block_size].any())

    def _forward(self, slot: int, start: int, end: int) -> int:
        bad = self._reads_nan(slot, start) or BAD in self.token_ids[slot, start:end]
        for position in range(start, end):  # NaN of later tokens of a chunk reaches the earlier ones
            blocks = self.block_tables[:, slot, position // self.block_size]
            self.nan[np.arange(len(self.nan)), blocks, position % self.block_size] = bad
        return super()._forward(slot, start, end)

    def _run(self, plan: StepPlan) -> StepResult:
        """A row whose prompt log-probs are NaN fails, too."""
        result = super()._run(plan)
        failed = result.failed.copy()
        for row in set(result.prompt_logprobs.rows.tolist()):
            failed[row] = max(failed[row], ROW_BAD_LOGITS * self.is_bad(plan, row))
        fine = failed[np.repeat(np.arange(plan.num_rows), result.counts)] == ROW_FINE
        counts = np.where(failed == ROW_FINE, result.counts, 0).astype(np.int32)
        return replace(result, failed=failed, counts=counts, token_ids=result.token_ids[fine])


class NanLoop(BreakingLoop):
    def __init__(self, **options: Any) -> None:
        super().__init__(False, **options)
        self.runner = NanRunner(
            groups=len(self.pools),
            num_blocks=self.blocks.num_blocks + 1,
            block_size=self.blocks.block_size,
            max_num_seqs=self.config.max_num_seqs,
            max_model_len=self.config.max_model_len,
            vocab=VOCAB,
        )
        self.computed_again = {True: 0, False: 0}  # by whether the request had been preempted when its row failed

    def spoil_kv(self, request: Request) -> list[list[int]]:
        """Its blocks, which the index must not hold; the runner itself has made bad what is bad."""
        kv = self.runner.kv.copy()
        blocks = super().spoil_kv(request)
        self.runner.kv = kv
        return blocks

    def commit(self) -> list[Update]:
        before = {request: (request.void_generation, request.status) for request in self.requests}
        updates = super().commit()
        for request, (void, status) in before.items():
            self.computed_again[status is Status.WAITING] += request.void_generation != void
        return updates


def crowd(seed: int) -> NanLoop:
    """A run of requests of which every fourth has a bad token; only those fail, and none of them gets through."""
    rng = random.Random(seed)
    loop = NanLoop(
        num_blocks=rng.choice((12, 20, 40, 100)),
        block_size=rng.choice((1, 2, 4)),
        budget=rng.choice((3, 8, 20, 64)),
        max_num_seqs=rng.choice((2, 4, 8)),
        policy=rng.choice(("fcfs", "priority")),
        groups=rng.choice((1, 2)),
    )
    ops = random_ops(rng, 70, host=False, breaks=seed % 4 == 0)
    for name, request in ops:
        if name == "add" and rng.random() < 0.25:
            request["prompt"].insert(rng.randrange(len(request["prompt"]) + 1), BAD)
    run_ops(loop, ops)
    for request, end in loop.ended.items():
        if end.stop_reason != "kv_cache_full" and request not in loop.failed:
            holds_bad = BAD in request.prompt_token_ids
            code = None if end.error is None else end.error.code
            assert code == ("bad_logits" if holds_bad else None), f"seed {seed}, request {request.id}"
    return loop


SEEDS = (*range(6), 7, 15, 78)  # in some of them a request is preempted while its bad row is in flight


def test_only_the_requests_with_a_bad_token_fail():
    loops = [crowd(seed) for seed in SEEDS]
    assert sum(loop.computed_again[False] for loop in loops) > 5
    assert sum(loop.computed_again[True] for loop in loops) > 1, "none was preempted while its bad row was in flight"


def preempted_ones_fail(patch: pytest.MonkeyPatch) -> None:
    fail_row = commit._fail_row

    def broken(request: Request, generation: int, *rest: Any) -> None:
        request.borrowed *= request.generation == generation
        fail_row(request, generation, *rest)

    patch.setattr(commit, "_fail_row", broken)


def what_was_borrowed_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Request, "borrowed", property(lambda self: 0, lambda self, value: None))


def bad_blocks_stay_in_the_index(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "bar", lambda self, request: None)


def the_cache_is_read_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Request, "may_read_cache", True)


MUTANTS = [
    preempted_ones_fail,
    what_was_borrowed_is_forgotten,
    bad_blocks_stay_in_the_index,
    the_cache_is_read_again,
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda each: each.__name__)
def test_mutants_are_caught(mutant, monkeypatch):
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        test_only_the_requests_with_a_bad_token_fail()
