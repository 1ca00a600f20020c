"""Checks of a scheduler and its blocks. They assert everything that must be true between any two calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from nanoengine.core.request import Request, Status
from nanoengine.core.scheduling.block_manager import BlockManager, Pool
from nanoengine.core.scheduling.queues import Roster
from nanoengine.core.scheduling.scheduler import Scheduler

MOST_IN_FLIGHT = 16  # tokens of a row with drafts


def check_scheduler(scheduler: Scheduler) -> None:
    """Checks requests, slots and blocks."""
    roster, in_flight = scheduler._roster, len(scheduler._in_flight)
    check_blocks(scheduler.blocks, roster.running)
    check_roster(roster)
    for request in roster.running:
        assert 0 <= request.num_computed <= request.length <= request.max_len
        assert 0 <= request.num_in_flight <= in_flight * (MOST_IN_FLIGHT if request.drafted or request.jumps else 1)
        if request.pick_check_at:
            assert request.num_computed == request.length - 1 >= request.prompt_len
            assert request.pick_check_at <= min(request.max_len, request.capacity + 1)
            assert not request.drafted
        if request.commit_check_at:
            assert request.commit_check_at <= min(request.publish_at, request.max_len - 1) - request.prompt_len


def check_roster(roster: Roster) -> None:
    """Checks queues and slots."""
    slots = [request.slot for request in roster.running]
    assert sorted(slots + roster.free_slots) == list(range(roster.num_slots)), "slots leaked or doubled"
    assert roster.owners == {r.slot: (r, r.generation) for r in roster.running}
    for name, places in (("waiting", [r.place for r in roster.waiting]), ("running", [r.rank for r in roster.running])):
        assert all(a < b for a, b in pairwise(places)), f"{name} is out of order"
    for request in roster.running:
        assert request.status is Status.RUNNING
    for request in roster.waiting:
        assert request.status is Status.WAITING and request.slot == -1
        assert request.num_computed == 0 and not request.block_ids
        assert request.pick_check_at == request.commit_check_at == 0
    live = {*roster.running, *roster.waiting}
    assert roster.retry_alone <= live
    assert roster.unsent <= {*roster.running}


def check_blocks(blocks: BlockManager, owners: Iterable[Request]) -> None:
    """Checks that tables, reference counts, free lists and indexes agree. `owners`: all requests that have blocks."""
    owners = list(owners)
    for request in owners:
        assert all(len(t) * blocks.block_size == request.capacity for t in request.block_ids), "groups out of step"
        assert request.capacity >= request.num_computed, f"{request.id} computed tokens that no block holds"
    for group, pool in enumerate(blocks._pools):
        check_pool(pool, [request.block_ids[group] for request in owners])


def check_pool(pool: Pool, tables: Sequence[Sequence[int]]) -> None:
    """Checks that block tables, reference counts, free list and index of one group agree."""
    refs = [0] * len(pool.refs)
    for table in tables:
        assert len(set(table)) == len(table), f"a request owns a block twice: {table}"
        for block in table:
            refs[block] += 1
    assert refs == pool.refs, f"reference counts {pool.refs} are not those of the tables {refs}"
    assert refs[0] == 0, "the dummy block is owned"
    free, block = list[int](), pool.next[0]
    while block:
        assert len(free) < len(refs), f"free list loops at {block}"
        free.append(block)
        block = pool.next[block]
    assert [pool.prev[b] for b in (*free, 0)] == [0, *free], "free list is torn"
    assert sorted(free) == [b for b in range(1, len(refs)) if refs[b] == 0], "the free list is not the unowned blocks"
    assert len(free) == pool.num_free
    assert pool.num_shared == len(refs) - refs.count(0) - refs.count(1), "shared blocks are miscounted"
    assert pool.num_cached == len([b for b in free if pool.entries[b] is not None]), "cached blocks are miscounted"
    entries = {entry.key: b for b, entry in enumerate(pool.entries) if entry}
    assert entries == pool.index, "index and blocks disagree"
    uids = [entry.uid if entry else 0 for entry in pool.entries]
    assert uids == pool.uids.tolist(), "uids are not those of the entries"
    assert pool.live == {uid for uid in uids if uid}, "live uids are not those of the entries"
    assert not any(pool.entries[block] for block in pool.barred), "a barred block is in the index"
