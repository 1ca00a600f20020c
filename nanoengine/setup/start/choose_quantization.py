"""From config.json and `engine.quantization` to a `QuantizationPlan`, and from that to the methods of layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from nanoengine.api.errors import ConfigError, ModelError, PluginError, shown
from nanoengine.api.experts import ExpertsMethod
from nanoengine.api.layers import ChooseMethod, LayerInfo, LinearMethod
from nanoengine.api.plugin_calls import place_and_fix, plugin_call
from nanoengine.api.quantization import Quantization, QuantizationContext
from nanoengine.api.specs import QuantizationSpec
from nanoengine.params.engine_options import EngineOptions
from nanoengine.params.engine_plan import QuantizationPlan
from nanoengine.setup.plugins.choose import load_checked
from nanoengine.setup.plugins.registry import Registered, Registry
from nanoengine.setup.plugins.targets import TargetLoader
from nanoengine.setup.start.quantization import PACKED, Stated, is_packed, quantised_by

_OPTION = "engine.quantization"


def choose_quantization(registry: Registry, name: str, hf_config: Mapping[str, Any]) -> QuantizationPlan | None:
    """How the weights are stored in fewer bits; None: they are plain, or become plain while they are loaded.

    Args:
        name: `EngineOptions.quantization`.

    Raises `ModelError` for a checkpoint in a format that is not supported, `ConfigError` where `name` does not fit the
    checkpoint, `PluginError` if it is not installed, broken, or not the only one that reads the format.
    """
    stated = quantised_by(hf_config)
    if name in ("auto", "none"):
        return None if stated is None else _reader(registry, stated, name)
    found = _named(registry, name)
    if stated is not None and stated.method not in found.spec.formats:
        reads = ", ".join(found.spec.formats) or "no quantised checkpoint"
        raise ConfigError(
            f"{_OPTION} is {name!r}, which reads {reads}, but the checkpoint is quantised by {stated.method!r}; use "
            f"{_OPTION}=auto"
        )
    if stated is None and not found.spec.online:
        able = sorted(each.spec.name for each in registry.quantizations.values() if each.spec.online)
        raise ConfigError(
            f"{_OPTION} is {name!r}, but the checkpoint is not quantised, and {name} quantises no plain weights; those "
            f"that do: {', '.join(able) or 'none is installed'}"
        )
    return _plan(found, {} if stated is None else stated.config)


def _named(registry: Registry, name: str) -> Registered[QuantizationSpec]:
    """By its name. Raises `PluginError` also for the name of a format, as vLLM's options have it."""
    readers = [each.spec.name for each in registry.quantizations.values() if name.lower() in each.spec.formats]
    if name not in registry.quantizations and readers:
        raise PluginError(
            f"{_OPTION} is {name!r}, a quant_method, which {readers[0]!r} reads; use {_OPTION}=auto, or that name"
        )
    return registry.require("quantizations", name)


def _reader(registry: Registry, stated: Stated, name: str) -> QuantizationPlan | None:
    """For a quantised checkpoint and "auto" or "none". None: it is dequantised while it is loaded."""
    readers = [each for each in registry.quantizations.values() if stated.method in each.spec.formats]
    if name == "auto" and len(readers) > 1:
        who = " and ".join(f"{each.spec.name!r} of {each.origin}" for each in readers)
        raise PluginError(f"quant_method {stated.method!r} is read by {who}; choose one by {_OPTION}")
    if name == "auto" and readers:
        return _plan(readers[0], stated.config)
    if is_packed(stated.method):
        return None
    if readers:
        raise ConfigError(
            f"{_OPTION} is 'none', but the checkpoint is quantised by {stated.method!r}; {_OPTION}=auto reads it "
            f"by {readers[0].spec.name!r}"
        )
    formats = {each for found in registry.quantizations.values() for each in found.spec.formats}
    known = ", ".join(sorted({*formats, *(each.method for each in PACKED)}))
    hint = registry.failure_hint("quantizations")
    raise stated.refused(
        f"supported: {known}{hint}. Otherwise use the checkpoint that this one was made from, or a GGUF file"
    )


def choose_methods(plan: QuantizationPlan | None, loader: TargetLoader, options: EngineOptions) -> ChooseMethod | None:
    """What chooses the method of each layer; None: all are plain. `options`: with device and dtype filled in.

    Raises `ModelError` for values of the config that are not supported, `PluginError` if the class is broken.
    """
    if plan is None:
        return None
    found = load_checked(loader, plan.target, Quantization)
    ctx = QuantizationContext(
        name=plan.name,
        config=plan.config,
        dtype=getattr(torch, options.dtype),
        device=torch.device(options.device).type,
        tp_size=options.tensor_parallel_size,
    )
    with plugin_call(f"{plan.where} failed in read", found, ModelError):
        read: object = found.read(ctx)
    if not isinstance(read, Quantization):
        raise PluginError(
            f"{plan.where} returned {shown(read)} from read, not one of its class{place_and_fix(None, found.read)}"
        )
    return _Chosen(plan, read)


@dataclass(frozen=True, slots=True)
class _Chosen:
    """`Quantization.method`, with errors that name the plugin."""

    plan: QuantizationPlan
    made: Quantization

    def __call__(self, layer: LayerInfo) -> LinearMethod | ExpertsMethod | None:
        owner = type(self.made)
        with plugin_call(f"{self.plan.where} failed in method, for {layer.name}", owner):
            found: object = self.made.method(layer)
        wanted = ExpertsMethod if layer.kind == "experts" else LinearMethod
        if found is None or (isinstance(found, wanted) and isinstance(found.label, str)):
            return found
        what = f"the label {shown(found.label)}" if isinstance(found, wanted) else shown(found)
        raise PluginError(
            f"{self.plan.where} returned {what} from method, for {layer.name}, not None or a "
            f"nanoengine.api.{wanted.__name__} whose label is text{place_and_fix(None, owner.method)}"
        )


def skipped_by(choose: ChooseMethod | None) -> tuple[str, ...]:
    """`Quantization.skip` of what `choose_methods` returned."""
    return choose.made.skip if isinstance(choose, _Chosen) else ()


def _plan(found: Registered[QuantizationSpec], config: Mapping[str, Any]) -> QuantizationPlan:
    return QuantizationPlan(name=found.spec.name, target=found.spec.target, config=config, origin=str(found.origin))
