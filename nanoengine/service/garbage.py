"""When Python collects garbage in a process that makes steps."""

from __future__ import annotations

import gc

_OBJECTS = 50_000  # that may be made, and not dropped, until the next collection


def settle_garbage() -> None:
    """To be called when the engine is there: its objects live as long as the process, so collections need not look at
    them. A step of a thousand requests makes some thousand objects that live until their tokens are sent, and no
    circles: with Python's own threshold, 700, they were looked at several times a step, and all requests every few
    steps."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_OBJECTS, 10, 10)
