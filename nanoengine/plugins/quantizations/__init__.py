"""The built-in quantisations. This module imports no torch: classes are named by target."""

from __future__ import annotations

from nanoengine.api import QuantizationSpec, hookimpl


@hookimpl
def register_quantizations() -> list[QuantizationSpec]:
    return []
