"""The block pool and the prefix index by themselves."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sched_harness import Loop, prompt_of

from nanoengine.core.request import Request
from nanoengine.core.scheduling.block_manager import BlockManager, Pool
from nanoengine.testing.invariants import check_blocks, check_pool


def owner(loop_or_none: Loop | None, prompt: list[int], **kwargs) -> Request:
    return (loop_or_none or Loop()).request(prompt, **kwargs)


def compute(blocks: BlockManager, request: Request, *others: Request) -> int:
    """Claims what is there, computes the rest at once, publishes -> blocks hit."""
    hits = blocks.match(request)
    assert blocks.claim(request, hits, request.num_tokens)
    assert blocks.grow(request, request.num_tokens)
    request.num_computed = request.num_tokens
    blocks.publish(request, request.num_tokens)
    check_blocks(blocks, [request, *others])
    return len(hits[0])


def pass_through(blocks: BlockManager, prompt: list[int]) -> int:
    request = owner(None, prompt)
    hits = compute(blocks, request)
    blocks.release(request)
    check_blocks(blocks, [])
    return hits


@given(st.lists(st.integers(0, 30), max_size=60))
def test_pool_against_a_plain_list(picks):
    """take, publish, share, forget and give_back against a list that does the same in O(n)."""
    pool, model, owned = Pool(9), list(range(1, 9)), []  # owned: (blocks, given back together)
    for uid, pick in enumerate(picks, 1):
        if pick % 4 and model:
            count = 1 + pick % min(3, len(model))
            owned.append(pool.take(count))
            assert owned[-1] == model[:count]
            del model[:count]
        elif pick % 8 == 0 and owned:
            block = owned[pick % len(owned)][0]
            if pool.entries[block] is None:
                pool.publish(block, b"%d" % uid, b"", b"", uid)
        elif pick % 16 == 4 and pool.index:
            block = list(pool.index.values())[pick % len(pool.index)]
            model = [each for each in model if each != block]
            pool.share([block])
            owned.append([block])
        elif pick % 16 == 12 and pool.index:
            block = list(pool.index.values())[pick % len(pool.index)]
            pool.forget(block)
        elif owned:
            blocks = owned.pop(pick % len(owned))
            pool.give_back(blocks)
            for block in (block for block in blocks if not any(block in each for each in owned)):
                model.insert(len(model) if pool.entries[block] else 0, block)
        walk, at = [], pool.next[0]
        while at:
            walk.append(at)
            at = pool.next[at]
        assert walk == model
        assert pool.num_free == len(model)
        check_pool(pool, owned)


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
    """A hit block that no request owns takes a free block, too."""
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
    assert [run.tolist() for run in hits] == [[*a.block_ids[0], b.block_ids[0][2]]]


def test_a_child_is_not_found_behind_another_parent():
    """Equal hashes and equal tokens: the history differs, and the parent shows it."""
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
    check_blocks(blocks, [other])
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
    assert blocks.match(owner(None, prompt_of(9), cache_key=key + b"x"))[0].tolist() == []


def test_prompts_may_be_any_integers():
    """numpy ids hash as Python's."""
    blocks = BlockManager(1, 10, 4, True)
    pass_through(blocks, list(np.asarray(prompt_of(9), dtype=np.int64)))
    assert pass_through(blocks, prompt_of(9)) == 2


def follower(blocks: BlockManager, prompt: list[int], **kwargs) -> Request:
    """Computes its prompt without reading the cache, as a request with prompt log-probs does; not yet published."""
    request = owner(None, prompt, **kwargs)
    assert blocks.claim(request, blocks.no_hits(), request.num_tokens)
    assert blocks.grow(request, request.num_tokens)
    request.num_computed = request.num_tokens
    return request


def evict(blocks: BlockManager, prompt: list[int], count: int) -> None:
    """Forgets the first blocks of a prompt, as reuse does."""
    for pool, run in zip(blocks._pools, blocks.match(owner(None, [*prompt, 0])), strict=True):
        for block in run[:count].tolist():
            pool.forget(block)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("owned", [False, True])
