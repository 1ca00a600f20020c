"""The memory that an engine shares with its ranks: plans down, results up, and how far each rank is.

It has no name: the descriptor is inherited, and the memory ends with the last process that holds it. The engine alone
writes plans, rank 0 alone results, each rank alone its line of progress; a word of 8 bytes is written at once, and the
frame that follows it (`channel.py`) orders what was written before.
"""

from __future__ import annotations

import mmap
import os
import weakref
from dataclasses import dataclass
from enum import IntEnum

from nanoengine.distributed.channel import anonymous_memory

RING = 4
"""Slots of a ring: two steps are in flight at most, and a slow rank may be a step behind."""
SLOT_BYTES = 512 << 10
"""A step of 256 decode rows takes 7 KB, admitting 64 prompts of 1,000 tokens 260 KB."""
_WORDS = 8  # a line of progress: a cache line of its own


class Word(IntEnum):
    """Of a rank's line of progress; steps are counted from 1, so that a word is also how many there were."""

    READ = 0  # plans taken out of the ring
    LAUNCHED = 1  # steps launched
    FINISHED = 2  # steps whose result arrived
    PHASE = 3  # of the start: an index into `startup.PHASES`; `READY` afterwards
    COLLECTIVES = 4  # collectives entered


READY = -1


@dataclass(frozen=True, slots=True)
class Layout:
    """Numbers of ranks, and of bytes in a slot of the plans' and results' rings."""

    size: int
    slot_bytes: int = SLOT_BYTES

    @property
    def progress_bytes(self) -> int:
        return self.size * _WORDS * 8

    @property
    def total(self) -> int:
        return self.progress_bytes + 2 * RING * self._slot

    @property
    def _slot(self) -> int:
        return 8 + self.slot_bytes  # its length goes before

    def plan_at(self, number: int) -> int:
        return self.progress_bytes + number % RING * self._slot

    def result_at(self, number: int) -> int:
        return self.plan_at(number) + RING * self._slot


class Shared:
    """A process's view."""

    def __init__(self, fd: int, layout: Layout) -> None:
        """Takes `fd` over, and closes it at the latest when nobody holds this view any more."""
        self.fd, self.layout = fd, layout
        self._descriptor = weakref.finalize(self, os.close, fd)
        self._map = mmap.mmap(fd, layout.total)
        self._bytes = memoryview(self._map)
        self._words = self._bytes[: layout.progress_bytes].cast("q")

    @classmethod
    def create(cls, layout: Layout) -> Shared:
        return cls(anonymous_memory("nanoengine-steps", layout.total), layout)

    def word(self, rank: int, word: Word) -> int:
        return self._words[rank * _WORDS + word]

    def note(self, rank: int, word: Word, value: int) -> None:
        self._words[rank * _WORDS + word] = value

    def least(self, word: Word) -> int:
        """Of all ranks."""
        return min(self._words[word::_WORDS])

    def put(self, at: int, data: bytes) -> bool:
        """Into the slot at `at`; False, and the slot is marked so, if it is too large for it."""
        fits = len(data) <= self.layout.slot_bytes
        self._map[at : at + 8] = (len(data) if fits else 0).to_bytes(8, "little")
        if fits:
            self._map[at + 8 : at + 8 + len(data)] = data
        return fits

    def holds(self, at: int) -> bool:
        """False: what should be in the slot at `at` was too large for it."""
        return any(self._map[at : at + 8])

    def take(self, at: int) -> bytearray | None:
        """A copy of what the slot at `at` holds; None: it was too large, and came as a parcel."""
        size = int.from_bytes(self._map[at : at + 8], "little")
        return bytearray(self._bytes[at + 8 : at + 8 + size]) if size else None

    def close(self) -> None:
        """Idempotent."""
        self.fd = -1
        if self._descriptor.alive:
            self._words.release()
            self._bytes.release()
            self._map.close()
            self._descriptor()
