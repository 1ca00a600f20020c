"""What discovery found: the frozen `Registry`, with the origin of each part and the failures.

A broken plugin or two parts with the same name are recorded. They become an error only when the name is looked up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Generic, Literal, TypeVar, cast

from nanoengine.api.errors import _A_PLUGINS, ModelError, PluginError, nearest, nearest_part
from nanoengine.api.specs import (
    AttentionSpec,
    CommandSpec,
    DrafterSpec,
    GrammarSpec,
    ModelSourceSpec,
    ModelSpec,
    Origin,
    PluginFile,
    PolicySpec,
    QuantizationSpec,
    SamplerSpec,
    Spec,
    ToolParserSpec,
)

Kind = Literal[
    "models",
    "samplers",
    "attention_backends",
    "model_sources",
    "drafters",
    "grammars",
    "policies",
    "quantizations",
    "tool_parsers",
    "commands",
]
S = TypeVar("S", bound=Spec, covariant=True)

KIND_WORDS: Mapping[str, str] = {
    "models": "model",
    "samplers": "logits processor",
    "attention_backends": "attention backend",
    "model_sources": "model source",
    "drafters": "drafter",
    "grammars": "grammar backend",
    "tool_parsers": "tool parser",
    "policies": "scheduling policy",
    "quantizations": "quantisation",
    "commands": "command",
}


@dataclass(frozen=True, slots=True)
class Registered(Generic[S]):
    """A spec and its origin."""

    spec: S
    origin: Origin


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A plugin, or a part of one, that could not be registered.

    Attributes:
        origin: the plugin that failed.
        at: what failed: "import", "register", the name of a hook, or the kind and name of a spec.
        error_type, message: those of the exception. traceback: its last frames, as text; "" for our own checks.
        provides: (kind, name) of the part that could not be registered; None if it is not known.
    """

    origin: Origin
    at: str
    error_type: str
    message: str
    traceback: str = ""
    provides: tuple[str, str] | None = None

    @property
    def cause(self) -> str:
        return f"{self.error_type}: {self.message}"

    def __str__(self) -> str:
        return f"{self.origin} failed at {self.at}: {self.cause}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """A name that several plugins registered. None of their parts can be used."""

    kind: Kind
    name: str
    claims: tuple[Registered[Any], ...]

    def __str__(self) -> str:
        who = " and ".join(str(claim.origin) for claim in self.claims)
        what = f"{KIND_WORDS[self.kind]} {self.name!r} is registered by {who}"
        return f"{what}; {_one_too_many(self.claims)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Registry:
    """Every part that plugins registered, by kind and name. Frozen; made by `plugins.discover`.

    Attributes:
        models, samplers, attention_backends, model_sources, drafters, grammars, policies, quantizations, tool_parsers,
            commands: in registration order: nanoengine's own, then installed packages by name, then plugin files, then
            objects. Names in conflict are left out.
        config_roots: roots of config groups ("pkg://package.module") with their origins.
        plugins: those that were imported, each once. failures: what could not be registered.
        conflicts: names that several plugins registered.
        plugin_files: files that a worker process must load before it can import targets from them.
    """

    models: Mapping[str, Registered[ModelSpec]]
    samplers: Mapping[str, Registered[SamplerSpec]]
    attention_backends: Mapping[str, Registered[AttentionSpec]]
    model_sources: Mapping[str, Registered[ModelSourceSpec]]
    config_roots: tuple[tuple[str, Origin], ...] = ()
    plugins: tuple[Origin, ...] = ()
    failures: tuple[Failure, ...] = ()
    conflicts: tuple[Conflict, ...] = ()
    plugin_files: tuple[PluginFile, ...] = ()
    grammars: Mapping[str, Registered[GrammarSpec]] = field(default_factory=dict)
    commands: Mapping[str, Registered[CommandSpec]] = field(default_factory=dict)
    drafters: Mapping[str, Registered[DrafterSpec]] = field(default_factory=dict)
    tool_parsers: Mapping[str, Registered[ToolParserSpec]] = field(default_factory=dict)
    policies: Mapping[str, Registered[PolicySpec]] = field(default_factory=dict)
    quantizations: Mapping[str, Registered[QuantizationSpec]] = field(default_factory=dict)

    def require(self, kind: Kind, name: str) -> Registered[Any]:
        """The part of this kind and name. Raises `PluginError` if it is in conflict, failed, or is not installed."""
        found: Mapping[str, Registered[Any]] = getattr(self, kind)
        if name in found:
            return found[name]
        for conflict in self.conflicts:
            if (conflict.kind, conflict.name) == (kind, name):
                raise PluginError(str(conflict))
        for failure in self.failures:
            if failure.provides == (kind, name):
                raise PluginError(f"{KIND_WORDS[kind]} {name!r} is not available: {failure}")
        raise PluginError(
            f"no {KIND_WORDS[kind]} {name!r} is installed; {nearest_part(name, found)}{self.failure_hint(kind)}"
            " (see `nanoengine plugins list`)"
        )

    def attention(self, name: str) -> Registered[AttentionSpec]:
        """The attention backend of this name. Raises `PluginError` as `require` does."""
        return self.require("attention_backends", name)

    def model_for(self, architectures: Sequence[str], name: str | None = None) -> Registered[ModelSpec]:
        """The model for the first supported one of `architectures` (of config.json), or the model called `name`.

        Raises `ModelError` if no model supports them, `PluginError` if several plugins support the same one.
        """
        if name is not None:
            return self._model_by_name(architectures, name)
        for architecture in architectures:
            supporting = self.supporting(architecture)
            if len(supporting) > 1:
                raise PluginError(_several_support(architecture, supporting))
            if supporting:
                return supporting[0]
        supported = {architecture for each in self._claims() for architecture in each.spec.architectures}
        wanted = architectures[0] if architectures else ""
        what = f"no installed model supports architecture {wanted!r}" if wanted else "config.json names no architecture"
        raise ModelError(f"{what}; {nearest(wanted, supported)}{_A_PLUGINS}{self.failure_hint('models')}")

    def supporting(self, architecture: str) -> list[Registered[ModelSpec]]:
        """The models that support it. More than one is a conflict."""
        return [each for each in self._claims() if architecture in each.spec.architectures]

    def _claims(self) -> list[Registered[ModelSpec]]:
        """All models, those of plugins in conflict too."""
        return [*self.models.values(), *(claim for c in self.conflicts if c.kind == "models" for claim in c.claims)]

    def _model_by_name(self, architectures: Sequence[str], name: str) -> Registered[ModelSpec]:
        found: Registered[ModelSpec] = self.require("models", name)
        if not set(architectures) & set(found.spec.architectures):
            raise ModelError(
                f"model {name!r} ({found.origin}) supports {', '.join(found.spec.architectures)}, "
                f"not {', '.join(architectures) or 'a checkpoint without architectures'}"
            )
        return found

    def processors(self) -> tuple[Registered[SamplerSpec], ...]:
        """Every logits processor.

        Raises `PluginError` that names both if two processors have the same name or parameter: every request can use
        every processor, so this is an error for all requests.
        """
        self._refuse_conflicts("samplers")
        owners: dict[str, Registered[SamplerSpec]] = {}
        for found in self.samplers.values():
            for parameter in (f.name for f in fields(cast(Any, found.spec.params))):
                if parameter in owners:
                    raise PluginError(_both_claim(parameter, owners[parameter], found))
                owners[parameter] = found
        return tuple(self.samplers.values())

    def sources(self) -> tuple[Registered[ModelSourceSpec], ...]:
        """Every model source, in the order in which they are asked. Raises `PluginError` if two have the same name."""
        self._refuse_conflicts("model_sources")
        return tuple(sorted(self.model_sources.values(), key=lambda found: (found.spec.order, found.spec.name)))

    def source_names(self) -> tuple[str, ...]:
        """Names of models that sources provide, for listings and did-you-mean."""
        return tuple(name for found in self.sources() for name in found.spec.models)

    def _refuse_conflicts(self, kind: Kind) -> None:
        found = [conflict for conflict in self.conflicts if conflict.kind == kind]
        if found:
            raise PluginError("; ".join(map(str, found)))

    def failure_hint(self, kind: Kind | Literal["configs"]) -> str:
        """The end of a message about a missing part: failures of plugins that may provide it; "" if there are none."""
        hook = f"register_{kind}"
        might = [
            failure
            for failure in self.failures
            if failure.at in ("import", "register", hook)
            or (failure.provides is not None and failure.provides[0] == kind)
        ]
        return "".join(f". It may be missing because {failure}" for failure in might)


def _several_support(architecture: str, supporting: Sequence[Registered[ModelSpec]]) -> str:
    who = " and ".join(f"model {each.spec.name!r} of {each.origin}" for each in supporting)
    choose = "choose one by name (model.implementation in YAML, LLM(implementation=...))"
    return f"architecture {architecture!r} is supported by {who}; {choose}, or {_fixes(supporting)}"


def _fixes(claims: Sequence[Registered[Any]]) -> str:
    return " or ".join(dict.fromkeys(claim.origin.fix for claim in claims if claim.origin.fix))


def _one_too_many(claims: Sequence[Registered[Any]]) -> str:
    """What to do if several plugins register the same name."""
    stays = any(not claim.origin.fix for claim in claims)
    return f"rename yours, or {_fixes(claims)}" if stays else f"remove one of them: {_fixes(claims)}"


def _both_claim(parameter: str, one: Registered[SamplerSpec], other: Registered[SamplerSpec]) -> str:
    who = " and ".join(f"logits processor {each.spec.name!r} of {each.origin}" for each in (one, other))
    return f"sampling parameter {parameter!r} is defined by {who}; {_one_too_many((one, other))}"
