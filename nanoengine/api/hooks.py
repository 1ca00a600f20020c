"""The pluggy hooks. They are called only at start-up, and one by one, so one failure does not affect the others."""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from nanoengine.api.specs import (
    PROJECT,
    AttentionSpec,
    CommandSpec,
    DrafterSpec,
    GrammarSpec,
    ModelSourceSpec,
    ModelSpec,
    PolicySpec,
    QuantizationSpec,
    SamplerSpec,
    ToolParserSpec,
)

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_models() -> Iterable[ModelSpec]:  # type: ignore[empty-body]
    """Model implementations."""


@hookspec
def register_samplers() -> Iterable[SamplerSpec]:  # type: ignore[empty-body]
    """Logits processors."""


@hookspec
def register_attention_backends() -> Iterable[AttentionSpec]:  # type: ignore[empty-body]
    """Attention backends."""


@hookspec
def register_model_sources() -> Iterable[ModelSourceSpec]:  # type: ignore[empty-body]
    """Sources of models."""


@hookspec
def register_drafters() -> Iterable[DrafterSpec]:  # type: ignore[empty-body]
    """Drafters for speculation."""


@hookspec
def register_grammars() -> Iterable[GrammarSpec]:  # type: ignore[empty-body]
    """Grammar backends."""


@hookspec
def register_tool_parsers() -> Iterable[ToolParserSpec]:  # type: ignore[empty-body]
    """Tool parsers."""


@hookspec
def register_policies() -> Iterable[PolicySpec]:  # type: ignore[empty-body]
    """Scheduling policies."""


@hookspec
def register_quantizations() -> Iterable[QuantizationSpec]:  # type: ignore[empty-body]
    """Ways to store weights in fewer bits."""


@hookspec
def register_commands() -> Iterable[CommandSpec]:  # type: ignore[empty-body]
    """Commands of the command line."""


@hookspec
def register_configs() -> Iterable[str]:  # type: ignore[empty-body]
    """Roots of config groups, "pkg://package.module"."""
