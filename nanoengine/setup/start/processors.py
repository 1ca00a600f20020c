"""Makes the logits processors. Those that cannot be made are recorded; they fail only the requests that use them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nanoengine.api.errors import NanoEngineError, PluginError, shown
from nanoengine.api.plugin_calls import plugin_call
from nanoengine.api.processor_params import Phase
from nanoengine.api.processors import LogitsProcessor, Need, ProcessorContext
from nanoengine.params.engine_plan import ProcessorPlan
from nanoengine.setup.plugins.choose import load_checked
from nanoengine.setup.plugins.targets import TargetLoader


@dataclass(frozen=True, slots=True)
class BuiltProcessors:
    """The processors that were made. `working`: in the plan's order. `failed`: name -> cause of the others."""

    working: tuple[tuple[ProcessorPlan, LogitsProcessor], ...]
    failed: dict[str, str]


def build_processors(plans: Sequence[ProcessorPlan], loader: TargetLoader, ctx: ProcessorContext) -> BuiltProcessors:
    """Loads, checks and makes each processor."""
    working, failed = [], {}
    for plan in plans:
        try:
            working.append((plan, _make_processor(plan, loader, ctx)))
        except NanoEngineError as error:
            failed[plan.name] = str(error)
    return BuiltProcessors(tuple(working), failed)


def _make_processor(plan: ProcessorPlan, loader: TargetLoader, ctx: ProcessorContext) -> LogitsProcessor:
    processor_class = load_checked(loader, plan.target, LogitsProcessor)
    with plugin_call(f"{plan.where} failed in __init__", processor_class):
        processor = processor_class(ctx)
    if not isinstance(processor.phase, Phase):
        raise PluginError(f"{plan.where} must set `phase` to a nanoengine.api.Phase, not {shown(processor.phase)}")
    needs: Any = processor.needs
    if not isinstance(needs, frozenset) or not all(isinstance(need, Need) for need in needs):
        raise PluginError(f"{plan.where} must set `needs` to a frozenset of nanoengine.api.Need, not {shown(needs)}")
    for name in ("argmax_invariant", "sharded"):
        if not isinstance(getattr(processor, name), bool):
            raise PluginError(f"{plan.where} must set `{name}` to True or False, not {shown(getattr(processor, name))}")
    return processor
