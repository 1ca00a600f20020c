"""When Python collects garbage in a process of our own that makes steps. Imports no torch."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_OBJECTS = 50_000  # that may be made, and not dropped, until the next collection


@contextmanager
def without_collections() -> Iterator[None]:
    """A context without garbage collection, to make an engine in. What exists at its end is never looked at again, and
    steps start no collection; a user of the library decides for the whole program.

    Importing torch and making an engine creates half a million objects that stay. A full collection of them takes 50 ms
    or more, during the start and later between two steps. A step of many requests makes some thousand objects, no
    circles among them, that live until its tokens are delivered: with Python's own threshold, 700, a step starts a
    collection or several, and every hundredth of those looks at all requests, for 10 to 20 ms at 256 of them.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.set_threshold(_OBJECTS, 10, 10)
        if was_on:
            gc.enable()
