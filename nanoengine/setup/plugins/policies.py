"""From `scheduling_policy: fair` and its options to a `PolicyPlan`, and from that to a policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nanoengine.api.errors import ConfigError, PluginError, nearest
from nanoengine.api.plugin_calls import plugin_call
from nanoengine.api.policies import Policy
from nanoengine.api.policy_checks import CheckedPolicy
from nanoengine.api.specs import PolicySpec
from nanoengine.params.engine_plan import PolicyPlan
from nanoengine.params.sampling_fields import plugin_fields
from nanoengine.setup.plugins.choose import load_checked
from nanoengine.setup.plugins.part_options import PartOptions, target_of
from nanoengine.setup.plugins.registry import Registered, Registry
from nanoengine.setup.plugins.targets import TargetLoader

NAME, OPTIONS = "scheduling_policy", "policy_options"


def choose_policy(
    registry: Registry, name: str, given: Mapping[str, Any], origin: Callable[[str], str] = lambda key: ""
) -> PolicyPlan:
    """The policy `name` with its checked options.

    `origin(key)` is where an option was given, as the beginning of a message: "file:line: "; with "", the name.

    Raises `ConfigError` that names the option and the valid ones, `PluginError` if the policy is not installed or
    broken.
    """
    try:
        found: Registered[PolicySpec] = registry.require("policies", name)
    except PluginError as error:
        raise PluginError(f"{origin('')}engine.{NAME}: {error}") from error
    params, part = found.spec.params, f"scheduling policy {name!r}"
    legal, checked = plugin_fields(part, params), PartOptions(f"engine.{OPTIONS}", origin)
    for key in given:
        if key not in legal:
            raise ConfigError(
                f"{origin(key)}engine.{OPTIONS}: {part} has no option {key!r}; {nearest(str(key), legal)}"
            )
    values = {key: checked.conformed(key, value, legal[key]) for key, value in given.items()}
    checked.made_of_plugin(part, params, values)
    return PolicyPlan(
        name=name,
        target=found.spec.target,
        params_target=target_of(params),
        params=values,
        origin=str(found.origin),
    )


def make_policy(plan: PolicyPlan, loader: TargetLoader) -> CheckedPolicy:
    """The plan's policy. Raises `PluginError` if its class cannot be loaded, or fails."""
    policy_class = load_checked(loader, plan.target, Policy)
    params = loader.load(plan.params_target)(**plan.params)
    with plugin_call(f"{plan.where} failed in __init__", policy_class):
        return CheckedPolicy(policy_class(params), plan.where)
