"""Sections of a configuration that commands read, such as `server`: what `CommandSpec.sections` registers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from nanoengine.api.errors import PluginError, shown
from nanoengine.setup.plugins.registry import Registry
from nanoengine.setup.plugins.targets import TargetLoader


def section_names(registry: Registry) -> list[str]:
    """The keys of all sections of commands, in registration order."""
    return list(dict.fromkeys(name for found in registry.commands.values() for name in found.spec.sections))


def section_class(registry: Registry, name: str) -> type[Any]:
    """The dataclass of a section. Imports its module.

    Raises `PluginError` if commands of several plugins have the section, or if the target is no such dataclass.
    """
    claims = [found for found in registry.commands.values() if name in found.spec.sections]
    first, *others = claims
    target = first.spec.sections[name]
    for other in others:
        if other.spec.sections[name] != target:
            raise PluginError(
                f"section {name!r} is of command {first.spec.name!r} of {first.origin} and of command "
                f"{other.spec.name!r} of {other.origin}; remove one of them"
            )
    loader = TargetLoader(registry.plugin_files)
    found = loader.load(target)
    if not isinstance(found, type) or not dataclasses.is_dataclass(found):
        what = f"section {name!r} of command {first.spec.name!r} of {first.origin}: {loader.describe(target)}"
        raise PluginError(f"{what} is {shown(found)}, not a dataclass")
    return found


def section_keys(registry: Registry, name: str) -> Sequence[str]:
    """The keys that the section has."""
    return [field.name for field in dataclasses.fields(section_class(registry, name))]
