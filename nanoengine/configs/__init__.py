"""The config groups that ship with nanoengine."""

from __future__ import annotations

from nanoengine.api import hookimpl


@hookimpl
def register_configs() -> list[str]:
    return ["pkg://nanoengine.configs"]
