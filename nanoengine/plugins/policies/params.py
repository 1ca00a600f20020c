"""Parameters of the built-in scheduling policies: keys of `engine.policy_options`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite

from nanoengine.api import ParamsError, PolicyParams


@dataclass(frozen=True, slots=True)
class FairParams(PolicyParams):
    """How clients share the engine.

    Attributes:
        weights: client -> weight: how much it gets in proportion to the others.
        default_weight: weight of a client that `weights` does not have.
        prompt_cost: what a token of a prompt counts.
        output_cost: what a generated token counts.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    default_weight: float = 1.0
    prompt_cost: float = 1.0
    output_cost: float = 2.0

    def __post_init__(self) -> None:
        for client, weight in self.weights.items():
            if not 0 < weight < float("inf"):
                raise ParamsError(f"weights must be above 0 and finite, not {weight} (of client {client!r})")
        if not 0 < self.default_weight < float("inf"):
            raise ParamsError(f"default_weight must be above 0 and finite, not {self.default_weight}")
        for name in ("prompt_cost", "output_cost"):
            cost = getattr(self, name)
            if not (isfinite(cost) and cost >= 0):
                raise ParamsError(f"{name} must be 0 or more, not {cost}")
        if not self.prompt_cost + self.output_cost:
            raise ParamsError("prompt_cost and output_cost must not both be 0")
