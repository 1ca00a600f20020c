"""The built-in scheduling policies, one per file. This module imports no torch: policies are named by target."""

from __future__ import annotations

from nanoengine.api import API_VERSION, PolicySpec, hookimpl
from nanoengine.plugins.policies.params import FairParams


@hookimpl
def register_policies() -> list[PolicySpec]:
    here = "nanoengine.plugins.policies"
    return [
        PolicySpec(name="fcfs", target=f"{here}.fcfs:FCFS", help="First come, first served.", api=API_VERSION),
        PolicySpec(
            name="priority",
            target=f"{here}.priority:Priority",
            help="A lower priority value goes first, then the earlier arrival.",
            api=API_VERSION,
        ),
        PolicySpec(
            name="fair",
            target=f"{here}.fair:Fair",
            help="Each client gets tokens by its weight, however many requests it sends.",
            api=API_VERSION,
            params=FairParams,
        ),
    ]
