"""The checks must be able to fail: each mutant breaks one rule, and the random runs that pass without it catch it."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import takewhile
from typing import Any

import numpy as np
import pytest
from sched_harness import BreakingLoop, random_ops, run_ops

from nanoengine.core import host_states
from nanoengine.core.request import Status
from nanoengine.core.scheduling import commit, draft
from nanoengine.core.scheduling.block_manager import BlockManager, Pool, Run
from nanoengine.core.scheduling.draft import Draft
from nanoengine.core.scheduling.queues import Roster
from nanoengine.core.scheduling.scheduler import Scheduler
from nanoengine.params.host_states import BoundState

Patch = Callable[[pytest.MonkeyPatch], None]


def runs(seeds: range, check: bool = True, **options: Any) -> None:
    for seed in seeds:
        rng = random.Random(seed)
        loop = BreakingLoop(
            False,
            **{"num_blocks": rng.choice((9, 12, 30)), "budget": rng.choice((3, 6, 12, 40)), "max_num_seqs": 4}
            | {"groups": 1 + seed % 2, "overlap": seed % 4 != 0}
            | options,
        )
        if not check:
            loop.checks = False
        run_ops(loop, random_ops(rng, 40))


def freed_too_early(patch: pytest.MonkeyPatch) -> None:
    """A shared block counts one owner only."""
    share = Pool.share

    def broken(pool, blocks):
        share(pool, [block for block in blocks if pool.refs[block] == 0])

    patch.setattr(Pool, "share", broken)
    patch.setattr(Pool, "give_back", _give_back_leniently)


_give_back = Pool.give_back


def _give_back_leniently(pool: Pool, blocks: list[int]) -> None:
    for block in blocks:
        if pool.refs[block]:
            _give_back(pool, [block])


def freed_while_running(patch: pytest.MonkeyPatch) -> None:
    """A running request's first block goes back to the pool when it grows."""
    grow = BlockManager.grow

    def broken(blocks, request, num_tokens):
        done = grow(blocks, request, num_tokens)
        if done and len(request.block_ids[0]) == 3:
            blocks._pools[0].give_back(request.block_ids[0][:1])
        return done

    patch.setattr(BlockManager, "grow", broken)
    patch.setattr(Pool, "give_back", _give_back_leniently)


def freed_twice(patch: pytest.MonkeyPatch) -> None:
    release = BlockManager.release

    def broken(blocks, request):
        table = [list(each) for each in request.block_ids]
        release(blocks, request)
        request.block_ids = table
        release(blocks, request)

    patch.setattr(BlockManager, "release", broken)


def leaked(patch: pytest.MonkeyPatch) -> None:
    release = BlockManager.release

    def broken(blocks, request):
        request.block_ids = [table[:-1] for table in request.block_ids]
        release(blocks, request)

    patch.setattr(BlockManager, "release", broken)


def hit_not_capped(patch: pytest.MonkeyPatch) -> None:
    """All of a prompt's blocks may be hit, so that no token is left to compute."""
    match = BlockManager.match

    def broken(blocks, request):
        request.output_token_ids.append(0)
        hits = match(blocks, request)
        request.output_token_ids.pop()
        return hits

    patch.setattr(BlockManager, "match", broken)


def dead_row_kept(patch: pytest.MonkeyPatch) -> None:
    """Commit takes the row of a request that ended one step before."""
    commit, remove = Scheduler.commit, Roster.remove

    def broken(self, step, result):
        dead = {r for r, _ in step.rows if r.status is Status.FINISHED}
        for request in dead:
            request.status = Status.WAITING
            request.max_len += 1
        try:
            return commit(self, step, result)
        finally:
            for request in dead:
                request.status = Status.FINISHED

    patch.setattr(Scheduler, "commit", broken)
    patch.setattr(Roster, "remove", lambda self, r: r in (*self.running, *self.waiting) and remove(self, r))


def published_before_written(patch: pytest.MonkeyPatch) -> None:
    """The first chunk publishes the whole prompt, as far as blocks are there; the rest is written later or never."""

    def broken(blocks, request, num_tokens):
        return publish(blocks, request, min(request.capacity, max(num_tokens, request.prompt_len)))

    publish = BlockManager.publish
    grow = BlockManager.grow
    patch.setattr(BlockManager, "publish", broken)
    patch.setattr(BlockManager, "grow", lambda blocks, r, n: grow(blocks, r, max(n, min(r.prompt_len, 4 * 9))))


def not_withdrawn(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "withdraw", lambda self, published: None)


