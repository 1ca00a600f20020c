"""Makes the sampler stages, and tells apart those that cannot be made: they fail only the requests that use them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanoengine.api.errors import NanoEngineError, PluginError, shown
from nanoengine.api.plugin_calls import plugin_call
from nanoengine.api.processors import Need, SamplerStage, StageContext
from nanoengine.api.specs import Phase
from nanoengine.core.options import StagePlan
from nanoengine.setup.plugins.choose import load_checked
from nanoengine.setup.plugins.targets import TargetLoader


@dataclass(frozen=True, slots=True)
class BuiltStages:
    """working: in the plan's order. failed: name -> cause, for the others."""

    working: tuple[tuple[StagePlan, SamplerStage], ...]
    failed: dict[str, str]


def build_stages(plans: Sequence[StagePlan], loader: TargetLoader, ctx: StageContext) -> BuiltStages:
    """Load, check and construct each stage."""
    working, failed = [], {}
    for plan in plans:
        try:
            working.append((plan, _make_stage(plan, loader, ctx)))
        except NanoEngineError as error:
            failed[plan.name] = str(error)
    return BuiltStages(tuple(working), failed)


def _make_stage(plan: StagePlan, loader: TargetLoader, ctx: StageContext) -> SamplerStage:
    stage_class = load_checked(loader, plan.target, SamplerStage)
    with plugin_call(f"{plan.where} failed in __init__", stage_class):
        stage = stage_class(ctx)
    if not isinstance(stage.phase, Phase):
        raise PluginError(f"{plan.where} must set `phase` to a nanoengine.api.Phase, not {shown(stage.phase)}")
    needs: Any = stage.needs
    if not isinstance(needs, frozenset) or not all(isinstance(need, Need) for need in needs):
        raise PluginError(f"{plan.where} must set `needs` to a frozenset of nanoengine.api.Need, not {shown(needs)}")
    for name in ("argmax_invariant", "sharded"):
        if not isinstance(getattr(stage, name), bool):
            raise PluginError(f"{plan.where} must set `{name}` to True or False, not {shown(getattr(stage, name))}")
    return stage
