"""Scheduling policies for tests and benchmarks of the scheduler, without an engine."""

from __future__ import annotations

from typing import Any

from nanoengine.api import Policy
from nanoengine.api.plugin_calls import name_of
from nanoengine.api.policy_checks import CheckedPolicy
from nanoengine.setup.plugins.discover import discover
from nanoengine.setup.plugins.policies import choose_policy, make_policy
from nanoengine.setup.plugins.targets import TargetLoader


def named_policy(name: str, **options: Any) -> CheckedPolicy:
    """The installed policy of that name, as an engine has it."""
    return make_policy(choose_policy(discover(), name, options), TargetLoader())


def checked_policy(policy: Policy) -> CheckedPolicy:
    """A policy that no plugin registers."""
    return CheckedPolicy(policy, f"scheduling policy {name_of(type(policy))}")
