"""Chooses the tool parser of a model."""

from __future__ import annotations

from nanoengine.api.errors import PluginError
from nanoengine.api.plugin_calls import name_of, plugin_call
from nanoengine.api.tool_parsers import ToolParser
from nanoengine.setup.plugins.choose import load_checked
from nanoengine.setup.plugins.registry import Registry
from nanoengine.setup.plugins.targets import TargetLoader


def choose_tool_parser(registry: Registry, name: str | None, template: str) -> type[ToolParser] | None:
    """The tool parser `name`; for "auto" the one that matches the chat template, None if none does; None for None.

    Raises `PluginError` if it does not exist or is broken. For "auto", one that is
    broken matters only if no other matches.
    """
    if name is None:
        return None
    loader = TargetLoader(registry.plugin_files)
    if name != "auto":
        return load_checked(loader, registry.require("tool_parsers", name).spec.target, ToolParser)
    ranked = sorted(registry.tool_parsers.values(), key=lambda found: (-found.spec.preference, found.spec.name))
    broken: PluginError | None = None
    for found in ranked:
        try:
            parser = load_checked(loader, found.spec.target, ToolParser)
            with plugin_call(f"{name_of(parser)}.matches failed", parser):
                matches = parser.matches(template)
        except PluginError as error:
            broken = broken or error
            continue
        if matches:
            return parser
    if broken is not None:
        raise broken
    return None
