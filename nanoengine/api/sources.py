"""What a model source is: a place that models come from."""

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
    # The XDG base directory specification has relative paths ignored.
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "nanoengine"


def _silent(text: str) -> None:
    return None


@dataclass(frozen=True, slots=True)
class SourceContext:
    """What a source may use: the cache folder, and a line to the user.

    Attributes:
        cache: root of the cache; it may not exist yet.
        say: shows one line of progress to the user.
    """

    cache: Path
    say: Callable[[str], None] = _silent


class ModelSource(ABC):
    """A place models come from. Constructed without arguments; imports no torch at module level."""

    @abstractmethod
    def resolve(self, source: str, ctx: SourceContext) -> Path | None:
        """Folder with config.json for `source`; None if this is not one of its own.

        Raises `ModelSourceError`, listing every attempt and what to type instead, if it is its own and cannot be had.
        """