def test_a_chain_whose_head_was_evicted_is_published_again(groups, owned):
    """Its tail stays behind in the index, where no request finds it: it makes room, owned or not."""
    blocks = BlockManager(groups, 40, 4, True)
    first = follower(blocks, prompt_of(16))
    blocks.publish(first, 16)
    others = [first]
    if not owned:
        blocks.release(others.pop())
    evict(blocks, prompt_of(16), 1)
    again = follower(blocks, prompt_of(16))
    assert len(blocks.publish(again, 16)) == 4 * groups
    check_blocks(blocks, [*others, again])
    blocks.release(again)
    hits = blocks.match(owner(None, [*prompt_of(16), 1]))
    assert [len(run) for run in hits] == [4] * groups


def test_a_request_whose_predecessor_is_gone_publishes_its_own_copies():
    """It followed the other's blocks; what it publishes behind forgotten ones no request could find."""
    blocks = BlockManager(1, 40, 4, True)
    first, second = follower(blocks, prompt_of(8)), follower(blocks, prompt_of(16))
    blocks.publish(first, 8)
    assert blocks.publish(second, 8) == []
    blocks.release(first)
    evict(blocks, prompt_of(8), 2)
    assert [each.block for each in blocks.publish(second, 16)] == second.block_ids[0]
    check_blocks(blocks, [second])
    assert len(blocks.match(owner(None, [*prompt_of(16), 1]))[0]) == 4


def test_a_mutant_that_lets_orphans_stay_is_seen(monkeypatch):
    monkeypatch.setattr(Pool, "reaches", lambda pool, parent: True)
    with pytest.raises(AssertionError):
        test_a_chain_whose_head_was_evicted_is_published_again(1, False)


def test_what_a_failed_request_read_or_wrote_is_barred_until_it_is_taken_anew():
    """Also blocks of others: nothing says whose values were bad. A co-owner does not bring them back."""
    blocks = BlockManager(1, 12, 4, True)
    pass_through(blocks, prompt_of(9))
    bad, other = owner(None, [*prompt_of(12), 1]), owner(None, [*prompt_of(12), 2])
    assert compute(blocks, bad) == 2
    assert compute(blocks, other, bad) == 3
    blocks.bar(bad)
    blocks.release(bad)
    check_blocks(blocks, [other])
    assert not len(blocks.match(owner(None, prompt_of(9)))[0])
    other.output_token_ids += [5] * 8
    assert blocks.grow(other, other.num_tokens)
    assert blocks.publish(other, other.num_tokens) == [], "behind blocks that are barred"
    check_blocks(blocks, [other])
    again = owner(None, prompt_of(13))
    assert compute(blocks, again, other) == 0
    blocks.release(again)
    blocks.release(other)
    assert len(blocks.match(owner(None, prompt_of(13)))[0]) == 3
    for _ in range(3):  # every block has been taken anew
        pass_through(blocks, prompt_of(44, 3))
    assert blocks._pools[0].barred == set()


@pytest.mark.parametrize("groups", [1, 2])
def test_what_was_found_while_waiting_is_what_a_fresh_request_finds(groups):
    """Published, evicted, withdrawn, barred in any order: `found` saves work, never changes what is found."""
    rng = random.Random(groups)
    blocks = BlockManager(groups, 30, 2, True)
    prompts = [prompt_of(rng.choice((8, 12, 20)), salt=i % 3) for i in range(6)]
    waiting = [owner(None, [*prompt, 1]) for prompt in prompts]
    seen = set()
    for _ in range(400):
        prompt = rng.choice(prompts)
        match rng.randrange(4):
            case 0 | 1:
                pass_through(blocks, prompt[: rng.randrange(1, len(prompt) + 1)])
            case 2:
                evict(blocks, prompt, rng.randrange(4))
            case _:
                blocks.bar(owner(None, prompt[: rng.randrange(1, 9)]))
        for request in waiting:
            fresh = owner(None, request.prompt_token_ids)
            found, wanted = blocks.match(request), blocks.match(fresh)
            assert [run.tolist() for run in found] == [run.tolist() for run in wanted]
            seen.add(len(found[0]))
        check_blocks(blocks, [])
    assert len(seen) > 5


def test_hashes_made_beforehand_are_those_made_late():
    blocks = BlockManager(1, 30, 4, True)
    request = owner(None, prompt_of(18), cache_key=b"key")
    compute(blocks, request)
    assert blocks.hashes_of(request.prompt_bytes, b"key") == request.block_hashes[:4]
    assert BlockManager(1, 30, 4, False).hashes_of(request.prompt_bytes, b"key") == []
