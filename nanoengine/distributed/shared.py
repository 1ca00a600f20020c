"""The memory that an engine shares with its ranks: plans, their columns, results, and the progress of each rank.

It has no name: the descriptor is inherited, and the memory is freed when the last process that uses it ends. Only the
engine writes plans and columns, only rank 0 writes results, and each rank, and the engine, writes only its own line of
progress. A word of 8 bytes is written at once; the frame that is sent after it (`channel.py`) orders the writes before
it.
"""

from __future__ import annotations

import mmap
import os
import weakref
from dataclasses import dataclass
from enum import IntEnum

from nanoengine.distributed.channel import anonymous_memory

RING = 4
"""Slots of a ring: at most two steps are in flight, and a slow rank may be one step behind."""
SLOT_BYTES = 512 << 10
"""A step of 256 decode rows takes 7 KB; one that admits 64 prompts of 1,000 tokens takes 260 KB."""
_WORDS = 8  # of a line of progress, so that each has its own cache line


class Word(IntEnum):
    """The words of a rank's line of progress. Steps are numbered from 1, so a word is also a number of steps."""

    READ = 0  # plans read from the ring
    LAUNCHED = 1  # steps launched
    FINISHED = 2  # steps whose result has arrived
    PHASE = 3  # phase of the start: an index into `clock.PHASES`; `READY` afterwards
    COLLECTIVES = 4  # collectives that the rank has reached
    SHORT = 5  # the last step in which the rank ran out of memory
    RESUMED = 6  # in the engine's line: the first step that it launched after that


READY = -1


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of the memory, from the number of ranks and the bytes of a slot in the rings."""

    size: int
    slot_bytes: int = SLOT_BYTES

    @property
    def progress_bytes(self) -> int:
        return (self.size + 1) * _WORDS * 8  # the last line is the engine's

    @property
    def total(self) -> int:
        return self.progress_bytes + 3 * RING * self._slot

    @property
    def _slot(self) -> int:
        return 8 + self.slot_bytes  # the length comes first

    def plan_at(self, number: int) -> int:
        return self.progress_bytes + number % RING * self._slot

    def result_at(self, number: int) -> int:
        return self.plan_at(number) + RING * self._slot

    def columns_at(self, number: int) -> int:
        return self.result_at(number) + RING * self._slot


class Shared:
    """One process's view of the shared memory."""

    def __init__(self, fd: int, layout: Layout) -> None:
        """Takes ownership of `fd`, which is closed when this object is deleted, or by `close`."""
        self.fd, self.layout = fd, layout
        self._descriptor = weakref.finalize(self, os.close, fd)
        self._map = mmap.mmap(fd, layout.total)
        self._bytes = memoryview(self._map)
        self._words = self._bytes[: layout.progress_bytes].cast("q")

    @classmethod
    def create(cls, layout: Layout) -> Shared:
        shared = cls(anonymous_memory("nanoengine-steps", layout.total), layout)
        shared.resume(1)
        return shared

    def word(self, rank: int, word: Word) -> int:
        return self._words[rank * _WORDS + word]

    def note(self, rank: int, word: Word, value: int) -> None:
        self._words[rank * _WORDS + word] = value

    def least(self, word: Word) -> int:
        """The minimum of `word` over all ranks."""
        return min(self._words[word : self.layout.size * _WORDS : _WORDS])

    def is_withdrawn(self, step: int) -> bool:
        """Whether a rank ran out of memory in this step, or in the step before if this one was launched already."""
        short = max(self._words[Word.SHORT : self.layout.size * _WORDS : _WORDS])
        return self.word(self.layout.size, Word.RESUMED) <= short <= step

    def resume(self, step: int) -> None:
        """Called by the engine: this step and those after it are not withdrawn."""
        self.note(self.layout.size, Word.RESUMED, step)

    def put(self, at: int, data: bytes) -> bool:
        """Writes `data` into the slot at `at`. If it is too large, marks the slot and returns False."""
        fits = len(data) <= self.layout.slot_bytes
        self._map[at : at + 8] = (len(data) if fits else 0).to_bytes(8, "little")
        if fits:
            self._map[at + 8 : at + 8 + len(data)] = data
        return fits

    def holds(self, at: int) -> bool:
        """Whether the slot at `at` has data; False: the data was too large for it."""
        return any(self._map[at : at + 8])

    def take(self, at: int) -> bytearray | None:
        """A copy of the data in the slot at `at`; None: it was too large, and was sent as a parcel."""
        size = int.from_bytes(self._map[at : at + 8], "little")
        return bytearray(self._bytes[at + 8 : at + 8 + size]) if size else None

    def close(self) -> None:
        """Closes the view and the descriptor. Idempotent."""
        self.fd = -1
        if self._descriptor.alive:
            self._words.release()
            self._bytes.release()
            self._map.close()
            self._descriptor()
