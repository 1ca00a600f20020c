"""When Python collects garbage."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


class Collections:
    """Collections of garbage, in one event loop. Making a million objects starts many, each of which looks at all of
    them and stops every thread meanwhile: for a second, where they come from a body of 8 MB."""

    def __init__(self) -> None:
        self._paused = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """None happens meanwhile; for what makes many objects and no circles of them."""
        self._paused += 1
        gc.disable()
        try:
            yield
        finally:
            self._paused -= 1
            if not self._paused:
                gc.enable()