def failed_rows_stay_in_the_index(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(BlockManager, "bar", lambda self, request: None)


def only_the_own_blocks_of_a_failed_row_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    """Not those that it, or a request before it, published before it ended."""

    def broken(blocks, request):
        for pool, table in zip(blocks._pools, request.block_ids, strict=False):
            for block in table:
                pool.bar(block)

    patch.setattr(BlockManager, "bar", broken)


def orphans_keep_their_place(patch: pytest.MonkeyPatch) -> None:
    """An entry whose predecessor is gone still keeps another one out."""
    patch.setattr(Pool, "reaches", lambda pool, parent: True)


def found_blocks_are_not_looked_at_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Pool, "still_there", lambda pool, run: run)


def token_of_a_victim_lost(patch: pytest.MonkeyPatch) -> None:
    """Commit drops the row of a preempted request as if it had ended."""
    commit = Scheduler.commit

    def broken(self, step, result):
        moved = [r for r, generation in step.rows if r.status is Status.WAITING]
        for request in moved:
            request.status = Status.FINISHED
        try:
            return commit(self, step, result)
        finally:
            for request in moved:
                request.status = Status.WAITING

    patch.setattr(Scheduler, "commit", broken)


def flight_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A preempted request counts as having all its tokens, though one is in flight."""
    preempt = Roster.preempt

    def broken(self, request, *why):
        preempt(self, request, *why)
        request.length = request.num_tokens
        request.last_prefill = -1

    patch.setattr(Roster, "preempt", broken)


def outputs_not_sent_again(patch: pytest.MonkeyPatch) -> None:
    """A preempted request's slot gets the prompt only."""
    new_slots = draft._new_slots

    def broken(new):
        kept = {request: request.output_token_ids for request in new}
        for request in new:
            request.output_token_ids = [0] * len(kept[request])
        out = new_slots(new)
        for request in new:
            request.output_token_ids = kept[request]
        return out

    patch.setattr(draft, "_new_slots", broken)


def stale_columns(patch: pytest.MonkeyPatch) -> None:
    """Columns go to the next slot."""
    columns = draft._processor_columns

    def broken(new):
        out = columns(new)
        for column in out:
            column.slots[:] = (column.slots + 1) % 4
        return out

    patch.setattr(draft, "_processor_columns", broken)


def columns_of_the_draw_before(patch: pytest.MonkeyPatch) -> None:
    """A host state does not get the newest token."""
    feed = BoundState.feed
    patch.setattr(BoundState, "feed", lambda self, output: feed(self, output[:-1]))


def states_fed_twice(patch: pytest.MonkeyPatch) -> None:
    feed = BoundState.feed

    def broken(self, output):
        self.fed = max(0, self.fed - 1)
        feed(self, output)

    patch.setattr(BoundState, "feed", broken)


def states_of_other_rows_are_asked(patch: pytest.MonkeyPatch) -> None:
    """As many rows as in the last late step are taken for the same ones."""
    asked = host_states._asked

    def broken(step, last):
        return last.groups if last.rows and len(last.rows) == len(step.rows) else asked(step, last)

    patch.setattr(host_states, "_asked", broken)


def block_sent_to_the_wrong_place(patch: pytest.MonkeyPatch) -> None:
    appends = draft._block_appends

    def broken(grown):
        out = appends(grown)
        out.block[:] = out.block[::-1].copy()
        return out

    patch.setattr(draft, "_block_appends", broken)


def ends_one_early(patch: pytest.MonkeyPatch) -> None:
    append = commit._append

    def broken(request, new):
        request.max_len -= 1
        kept = append(request, new)
        request.max_len += 1
        return kept

    patch.setattr(commit, "_append", broken)


def length_counts_known_tokens_only(patch: pytest.MonkeyPatch) -> None:
    """A row is made although the token in flight ends the request: shown by the dead row that it leaves."""
    pick = Scheduler._pick_running

    def broken(self, draft):
        full = [r for r in self.running if r.num_in_flight and r.length >= r.max_len]
        for request in full:
            request.max_len += 1
        pick(self, draft)
        for request in full:
            request.max_len -= 1

    patch.setattr(Scheduler, "_pick_running", broken)


def budget_ignored(patch: pytest.MonkeyPatch) -> None:
    book = Draft.book

    def broken(self, request, num_new):
        before = self.budget
        book(self, request, num_new)
        self.budget = before

    patch.setattr(Draft, "book", broken)


def shared_for_ever(patch: pytest.MonkeyPatch) -> None:
    """A block that one request is left to own still counts as shared."""
    give_back = Pool.give_back

    def broken(pool, blocks):
        blocks = list(blocks)
        pool.num_shared += [pool.refs[block] for block in blocks].count(2)
        give_back(pool, blocks)

    patch.setattr(Pool, "give_back", broken)


def cached_for_ever(patch: pytest.MonkeyPatch) -> None:
    """A cached block that is reused still counts as cached."""
    take = Pool.take

    def broken(pool, count):
        before = pool.num_cached
        taken = take(pool, count)
        pool.num_cached = before
        return taken

    patch.setattr(Pool, "take", broken)


