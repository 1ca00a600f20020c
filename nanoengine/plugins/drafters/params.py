"""Parameters of the built-in drafters: keys of `speculation`."""

from __future__ import annotations

from dataclasses import dataclass

from nanoengine.api import DrafterParams, ParamsError

_LONGEST = 64


@dataclass(frozen=True, slots=True)
class NgramParams(DrafterParams):
    """What the n-gram drafter looks for.

    Attributes:
        min_n: the fewest of the last tokens that must have occurred before.
        max_n: the most of the last tokens that are looked for.
    """

    min_n: int = 2
    max_n: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.min_n <= _LONGEST:
            raise ParamsError(f"min_n must be from 1 to {_LONGEST}, not {self.min_n}")
        if not self.min_n <= self.max_n <= _LONGEST:
            raise ParamsError(f"max_n must be from min_n ({self.min_n}) to {_LONGEST}, not {self.max_n}")


@dataclass(frozen=True, slots=True)
class SuffixParams(DrafterParams):
    """How the suffix drafter looks for what came before.

    Attributes:
        min_match: the fewest of the last tokens that must have occurred before.
        max_match: the most of the last tokens that are compared.
        max_places: how many of the places with the last `min_match` tokens are compared, the newest ones first.
        max_tokens: tokens of ended samples that are kept; the oldest samples go first.
        min_share: a draft ends where less than this share of the places goes on with one token, counted from the
            beginning of the draft.
        per_match: a draft is at most this many times as long as the match.
    """

    min_match: int = 2
    max_match: int = 16
    max_places: int = 16
    max_tokens: int = 200_000
    min_share: float = 0.1
    per_match: float = 2.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_match <= _LONGEST:
            raise ParamsError(f"min_match must be from 1 to {_LONGEST}, not {self.min_match}")
        if not self.min_match <= self.max_match <= 1024:
            raise ParamsError(f"max_match must be from min_match ({self.min_match}) to 1024, not {self.max_match}")
        if not 1 <= self.max_places <= 4096:
            raise ParamsError(f"max_places must be from 1 to 4096, not {self.max_places}")
        if not 0 <= self.max_tokens <= 10**9:
            raise ParamsError(f"max_tokens must be from 0 to 10^9, not {self.max_tokens}")
        if not 0 < self.min_share <= 1:
            raise ParamsError(f"min_share must be above 0 and at most 1, not {self.min_share}")
        if not 0 < self.per_match <= 1024:
            raise ParamsError(f"per_match must be above 0 and at most 1024, not {self.per_match}")
