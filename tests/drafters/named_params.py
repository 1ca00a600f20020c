"""Parameters of a drafter of the tests, in a module that imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from nanoengine.api import DrafterParams, ParamsError


@dataclass(frozen=True)
class Named(DrafterParams):
    depth: int = 3
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ParamsError(f"depth must be at least 1, not {self.depth}")
