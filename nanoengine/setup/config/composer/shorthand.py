"""Groups whose option may be a value instead of a file: `model=./folder`, `attention=torch`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Shorthand:
    """How a plain string fills a section.

    Attributes:
        key: the section's key that the string stands for: `model: x` means `model: {source: x}`.
        accepts: whether an option that no group file has may be taken as that key's value.
        names: such values that are known by name, for did-you-mean.
        otherwise: what an option may be, beside those names, for the message.
    """

    key: str
    accepts: Callable[[str], bool]
    names: Sequence[str] = field(default=())
    otherwise: str = ""
