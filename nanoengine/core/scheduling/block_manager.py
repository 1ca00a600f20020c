"""The KV block pools and the prefix index.

One pool a KV group. Blocks are shared whole, and only where the whole history is the same: a block is found by the hash
chain of the tokens up to its end, and verified by its predecessor and its own tokens.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import NamedTuple

import numpy as np
import xxhash

from nanoengine.api.errors import ConfigError
from nanoengine.core.request import Request
from nanoengine.core.step import Int64

Hits = list[Int64]  # [group][block], all groups of one length
_TOKEN_BYTES = array("i").itemsize
_new = tuple.__new__  # quicker than the constructor of a named tuple; it takes all fields, in their order


class Published(NamedTuple):
    """A block that entered the prefix index, so that it can be withdrawn."""

    group: int
    block: int
    uid: int


class BlockUse(NamedTuple):
    """Blocks of a pool. used: owned by requests; shared: by several. cached: free, and a prefix hit may find them."""

    total: int
    used: int
    shared: int
    cached: int


class BlockManager:
    """Hands out blocks to requests and finds the blocks that an earlier request left behind.

    Args:
        groups: number of KV groups; each has a pool of its own.
        num_blocks: blocks of each pool, the dummy block included.
        block_size: tokens a block.
        enable_prefix_caching: without it nothing is published and nothing is found.
        hash_fn: bytes -> digest; only the speed of the index depends on it, never its truth.

    Raises `ConfigError` if the dummy block is the only one.
    """

    def __init__(
        self,
        groups: int,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool,
        hash_fn: Callable[[bytes], bytes] = xxhash.xxh3_128_digest,
    ) -> None:
        if num_blocks < 2:
            raise ConfigError(
                f"the KV cache has {num_blocks} blocks of {block_size} tokens, but needs 2 at least (one is the dummy "
                "block): raise num_gpu_blocks_override, kv_cache_memory or gpu_memory_utilization"
            )
        assert groups > 0 and block_size > 0
        self.block_size = block_size
        self.num_blocks = num_blocks - 1  # of each group: those that requests can own
        self.enable_prefix_caching = enable_prefix_caching
        self._hash = hash_fn
        self._pools = [Pool(num_blocks) for _ in range(groups)]
        self._uids = count(1)

    @property
    def free_blocks(self) -> int:
        """Blocks that no request owns, in the group that has fewest."""
        return min(pool.num_free for pool in self._pools)

    def use(self) -> BlockUse:
        """Of the group that has fewest free."""
        pool = min(self._pools, key=lambda pool: pool.num_free)
        return BlockUse(self.num_blocks, self.num_blocks - pool.num_free, pool.num_shared, pool.num_cached)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # Finding

    def match(self, request: Request) -> Hits:
        """The longest run of published blocks that begins the request's known tokens; never all of its tokens.

        At least one token must be computed, for its logits, and blocks are shared whole: (num_tokens - 1) //
        block_size blocks at most. Takes nothing. The request keeps what was found: as long as it waits, only what
        came or went since is looked at.
        """
        return self._runs(request, (request.num_tokens - 1) // self.block_size)

    def _runs(self, request: Request, limit: int) -> Hits:
        if not self.enable_prefix_caching:
            return self.no_hits()
        self._hash_blocks(request, request.num_tokens // self.block_size)
        runs = request.found or [NO_RUN] * len(self._pools)
        for group, pool in enumerate(self._pools):
            runs[group] = self._longer(request, pool, pool.still_there(runs[group]), limit)
            limit = min(limit, len(runs[group].blocks))
        request.found = runs
        return [run.blocks[:limit] for run in runs]

    def _longer(self, request: Request, pool: Pool, run: Run, limit: int) -> Run:
        """The run with what follows it in the index, up to `limit` blocks."""
        first = len(run.blocks)
        if first >= limit or request.block_hashes[first] not in pool.index:
            return run
        parent = int(run.uids[-1]) if first else request.cache_key
        tokens = self._tokens(request, first, limit)
        more = pool.follow(request.block_hashes[first:limit], parent, tokens)
        return Run(np.append(run.blocks, more.blocks), np.append(run.uids, more.uids)) if len(more.blocks) else run

    def no_hits(self) -> Hits:
        return [NO_RUN.blocks for _ in self._pools]

    def same_block(self, a: Request, b: Request, index: int) -> bool:
        """Whether the prompts of both hold the same tokens through block `index`, under one cache key."""
        end = (index + 1) * self.block_size * _TOKEN_BYTES
        return a.cache_key == b.cache_key and a.prompt_bytes[:end] == b.prompt_bytes[:end]

    def hashes_of(self, prompt: bytes, cache_key: bytes) -> list[bytes]:
        """What a request with these prompt tokens, int32 bytes, has as `block_hashes` at first. Thread-safe."""
        size = self.block_size * _TOKEN_BYTES
        hashes, parent = [], b""
        for end in range(size, len(prompt) + 1 if self.enable_prefix_caching else 0, size):
            parent = self._hash(parent + prompt[end - size : end] + cache_key)
            hashes.append(parent)
        return hashes

    def prompt_hashes(self, request: Request, start: int, end: int) -> Sequence[bytes]:
        """Hashes of the full prompt blocks that computing tokens [start, end) completes."""
        return request.block_hashes[start // self.block_size : min(end, request.prompt_len) // self.block_size]

    # Owning

    def claim(self, request: Request, hits: Hits, num_tokens: int, reserve: int = 0) -> bool:
        """Makes the hits the request's first blocks, if there is room for all its `num_tokens` and for `reserve` blocks
        more; else takes nothing."""
        assert not request.block_ids, f"request {request.id} owns blocks already"
        missing, tables = self.blocks_for(num_tokens) - len(hits[0]), [run.tolist() for run in hits]
        for pool, table in zip(self._pools, tables, strict=True):
            unowned = [pool.refs[block] for block in table].count(0)
            if missing + unowned + reserve > pool.num_free:
                return False
        request.block_ids, request.found = tables, []
        for pool, table in zip(self._pools, tables, strict=True):
            pool.share(table)
        request.capacity = len(hits[0]) * self.block_size
        if self.enable_prefix_caching:
            request.publish_at = request.capacity + self.block_size
            request.chain = [
                int(pool.uids[table[-1]]) if table else request.cache_key
                for pool, table in zip(self._pools, request.block_ids, strict=True)
            ]
        return True

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Appends blocks until they hold `num_tokens`; False, and nothing taken, where a pool has too few."""
        missing = -(-num_tokens // self.block_size) - len(request.block_ids[0])
        if missing <= 0:
            return True
        for pool in self._pools:
            if missing > pool.num_free:
                return False
        for pool, table in zip(self._pools, request.block_ids, strict=True):
            table += pool.take(missing)
        request.capacity += missing * self.block_size
        return True

    def release(self, request: Request) -> None:
        """Gives all its blocks back, the tail first, so that the head of a prefix lives longest."""
        for pool, table in zip(self._pools, request.block_ids, strict=False):
            pool.give_back(reversed(table))
        request.block_ids, request.chain = [], []
        request.capacity, request.publish_at = 0, sys.maxsize

    # Publishing

    def publish(self, request: Request, num_tokens: int) -> list[Published]:
        """Enters the request's blocks that are full with its first `num_tokens` tokens into the index.

        A block whose equal is there already stays out (the request keeps its own copy), and those after it follow the
        indexed one; if that is forgotten, the request publishes its own copies. On a collision of hashes with a block
        that can be found, and at a block that a failed request had read, the request publishes no more.
        """
        out: list[Published] = []
        while request.publish_at <= num_tokens:
            i = request.publish_at // self.block_size - 1
            tokens, hashes = self._tokens(request, i, i + 1), request.block_hashes
            if len(hashes) == i:
                hashes.append(self._hash((hashes[-1] if i else b"") + tokens + request.cache_key))
            request.publish_at += self.block_size
            for group, pool in enumerate(self._pools):
                block, parent, uid = request.block_ids[group][i], request.chain[group], next(self._uids)
                if i and parent not in pool.live:
                    self.publish_again(request)
                    break
                found = pool.publish(block, hashes[i], parent, tokens, uid)
                if found is None:
                    request.publish_at = sys.maxsize
                    continue
                request.chain[group] = found
                if found == uid:
                    out.append(_new(Published, (group, block, uid)))
        return out

    def publish_again(self, request: Request) -> None:
        """The next `publish` begins with the request's first block."""
        if self.enable_prefix_caching:
            request.publish_at, request.chain = self.block_size, [request.cache_key] * len(self._pools)

    def bar(self, request: Request) -> None:
        """Its KV may be wrong: forgets all that the index holds of its tokens, and of the blocks it owns, no matter by
        which request; no other one publishes them either. The next request with its prompt computes all of it anew."""
        runs = self._runs(request, request.num_tokens // self.block_size)
        for pool, run, table in zip(self._pools, runs, request.block_ids or [[]] * len(runs), strict=True):
            for block in (*run.tolist(), *table):
                pool.bar(block)

    def reset_prefix_cache(self) -> None:
        """Forgets every published block, owned or not; what is owned stays with its owners."""
        for pool in self._pools:
            for block in range(1, len(pool.entries)):
                pool.forget(block)

    def withdraw(self, published: Iterable[Published]) -> None:
        """Takes back what a step published that then broke, unless the block has been reused since."""
        for group, block, uid in published:
            if self._pools[group].uids[block] == uid:
                self._pools[group].forget(block)

    # Tokens and hashes

    def _tokens(self, request: Request, first: int, last: int) -> bytes:
        """Known tokens of the blocks [first, last), int32 bytes."""
        start, end = first * self.block_size, last * self.block_size
        after, behind = start - request.prompt_len, end - request.prompt_len
        if after >= 0:
            return array("i", request.output_token_ids[after:behind]).tobytes()
        own = request.prompt_bytes[start * _TOKEN_BYTES : end * _TOKEN_BYTES]
        return own if behind <= 0 else own + array("i", request.output_token_ids[:behind]).tobytes()

    def _hash_blocks(self, request: Request, num_blocks: int) -> None:
        hashes = request.block_hashes
        for i in range(len(hashes), num_blocks):
            parent = hashes[-1] if i else b""
            hashes.append(self._hash(parent + self._tokens(request, i, i + 1) + request.cache_key))


class Entry(NamedTuple):
    """What a published block holds. `parent`: uid of the block before it, or the cache key at the start."""

    key: bytes
    parent: int | bytes
    tokens: bytes
    uid: int


class Run(NamedTuple):
    """Published blocks, each the successor of the one before: their numbers and their uids, int64 [n] each."""

    blocks: Int64
    uids: Int64


NO_RUN = Run(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))


class Pool:
    """One group's blocks: an intrusive doubly linked free list, reference counts, the index. O(1) a block.

    Attributes:
        uids: int64, by block: of its entry; 0: none.
        live: the uids that are in the index. barred: blocks that may hold what is wrong, until they are taken anew.

    A block's number is its row in the device's cache; block 0 is the dummy block, never handed out, and serves the free
    list as its sentinel. A block with reference count 0 is in the free list, which is the LRU order, and stays in the
    index until it is reused.
    """

    def __init__(self, num_blocks: int) -> None:
        self.next: list[int] = [*range(1, num_blocks), 0]
        self.prev: list[int] = [num_blocks - 1, *range(num_blocks - 1)]
        self.refs = [0] * num_blocks
        self.num_free = num_blocks - 1
        self.num_shared = 0  # owned by several requests
        self.num_cached = 0  # owned by none, and still in the index
        self.entries: list[Entry | None] = [None] * num_blocks
        self.index: dict[bytes, int] = {}
        self.uids: Int64 = np.zeros(num_blocks, dtype=np.int64)
        self.live: set[int] = set()
        self.barred: set[int] = set()

    def take(self, count: int) -> list[int]:
        """The least recently used free blocks, which leave the index."""
        assert count <= self.num_free, f"take() of {count} blocks from a pool with {self.num_free}"
        taken, after = list[int](), self.next[0]
        for _ in range(count):
            self.forget(after)
            self.refs[after] = 1
            taken.append(after)
            after = self.next[after]
        self.next[0], self.prev[after] = after, 0
        self.num_free -= count
        self.barred.difference_update(taken)
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """One more owner of blocks that the index gave."""
        for block in blocks:
            self.refs[block] += 1
            if self.refs[block] == 1:
                before, after = self.prev[block], self.next[block]
                self.next[before], self.prev[after] = after, before
                self.num_free -= 1
                self.num_cached -= self.entries[block] is not None
            elif self.refs[block] == 2:
                self.num_shared += 1

    def give_back(self, blocks: Iterable[int]) -> None:
        """One owner less. Published blocks are reused last, those that no request can hit at once."""
        refs, links, back, entries = self.refs, self.next, self.prev, self.entries
        for block in blocks:
            refs[block] = left = refs[block] - 1
            if left:
                assert left > 0, f"block {block} freed twice"
                self.num_shared -= left == 1
                continue
            published = entries[block] is not None
            before = back[0] if published else 0
            after = links[before]
            links[before] = back[after] = block
            back[block], links[block] = before, after
            self.num_free += 1
            self.num_cached += published

    def publish(self, block: int, key: bytes, parent: int | bytes, tokens: bytes, uid: int) -> int | None:
        """Puts an owned block into the index, with this uid, unless its equal is there. Returns the uid of the one that
        is; None: neither may be."""
        taken = self.index.get(key)
        if taken is not None:
            entry = self.entries[taken]
            assert entry is not None
            if entry.parent == parent and entry.tokens == tokens:
                return entry.uid
        if block in self.barred or (taken is not None and self.reaches(taken)):
            return None
        if taken is not None:
            self.forget(taken)
        self.index[key], self.uids[block] = block, uid
        self.entries[block] = _new(Entry, (key, parent, tokens, uid))
        self.live.add(uid)
        return uid

    def forget(self, block: int) -> None:
        """Takes a block out of the index, if it is there."""
        entry = self.entries[block]
        if entry is not None:
            del self.index[entry.key]
            self.live.discard(entry.uid)
            self.entries[block], self.uids[block] = None, 0
            self.num_cached -= self.refs[block] == 0

    def bar(self, block: int) -> None:
        """Forgets a block, and keeps it out of the index until another owner writes it anew."""
        self.forget(block)
        self.barred.add(block)

    def reaches(self, block: int) -> bool:
        """Whether a published block can be found: the block before it is still published, too."""
        entry = self.entries[block]
        return entry is not None and (isinstance(entry.parent, bytes) or entry.parent in self.live)

    def still_there(self, run: Run) -> Run:
        """The beginning of the run that was not forgotten since."""
        there = self.uids[run.blocks] == run.uids
        if there.all():
            return run
        end = int(there.argmin())
        return Run(run.blocks[:end], run.uids[:end])

    def follow(self, keys: Sequence[bytes], parent: int | bytes, tokens: bytes) -> Run:
        """The blocks under these keys, one behind the other, as far as they are there and verified.

        `tokens`: of all of them, one behind the other.
        """
        index, entries, size = self.index, self.entries, len(tokens) // max(1, len(keys))
        blocks, uids = list[int](), list[int]()
        for at, key in enumerate(keys):
            block = index.get(key, 0)
            entry = entries[block]
            if entry is None or entry.parent != parent or entry.tokens != tokens[at * size : at * size + size]:
                break
            parent = entry.uid
            blocks.append(block)
            uids.append(entry.uid)
        return Run(np.array(blocks, dtype=np.int64), np.array(uids, dtype=np.int64)) if blocks else NO_RUN
