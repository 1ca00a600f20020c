"""The built-in grammar backends, one per file. This module imports neither of their libraries."""

from __future__ import annotations

from nanoengine.api import GrammarSpec, hookimpl


@hookimpl
def register_grammars() -> list[GrammarSpec]:
    return [
        GrammarSpec(
            name="llguidance",
            target=f"{__name__}.llguidance:LLGuidance",
            api=1,
            preference=100,
            requires=("llguidance",),
            install="pip install 'nanoengine[grammars]'",
        ),
        GrammarSpec(
            name="xgrammar",
            target=f"{__name__}.xgrammar:XGrammar",
            api=1,
            preference=50,
            requires=("xgrammar",),
            install="pip install 'nanoengine[xgrammar]'",
        ),
    ]
