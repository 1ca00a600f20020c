"""The block pool and the prefix index by themselves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sched_harness import Loop, prompt_of

from nanoengine.core.request import Request
from nanoengine.core.scheduling.block_manager import BlockManager
from nanoengine.core.scheduling.block_pool import Pool


def owner(loop_or_none: Loop | None, prompt: list[int], **kwargs) -> Request:
    return (loop_or_none or Loop()).request(prompt, **kwargs)


def compute(blocks: BlockManager, request: Request) -> int:
    """Claims what is there, computes the rest at once, publishes -> blocks hit."""
    hits = blocks.match(request)
    assert blocks.claim(request, hits, request.num_tokens)
    assert blocks.grow(request, request.num_tokens)
    request.num_computed = request.num_tokens
    blocks.publish(request, request.num_tokens)
    blocks.check([request])
    return len(hits[0])


def pass_through(blocks: BlockManager, prompt: list[int]) -> int:
    request = owner(None, prompt)
    hits = compute(blocks, request)
    blocks.release(request)
    blocks.check([])
    return hits


@given(st.lists(st.integers(0, 30), max_size=60))
def test_pool_against_a_plain_list(picks):
    """take, give_back and share against a list that does the same in O(n)."""
    pool, model, owned = Pool(9), list(range(1, 9)), []
    for pick in picks:
        if pick % 3 and model:
            owned.append(pool.take())
            assert owned[-1] == model.pop(0)
        elif pick % 2 and model:
            block = model.pop(pick % len(model))
            pool.share(block)
            owned.append(block)
        elif owned:
            block = owned.pop(pick % len(owned))
            pool.give_back(block)
            if block not in owned:
                model.insert(0, block)  # it was never published
        walk, at = [], pool.next[0]
        while at:
            walk.append(at)
            at = pool.next[at]
        assert walk == model
        assert pool.num_free == len(model)


def test_the_head_of_a_prefix_lives_longest():
    blocks = BlockManager(1, 7, 4, True)
    assert pass_through(blocks, prompt_of(25)[:24]) == 0
    assert pass_through(blocks, prompt_of(8, 1)) == 0  # takes two blocks: those of the tail
    assert pass_through(blocks, [*prompt_of(24), 1][:21]) == 4


def test_least_recently_used_prefix_goes_first():
    blocks = BlockManager(1, 7, 4, True)
    first, second, third = (prompt_of(9, salt)[:9] for salt in range(3))
    for prompt in (first, second, first, third):
        pass_through(blocks, prompt)
    assert pass_through(blocks, first) == 2
    assert len(blocks.match(owner(None, second))[0]) < 2


def test_unpublished_blocks_are_reused_before_published_ones():
    blocks = BlockManager(1, 6, 4, True)
    prompt = prompt_of(9)
    for _ in range(5):
        pass_through(blocks, prompt[:9])  # two published, one not full
    assert pass_through(blocks, prompt) == 2


def test_dummy_block_is_never_handed_out():
    blocks = BlockManager(2, 5, 4, True)
    request = owner(None, prompt_of(16))
    compute(blocks, request)
    assert all(sorted(table) == [1, 2, 3, 4] for table in request.block_ids)
    assert blocks.free_blocks == 0
    assert not blocks.grow(request, 17)


def test_claim_takes_nothing_where_room_lacks_for_all():
    """A hit block that nobody owns takes a free block, too."""
    blocks = BlockManager(1, 5, 4, True)
    pass_through(blocks, prompt_of(9))
    holder = owner(None, prompt_of(4, 1))
    compute(blocks, holder)
    request = owner(None, prompt_of(16))
    hits = blocks.match(request)
    assert len(hits[0]) == 2
    before = blocks.free_blocks
    assert blocks.free_blocks == 3
    assert not blocks.claim(request, hits, 16)
    assert blocks.free_blocks == before
    assert request.block_ids == []
    assert blocks.claim(request, hits, 12)


def test_equal_blocks_are_kept_apart_and_their_children_meet():
    """Two requests compute the same prompt at once: the second keeps its copy, and follows the indexed one."""
    blocks = BlockManager(1, 20, 4, True)
    a, b = owner(None, prompt_of(8)), owner(None, prompt_of(12))
    for request in (a, b):
        assert blocks.claim(request, blocks.no_hits(), request.num_tokens)
        assert blocks.grow(request, request.num_tokens)
    assert len(blocks.publish(a, 8)) == 2
    assert len(blocks.publish(b, 12)) == 1, "only the block that is new"
    assert not set(a.block_ids[0]) & set(b.block_ids[0])
    hits = blocks.match(owner(None, [*prompt_of(12), 1]))
    assert hits == [[*a.block_ids[0], b.block_ids[0][2]]]


def test_a_child_is_not_found_behind_another_parent():
    """Equal hashes and equal tokens: the history differs, and the parent tells."""
    blocks = BlockManager(1, 20, 4, True, hash_fn=lambda data: data[-4:])  # by the last token alone
    pass_through(blocks, [1, 1, 1, 1, 2, 2, 2, 2, 3])
    assert len(blocks.match(owner(None, [1, 1, 1, 1, 2, 2, 2, 2, 9]))[0]) == 2
    pool = blocks._pools[0]
    parent = pool.entries[pool.index[b"\x01\0\0\0"]]
    pool.forget(pool.index[parent.key])
    pass_through(blocks, [5, 5, 5, 1, 9])  # takes the parent's hash with another content
    assert len(blocks.match(owner(None, [5, 5, 5, 1, 2, 2, 2, 2, 9]))[0]) == 1


def test_withdrawn_blocks_are_not_found_and_reused_ones_stay():
    blocks = BlockManager(1, 4, 4, True)
    a = owner(None, prompt_of(8))
    assert blocks.claim(a, blocks.no_hits(), 8)
    assert blocks.grow(a, 8)
    published = blocks.publish(a, 8)
    blocks.release(a)
    other = owner(None, prompt_of(12, 1))
    compute(blocks, other)
    blocks.withdraw(published)
    blocks.check([other])
    blocks.release(other)
    assert len(blocks.match(owner(None, [*prompt_of(12, 1), 0]))[0]) == 3, "not what was published since"
    again = owner(None, prompt_of(9))
    compute(blocks, again)
    blocks.release(again)
    assert len(blocks.match(owner(None, prompt_of(9)))[0]) == 2


def test_groups_share_the_longest_common_prefix():
    blocks = BlockManager(2, 10, 4, True)
    pass_through(blocks, prompt_of(13))
    pool = blocks._pools[1]
    request = owner(None, prompt_of(13))
    assert [len(run) for run in blocks.match(request)] == [3, 3]
    pool.forget(pool.index[request.block_hashes[1]])
    assert [len(run) for run in blocks.match(request)] == [1, 1]


@pytest.mark.parametrize("key", [b"", b"salt"])
def test_cache_key_is_verified_beyond_the_hash(key):
    blocks = BlockManager(1, 10, 4, True, hash_fn=lambda data: data[:8])
    compute(blocks, owner(None, prompt_of(9), cache_key=key))
    assert len(blocks.match(owner(None, prompt_of(9), cache_key=key))[0]) == 1
    assert blocks.match(owner(None, prompt_of(9), cache_key=key + b"x")) == [[]]


def test_prompts_may_be_any_integers():
    """numpy ids hash as Python's."""
    blocks = BlockManager(1, 10, 4, True)
    pass_through(blocks, list(np.asarray(prompt_of(9), dtype=np.int64)))
    assert pass_through(blocks, prompt_of(9)) == 2
