"""The built-in drafters, one per file. This module imports no torch: drafters are named by target."""

from __future__ import annotations

from nanoengine.api import API_VERSION, DrafterSpec, hookimpl
from nanoengine.plugins.drafters.params import NgramParams, SuffixParams


@hookimpl
def register_drafters() -> list[DrafterSpec]:
    here = "nanoengine.plugins.drafters"
    return [
        DrafterSpec(name="ngram", params=NgramParams, target=f"{here}.ngram:NgramDrafter", api=API_VERSION),
        DrafterSpec(name="suffix", params=SuffixParams, target=f"{here}.suffix:SuffixDrafter", api=API_VERSION),
    ]
