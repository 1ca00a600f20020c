"""From `speculation: {method: ngram, tokens: 4}` to a `SpeculationPlan`, and from that to a drafter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nanoengine.api.drafters import DeviceDrafter, DrafterContext, HostDrafter
from nanoengine.api.errors import ConfigError, PluginError, nearest
from nanoengine.api.plugin_calls import plugin_call
from nanoengine.api.specs import DrafterSpec
from nanoengine.params.engine_plan import SpeculationPlan
from nanoengine.params.speculation import NO_SPECULATION, OWN_KEYS, SpeculationOptions, drafter_types
from nanoengine.setup.plugins.choose import load_checked
from nanoengine.setup.plugins.part_options import PartOptions, target_of
from nanoengine.setup.plugins.registry import Registered, Registry
from nanoengine.setup.plugins.targets import TargetLoader

_VLLM_KEYS: Mapping[str, str] = {
    "num_speculative_tokens": "tokens",
    "prompt_lookup_max": "max_n",
    "prompt_lookup_min": "min_n",
    "suffix_decoding_max_cached_requests": "max_tokens",
}
"""Keys of vLLM's speculative_config -> ours."""


def choose_speculation(
    registry: Registry, given: Mapping[str, Any] | None, origin: Callable[[str], str] = lambda key: ""
) -> SpeculationPlan | None:
    """The checked mapping; None: speculation is off.

    `origin(key)` is where a key was given, as the beginning of a message: "file:line: ".

    Raises `ConfigError` that names the key and the valid ones, `PluginError` if the drafter is not installed or broken.
    """
    if given is None or given.get("method") == NO_SPECULATION:
        return None
    if given.get("method") is None:
        names = nearest("", [*registry.drafters, NO_SPECULATION])
        raise ConfigError(f"{origin('')}speculation needs a method, as in {{method: ngram, tokens: 4}}. {names}")
    checked = PartOptions("speculation", origin)
    method = checked.conformed("method", given["method"], str)
    try:
        found: Registered[DrafterSpec] = registry.require("drafters", method)
    except PluginError as error:
        raise PluginError(f"{origin('method')}speculation.method: {error}") from error
    spec = found.spec
    legal = {**OWN_KEYS, **drafter_types(method, spec.params)}
    for key in given:
        if key not in legal:
            ours = _VLLM_KEYS.get(key)
            why = f"here it is called {ours!r}" if ours in legal else nearest(str(key), legal)
            raise ConfigError(f"{origin(key)}speculation with method {method!r} has no key {key!r}; {why}")
    values = {key: checked.conformed(key, value, legal[key]) for key, value in given.items()}
    options = checked.made(SpeculationOptions, {k: v for k, v in values.items() if k in OWN_KEYS})
    own = {key: value for key, value in values.items() if key not in OWN_KEYS}
    checked.made_of_plugin(f"drafter {method!r}", spec.params, own)
    return SpeculationPlan(
        method=method,
        target=spec.target,
        params_target=target_of(spec.params),
        params=own,
        device=spec.device,
        tokens=options.tokens,
        min_acceptance=options.min_acceptance,
        step_tokens=options.step_tokens,
        origin=str(found.origin),
    )


def drafter_base(device: bool) -> type[Any]:
    return DeviceDrafter if device else HostDrafter


def make_drafter(
    plan: SpeculationPlan, loader: TargetLoader, *, vocab_size: int, max_model_len: int, max_slots: int, device: str
) -> HostDrafter | DeviceDrafter:
    """The plan's drafter; the sizes are those of `DrafterContext`. Raises `PluginError` if its class cannot be loaded,
    or fails."""
    ctx = DrafterContext(
        tokens=plan.tokens,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        max_slots=max_slots,
        device=device,
    )
    drafter_class = load_checked(loader, plan.target, drafter_base(plan.device))
    params = loader.load(plan.params_target)(**plan.params)
    with plugin_call(f"{plan.where} failed in __init__", drafter_class):
        made: HostDrafter | DeviceDrafter = drafter_class(ctx, params)
    return made