def refused_drafts_count(patch: pytest.MonkeyPatch) -> None:
    """A row's drafts count as computed, whatever was drawn."""
    original = commit._commit_row

    def broken(request, generation, row, roster, updates):
        original(request, generation, row._replace(drawn=min(row.drawn, 1)), roster, updates)

    patch.setattr(commit, "_commit_row", broken)


def drafts_run_ahead(patch: pytest.MonkeyPatch) -> None:
    """Drafts are made while the token before them is not known."""
    original = Scheduler._is_in_flight
    patch.setattr(Scheduler, "_is_in_flight", lambda self, r: original(self, r) and not r.drafted)


def drafts_beyond_the_length(patch: pytest.MonkeyPatch) -> None:
    original = Draft.room_for_drafts

    def broken(step, request, num_new, most, blocks):
        limit, request.max_len = request.max_len, request.max_len + 4
        room = original(step, request, num_new, most, blocks)
        request.max_len = limit
        return room

    patch.setattr(Draft, "room_for_drafts", broken)


def drafts_without_blocks(patch: pytest.MonkeyPatch) -> None:
    def broken(step, request, num_new, most, blocks):
        end = request.num_computed + num_new
        known = num_new == 1 and end == request.length > request.prompt_len
        return max(0, min(most, step.budget - 1, request.max_len - 1 - end)) if known else 0

    patch.setattr(Draft, "room_for_drafts", broken)


def drafts_beyond_the_budget(patch: pytest.MonkeyPatch) -> None:
    original = Draft.room_for_drafts

    def broken(step, *asked):
        step.budget += 4
        room = original(step, *asked)
        step.budget -= 4
        return room

    patch.setattr(Draft, "room_for_drafts", broken)


DRAFT_MUTANTS: list[Patch] = [
    refused_drafts_count,
    drafts_run_ahead,
    drafts_beyond_the_length,
    drafts_without_blocks,
    drafts_beyond_the_budget,
]
MUTANTS: list[Patch] = [
    freed_too_early,
    freed_while_running,
    freed_twice,
    leaked,
    hit_not_capped,
    dead_row_kept,
    published_before_written,
    not_withdrawn,
    failed_rows_stay_in_the_index,
    only_the_own_blocks_of_a_failed_row_are_forgotten,
    orphans_keep_their_place,
    found_blocks_are_not_looked_at_again,
    token_of_a_victim_lost,
    flight_forgotten,
    outputs_not_sent_again,
    stale_columns,
    shared_for_ever,
    cached_for_ever,
    columns_of_the_draw_before,
    states_fed_twice,
    states_of_other_rows_are_asked,
    block_sent_to_the_wrong_place,
    ends_one_early,
    length_counts_known_tokens_only,
    budget_ignored,
]
SEEDS = range(24)


def test_no_mutant_no_failure():
    runs(SEEDS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda each: each.__name__)
def test_mutants_are_caught(mutant, monkeypatch):
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        runs(SEEDS)


@pytest.mark.parametrize("on_device", [False, True])
def test_no_mutant_no_failure_with_drafts(on_device):
    runs(SEEDS, drafts=6, on_device=on_device)


@pytest.mark.parametrize("mutant", DRAFT_MUTANTS, ids=lambda each: each.__name__)
def test_mutants_of_drafts_are_caught(mutant, monkeypatch):
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        runs(SEEDS, drafts=6)


def test_refused_drafts_of_the_device_that_count_are_seen(monkeypatch):
    refused_drafts_count(monkeypatch)
    with pytest.raises(AssertionError):
        runs(SEEDS, drafts=6, on_device=True)


@pytest.mark.parametrize(
    "mutant", [freed_too_early, freed_while_running, published_before_written, not_withdrawn], ids=lambda m: m.__name__
)
def test_tokens_alone_catch_wrong_blocks(mutant, monkeypatch):
    """Without the invariants' help: the mock's tokens show it."""
    mutant(monkeypatch)
    with pytest.raises(AssertionError, match=r"wrong tokens|two rows write one KV slot|is not published"):
        runs(range(60), check=False)


def test_unverified_index_gives_wrong_tokens(monkeypatch):
    def follow(pool, keys, parent, tokens):
        blocks = np.array([pool.index[key] for key in takewhile(pool.index.__contains__, keys)], dtype=np.int64)
        return Run(blocks, pool.uids[blocks])

    def publish(pool, block, key, parent, tokens, uid):
        taken = pool.index.get(key)
        return original(pool, block, key, parent, tokens, uid) if taken is None else pool.entries[taken].uid

    original = Pool.publish
    monkeypatch.setattr(Pool, "publish", publish)
    monkeypatch.setattr(Pool, "follow", follow)
    with pytest.raises(AssertionError, match="wrong tokens"):
        runs(SEEDS, check=False, hash_fn=lambda data: b"same")
