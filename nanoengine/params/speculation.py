"""The engine's own keys of `speculation`, and the types of a drafter's. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
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
