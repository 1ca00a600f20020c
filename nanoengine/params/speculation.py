"""The engine's keys of `speculation`, how far they let a request draft, and a drafter's types. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

from nanoengine.api.errors import ParamsError, PluginError
from nanoengine.api.specs import DrafterParams
from nanoengine.params.sampling_fields import plugin_fields

MAX_DRAFTS = 15
"""Most drafts of a row: attention kernels for decode rows take at most 16 query tokens of a row."""

NO_SPECULATION = "none"
"""The method with which speculation is off, whatever other keys there are: so a sweep can compare on and off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationOptions:
    """The engine's own keys of `speculation`. The others belong to the drafter.

    Attributes:
        method: name of a drafter, or "none".
        tokens: most drafts of a row; 0: none.
        min_acceptance: a position of the draft is used only while at least this share of its drafts is accepted. A
            draft pays if the share is above the cost of one more token of a row, as a part of the cost of a step: a few
            percent on a GPU with few rows, a tenth on a CPU.
        step_tokens: rows with drafts get fewer of them, or none, where all requests with as many would make a step of
            more tokens: beyond this size arithmetic takes the time, and a draft costs as much as it may save. Default:
            32 on a CPU, 256 on a GPU.
    """

    method: str
    tokens: int = 4
    min_acceptance: float = 0.3
    step_tokens: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.tokens <= MAX_DRAFTS:
            raise ParamsError(f"tokens must be from 0 to {MAX_DRAFTS}, not {self.tokens}")
        if not 0 <= self.min_acceptance <= 1:
            raise ParamsError(f"min_acceptance is a share and must be from 0 to 1, not {self.min_acceptance}")
        if self.step_tokens is not None and self.step_tokens < 1:
            raise ParamsError(f"step_tokens must be at least 1, not {self.step_tokens}")


OWN_KEYS: Mapping[str, Any] = get_type_hints(SpeculationOptions)


def drafter_types(name: str, params: type[DrafterParams]) -> dict[str, Any]:
    """Field -> annotation of a drafter's parameters. Raises `PluginError` if `params` is not a correct dataclass."""
    where = f"drafter {name!r}"
    if "__dataclass_params__" not in vars(params):  # else only the fields of its base would count
        raise PluginError(f"{where}: {params.__qualname__} must be a dataclass itself: write @dataclass(frozen=True)")
    found = plugin_fields(where, params)
    taken = [field for field in found if field in OWN_KEYS]
    if taken:
        raise PluginError(f"{where}: parameters with names of the engine's own keys: {', '.join(taken)}; rename them")
    return found


class Acceptance:
    """How far to draft: while the measured acceptance of each position is at least `least`.

    The acceptance of a position is the share of its drafts that were accepted, with all before them: first a plain
    average, then an exponential one, in which the newest counts 1/`memory`. A position below `least` gets no drafts,
    nor do those behind it. After some tokens it is tried again: if that is accepted, the position counts again and the
    next one is tried; if not, the wait doubles. There is no clock, so a run can be repeated.

    Attributes:
        shares: the acceptance of each position.
    """

    FIRST_WAIT, LONGEST_WAIT = 16, 512  # tokens

    def __init__(self, shares: Sequence[float], least: float, memory: int = 8) -> None:
        self.shares, self._least, self._memory = list(shares), least, memory
        self._seen, self._try_at, self._wait = 0, 0, self.FIRST_WAIT

    def depth(self, num_tokens: int) -> int:
        """How many positions the next row drafts. num_tokens: of the output so far."""
        return min(self._good(len(self.shares)) + (num_tokens >= self._try_at), len(self.shares))

    def observe(self, drafted: int, accepted: int) -> None:
        """A row had `drafted` drafts, of which the first `accepted` were accepted."""
        weight = max(1 / self._memory, 1 / (self._seen + 2))
        self._seen += 1
        for i in range(drafted):
            self.shares[i] += weight * ((i < accepted) - self.shares[i])

    def adapt(self, num_tokens: int, drafted: int, accepted: int) -> None:
        """`observe`, for the depth of the rows that follow. num_tokens: of the output, with this row's."""
        tried = self._good(drafted) < drafted  # its last position did not count
        self.observe(drafted, accepted)
        if tried and accepted == drafted:
            self.shares[drafted - 1] = max(self.shares[drafted - 1], self._least)
            self._wait = self.FIRST_WAIT
        elif self._good(drafted) < drafted:
            wait = self._wait if tried else self.FIRST_WAIT
            self._try_at, self._wait = num_tokens + wait, min(2 * wait, self.LONGEST_WAIT)

    def _good(self, most: int) -> int:
        return next((i for i in range(most) if self.shares[i] < self._least), most)
