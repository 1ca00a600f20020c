"""The interface of model sources. A model source finds or downloads models."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


def cache_root() -> Path:
    """`$NANOENGINE_CACHE`, else `$XDG_CACHE_HOME/nanoengine`, else `~/.cache/nanoengine`; it may not exist yet."""
    own = os.environ.get("NANOENGINE_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG base directory specification says that relative paths are ignored.
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "nanoengine"


def _silent(text: str) -> None:
    return None


@dataclass(frozen=True, slots=True)
class SourceContext:
    """What a source may use: the cache folder, and a function that reports progress.

    Attributes:
        cache: root of the cache; it may not exist yet.
        say: shows one line of progress to the user.
    """

    cache: Path
    say: Callable[[str], None] = _silent


class ModelSource(ABC):
    """Base class of model sources. Made without arguments; its module imports no torch at module level."""

    @abstractmethod
    def resolve(self, source: str, ctx: SourceContext) -> Path | None:
        """The folder with config.json of `source`; None if `source` is not one of this source's names.

        Raises `ModelSourceError` if it is one, but cannot be found or downloaded. The message lists every attempt and
        what to type instead.
        """
