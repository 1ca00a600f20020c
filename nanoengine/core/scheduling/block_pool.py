"""One KV group's blocks: free list, reference counts, index.

A block's number is its row in the device's cache; block 0 is the dummy block, never handed out, and serves the free
list as its sentinel. A block with reference count 0 stands in the free list, which is the LRU order, and stays in the
index until it is reused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nanoengine.core.step import Bool, Int64


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
    """One group's blocks: an intrusive doubly linked free list, reference counts, the index. O(1) each.

    Attributes:
        uids: int64, by block: of its entry; 0: none. unowned: bool, by block: its reference count is 0.
        live: the uids that are in the index. barred: blocks that may hold what is wrong, until they are taken anew.
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
        self.unowned: Bool = np.ones(num_blocks, dtype=np.bool_)
        self.live: set[int] = set()
        self.barred: set[int] = set()

    def _unlink(self, block: int) -> None:
        before, after = self.prev[block], self.next[block]
        self.next[before], self.prev[after] = after, before
        self.num_free -= 1

    def _link_after(self, before: int, block: int) -> None:
        after = self.next[before]
        self.next[before] = self.prev[after] = block
        self.prev[block], self.next[block] = before, after
        self.num_free += 1

    def take(self) -> int:
        """The least recently used free block, which leaves the index."""
        block = self.next[0]
        assert block, "take() from an empty pool"
        self._unlink(block)
        if self.entries[block] is not None:
            self.forget(block)
        elif self.barred:
            self.barred.discard(block)
        self.refs[block], self.unowned[block] = 1, False
        return block

    def share(self, block: int) -> None:
        """One more owner of a block that the index gave."""
        if self.refs[block] == 0:
            self._unlink(block)
            self.num_cached -= self.entries[block] is not None
            self.unowned[block] = False
        elif self.refs[block] == 1:
            self.num_shared += 1
        self.refs[block] += 1

    def give_back(self, block: int) -> None:
        """One owner less. Published blocks are reused last, those that nobody can hit at once."""
        assert self.refs[block] > 0, f"block {block} freed twice"
        self.refs[block] -= 1
        if self.refs[block] == 1:
            self.num_shared -= 1
        elif self.refs[block] == 0:
            self.unowned[block] = True
            published = self.entries[block] is not None
            self.num_cached += published
            self._link_after(self.prev[0] if published else 0, block)

    def entry(self, block: int) -> Entry:
        entry = self.entries[block]
        assert entry is not None, f"block {block} is not published"
        return entry

    def enter(self, block: int, entry: Entry) -> None:
        """Puts an owned block into the index, where its key is free."""
        key, _, _, uid = entry
        self.index[key], self.entries[block], self.uids[block] = block, entry, uid
        self.live.add(uid)

    def forget(self, block: int) -> None:
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

    def reaches(self, parent: int | bytes) -> bool:
        """Whether an entry with this parent can be found."""
        return isinstance(parent, bytes) or parent in self.live

    def still_there(self, run: Run) -> Run:
        """The beginning of the run that was not forgotten since."""
        if not len(run.blocks):
            return run
        there = self.uids[run.blocks] == run.uids
        if there.all():
            return run
        end = int(there.argmin())
        return Run(run.blocks[:end], run.uids[:end])

    def find(self, key: bytes, parent: int | bytes, tokens: bytes) -> int | None:
        """The block published under `key`, if it is verified: same predecessor (hence same history), same tokens."""
        block = self.index.get(key)
        if block is None:
            return None
        entry = self.entry(block)
        return block if entry.parent == parent and entry.tokens == tokens else None

    def follow(self, keys: Sequence[bytes], parent: int | bytes, tokens: bytes) -> Run:
        """The blocks under these keys, one behind the other, as far as they are there and verified as in `find`.

        `tokens`: of all of them, one behind the other.
        """
        index, entries = self.index, self.entries
        size = len(tokens) // max(1, len(keys))
        blocks: list[int] = []
        uids: list[int] = []
        for at, key in enumerate(keys):
            block = index.get(key, 0)  # the dummy block has no entry
            entry = entries[block]
            if entry is None or entry.parent != parent or entry.tokens != tokens[at * size : at * size + size]:
                break
            parent = entry.uid
            blocks.append(block)
            uids.append(entry.uid)
        return Run(np.array(blocks, dtype=np.int64), np.array(uids, dtype=np.int64)) if blocks else NO_RUN

    def check(self, tables: Sequence[Sequence[int]]) -> None:
        """Asserts that the owners' block tables, reference counts, free list and index tell one story."""
        refs = [0] * len(self.refs)
        for table in tables:
            assert len(set(table)) == len(table), f"a request owns a block twice: {table}"
            for block in table:
                refs[block] += 1
        assert refs == self.refs, f"reference counts {self.refs} are not those of the tables {refs}"
        assert refs[0] == 0, "the dummy block is owned"
        free, block = set(), self.next[0]
        while block:
            assert block not in free, f"free list loops at {block}"
            assert self.next[self.prev[block]] == block == self.prev[self.next[block]], "free list is torn"
            free.add(block)
            block = self.next[block]
        assert free == {b for b in range(1, len(refs)) if refs[b] == 0}, "the free list is not the unowned blocks"
        assert len(free) == self.num_free
        assert self.num_shared == sum(count > 1 for count in refs), "shared blocks are miscounted"
        assert self.num_cached == sum(self.entries[b] is not None for b in free), "cached blocks are miscounted"
        entries = {entry.key: b for b, entry in enumerate(self.entries) if entry}
        assert entries == self.index, "index and blocks disagree"
        uids = [entry.uid if entry else 0 for entry in self.entries]
        assert uids == self.uids.tolist(), "uids are not those of the entries"
        assert self.live == {uid for uid in uids if uid}, "live uids are not those of the entries"
        assert self.unowned.tolist() == [count == 0 for count in refs], "owned and unowned blocks are mixed up"
        assert not any(self.entries[block] for block in self.barred), "a barred block is in the index"
