"""What tests of plugins use: conformance kits, random weights, tiny checkpoints, a mock model.

`randomise` is imported when it is first used, so that a plugin's module in here loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanoengine.testing.random_weights import randomise

__all__ = ["randomise"]


def __getattr__(name: str) -> Any:
    if name == "randomise":
        from nanoengine.testing.random_weights import randomise

        return randomise
    raise AttributeError(f"module 'nanoengine.testing' has no attribute {name!r}")
