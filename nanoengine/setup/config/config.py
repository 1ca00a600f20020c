"""The configuration of a run: composed YAML, checked against strict frozen dataclasses.

Every key of every file and override must be known; every value must be of its type and range. Errors name the file,
the line, the key and the nearest valid name. This module imports no torch.
"""

from __future__ import annotations

import json
import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from nanoengine.api.errors import ConfigError, ParamsError, PluginError, nearest, nearest_part
from nanoengine.api.plugin_calls import plugin_call
from nanoengine.observe.files import user_path
from nanoengine.params.engine_options import EngineOptions
from nanoengine.params.field_types import conform_text
from nanoengine.params.sampling_fields import NOT_SUPPORTED, legal_fields
from nanoengine.params.speculation import NO_SPECULATION
from nanoengine.setup.config.composer import Composed, Root, SearchPath, Shorthand, compose, package_root
from nanoengine.setup.config.composer.yaml_file import ConfigFile, KeyPath, dotted, not_a_file
from nanoengine.setup.config.engine_options import dtype_hint
from nanoengine.setup.config.prompts import PromptFile, Prompts, check_prompts
from nanoengine.setup.config.sampler_section import Processors, check_sampler, logits_processors
from nanoengine.setup.config.sections import section_class, section_keys, section_names
from nanoengine.setup.plugins.discover import discover
from nanoengine.setup.plugins.policies import NAME, OPTIONS, choose_policy
from nanoengine.setup.plugins.registry import Kind, Registry
from nanoengine.setup.plugins.sources import with_revision
from nanoengine.setup.plugins.speculation import choose_speculation
from nanoengine.setup.plugins.validation import RUN_KEYS

_YAML = (".yaml", ".yml")
BARE = "bare"
"""The recipe that has no model and no prompts: a model in the place of a configuration is run with it."""


class NoSuchConfig(ConfigError):
    """No file, recipe or model has the name that was given for a configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSection:
    """`source`: a registered name, a folder, a .gguf file, a hub id, or whatever else a model source knows.

    `revision`: branch, tag or commit of a hub id. `implementation`: name of the model plugin to take where several
    implement the architecture.
    """

    source: str
    revision: str | None = None
    implementation: str | None = None

    def __post_init__(self) -> None:
        if self.revision is not None and "@" in self.source:
            raise ConfigError(f"model.revision is given, but model.source, {self.source}, names one: leave out one")

    @property
    def pinned(self) -> str:
        """The source with its revision, as model sources take it."""
        return with_revision(self.source, self.revision)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSection:
    """`backend`: name of an attention backend, or "auto"."""

    backend: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A whole configuration.

    Attributes:
        model: where the model comes from. attention: the attention backend. engine: the options of the engine.
        sampler: keywords of `SamplingParams`; None: the model's own defaults are used.
        prompts: texts or conversations, or the file that has them; None: none were given.
        output: path of the results, relative to the working directory; None: no file is written.
        chat: prompts become chat messages if the model has a chat template.
        sections: what commands read, such as "server": the dataclass of each section that was given.
        provenance: dotted key -> "file:line" or "override '...'", for the keys that were given.
    """

    model: ModelSection
    sampler: Mapping[str, Any] | None = None
    attention: AttentionSection = field(default_factory=AttentionSection)
    engine: EngineOptions = field(default_factory=EngineOptions)
    prompts: Prompts | None = None
    output: str | None = None
    chat: bool = True
    sections: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)


_SECTIONS: Mapping[str, type[Any]] = {"model": ModelSection, "attention": AttentionSection, "engine": EngineOptions}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?")
_SPECULATION = ("engine", "speculation")  # where the section `speculation` goes
_NOT_GIVEN = object()


def load_config(
    path_or_recipe: str | Path, overrides: Sequence[str] = (), *, registry: Registry | None = None
) -> RunConfig:
    """Composes and checks a configuration.

    Args:
        path_or_recipe: a YAML file, the name of a recipe that nanoengine or a plugin ships, such as "quickstart", or a
            model: a registered name, a folder with config.json, a .gguf file, a hub id.
        overrides: as on the command line: "sampler.top_p=0.9", "model=./folder", "~output".
        registry: what `discover` found; None: discovers what is installed.

    Raises:
        ConfigError: naming file and line, or the override, and the nearest valid name.
        PluginError: a config root, or a part that the configuration names, is broken or not installed.
    """
    registry = discover() if registry is None else registry
    roots = [each for root, origin in registry.config_roots for each in package_root(root, str(origin))]
    shorthands = _shorthands(registry)
    if _is_model(str(path_or_recipe), roots, shorthands["model"]):
        path_or_recipe, overrides = BARE, [f"model={json.dumps(str(path_or_recipe))}", *overrides]
    primary, search = _primary(path_or_recipe, roots, registry.failure_hint("configs"))
    interpolable = {"attention": asdict(AttentionSection()), "engine": asdict(EngineOptions()), "chat": True}
    plain = [key for key in RUN_KEYS if key not in _SECTIONS and key not in ("sampler", "speculation")]
    composed = compose(primary, search, overrides, shorthands=shorthands, defaults=interpolable, plain=plain)
    return _checked(_with_speculation(composed), registry, primary.label)


def _is_model(given: str, roots: Sequence[Root], models: Shorthand) -> bool:
    """Whether this is a model and no configuration: no YAML file, no recipe, and no path that is mistyped."""
    path = user_path(given, "configuration file")
    if path.suffix in _YAML or SearchPath(None, roots).find("", given) is not None:
        return False
    if os.path.lexists(path):
        return path.suffix == ".gguf" or (path / "config.json").is_file()
    group_option = SearchPath(None, roots).find("model", given) is not None
    return group_option or given in models.names or (bool(_HUB_ID.fullmatch(given)) and not path.parent.exists())


def _with_speculation(composed: Composed) -> Composed:
    """The section `speculation`, which is short for `engine.speculation`, in its place there."""
    data = {key: value for key, value in composed.data.items() if key != "speculation"}
    given, engine = composed.data.get("speculation", _NOT_GIVEN), data.get("engine") or {}
    if not isinstance(engine, Mapping):
        return composed  # which is refused
    if given is _NOT_GIVEN:
        given = engine.get("speculation")
        return replace(composed, data={**data, "engine": _named(engine, given)}) if isinstance(given, str) else composed
    if "speculation" in engine:
        one, other = composed.origin(("speculation",)), composed.origin(_SPECULATION)
        raise ConfigError(f"{one} and {other}: speculation is short for engine.speculation; leave out one of them")
    origins = {(*_SPECULATION, *p[1:]) if p[0] == "speculation" else p: by for p, by in composed.origins.items()}
    known = [((*_SPECULATION, *p[1:]) if p[0] == "speculation" else p, by) for p, by in composed.given]
    return replace(composed, data={**data, "engine": _named(engine, given)}, origins=origins, given=known)


def _named(engine: Mapping[str, Any], given: Any) -> dict[str, Any]:
    """The section `engine` with this `speculation`. A text is its method: in engine.speculation, or from an
    interpolation (`speculation: ${oc.env:METHOD}`)."""
    return {**engine, "speculation": {"method": given} if isinstance(given, str) else given}


def _primary(path_or_recipe: str | Path, roots: Sequence[Root], failure_hint: str) -> tuple[ConfigFile, SearchPath]:
    path = user_path(path_or_recipe, "configuration file")
    if path.is_file():
        shipped = any(path.parent.resolve() == root.folder.resolve() for root in roots)
        own = None if shipped else Root(path.parent, str(path.parent), "your own folder")
        search = SearchPath(own, roots, failure_hint)
        return search.read(path, str(path)), search
    search = SearchPath(None, roots, failure_hint)
    name = str(path_or_recipe)
    if path.suffix or os.sep in name:
        if os.path.lexists(path):
            raise ConfigError(f"{path} {not_a_file(path)}")
        raise NoSuchConfig(f"no configuration file {name} (looked for {path.absolute()}){_sibling(path)}")
    found = search.find("", name)
    if found is None:
        known = nearest(name, [*search.options(""), *search.options("model")]).partition("Valid: ")[0]
        recipes, models = (", ".join(search.options(group)) for group in ("", "model"))
        raise NoSuchConfig(
            f"no file, recipe or model is called {name!r}{_sibling(path)}; {known}Valid: {recipes}. "
            f"Models: {models}{failure_hint}"
        )
    return found, search


def _sibling(path: Path) -> str:
    """The file of that name with YAML's other ending, if there is one: the tail of a message."""
    if not path.name or path.suffix not in ("", *_YAML):
        return ""
    there = [other for other in map(path.with_suffix, _YAML) if other != path and other.is_file()]
    return f"; did you mean {there[0]}, which is there?" if there else ""


def _is_there(option: str) -> bool:
    try:
        return user_path(option, "model").exists()
    except ConfigError:  # no file can be called so
        return False


def _shorthands(registry: Registry) -> Mapping[str, Shorthand]:
    sources = [name for found in registry.model_sources.values() for name in found.spec.models]
    # A backend that clashes or failed is accepted: the error comes when it is looked up.
    troubled = {c.name for c in registry.conflicts} | {f.provides[1] for f in registry.failures if f.provides}
    backends, drafters = [*registry.attention_backends, "auto"], [*registry.drafters, NO_SPECULATION]
    return {
        "model": Shorthand(
            "source",
            lambda option: option in sources or "/" in option or _is_there(option),
            sources,
            "the path of a folder or a .gguf file, a hub id (owner/name), or anything else with a / in it",
        ),
        "attention": Shorthand(
            "backend",
            lambda option: option in backends or option in troubled,
            backends,
            "what a plugin brings: install its package, or give --plugin FILE, in Python plugins=[FILE]",
        ),
        "speculation": Shorthand(
            "method",
            lambda option: option in drafters or option in troubled,
            drafters,
            "what a plugin brings: install its package, or give --plugin FILE, in Python plugins=[FILE]",
        ),
    }


def _checked(composed: Composed, registry: Registry, label: str) -> RunConfig:
    processors = logits_processors(registry)
    _check_keys(composed, list(legal_fields(processors)), registry)
    data = composed.data
    own = [name for name in section_names(registry) if name in data]
    for name in ("engine", "sampler", *own):
        if isinstance(data.get(name), str):
            raise ConfigError(
                f"{composed.origin((name,))}: {name} must be a mapping, not {data[name]!r}; a file of the config group "
                f"is chosen in the defaults list: 'defaults:', and below it '- {name}: {data[name]}'"
            )
    if not data.get("model"):
        known = ", ".join(name for found in registry.model_sources.values() for name in found.spec.models)
        raise ConfigError(
            f"{label}: no model is chosen; write 'model: NAME-OR-PATH', or give model=NAME-OR-PATH, such as {known}; "
            "nanoengine config list model lists more"
        )
    config = RunConfig(
        model=_section(composed, "model", ModelSection),
        attention=_section(composed, "attention", AttentionSection),
        engine=_section(composed, "engine", EngineOptions),
        sampler=_sampler(composed, processors),
        prompts=check_prompts(data.get("prompts"), lambda path: composed.origin(("prompts", *path))),
        output=_value(composed, ("output",), str | None, data.get("output")),
        chat=_value(composed, ("chat",), bool, data.get("chat", True)),
        sections={name: _section(composed, name, section_class(registry, name)) for name in own},
        provenance=MappingProxyType({dotted(path): by for path, by in composed.origins.items()}),
    )
    _check_whole(config, composed, registry)
    return config


def _sampler(composed: Composed, processors: Processors) -> Mapping[str, Any] | None:
    given = composed.data.get("sampler")
    if given is None:
        return None
    return MappingProxyType(check_sampler(given, processors, lambda *key: composed.origin(("sampler", *key))))


def _check_whole(config: RunConfig, composed: Composed, registry: Registry) -> None:
    """Checks what needs several values, or the registry."""
    if config.output == "":
        raise ConfigError(f"{composed.origin(('output',))}: output: is empty; write a path, or null for no file")
    if config.attention.backend != "auto":
        _check_installed(composed, registry, ("attention", "backend"), "attention_backends", config.attention.backend)
    if config.engine.speculation is not None:
        choose_speculation(registry, config.engine.speculation, lambda key: f"{_of(composed, key)}: ")
    policy = config.engine.scheduling_policy
    choose_policy(registry, policy, config.engine.policy_options, lambda key: f"{_of_policy(composed, key)}: ")
    if config.model.implementation is not None:
        _check_installed(composed, registry, ("model", "implementation"), "models", config.model.implementation)
    if not config.chat and isinstance(config.prompts, tuple):
        for index, prompt in enumerate(config.prompts):
            if not isinstance(prompt, str):
                where = composed.origin(("prompts", index))
                raise ConfigError(f"{where}: prompts[{index}] is a conversation, but chat is false; give its text")


def _of(composed: Composed, key: str) -> str:
    """Who gave the key of `speculation`, or the whole ("")."""
    return composed.origin((*_SPECULATION, key) if key else _SPECULATION)


def _of_policy(composed: Composed, key: str) -> str:
    """Who gave the option of the scheduling policy, or ("") its name."""
    return composed.origin(("engine", OPTIONS, key) if key else ("engine", NAME))


def _check_installed(composed: Composed, registry: Registry, path: KeyPath, kind: Kind, name: str) -> None:
    try:
        registry.require(kind, name)
    except PluginError as error:
        raise PluginError(f"{composed.origin(path)}: {dotted(path)}: {error}") from error


def _check_keys(composed: Composed, sampling: Sequence[str], registry: Registry) -> None:
    """Raises `ConfigError` for an unknown key."""
    commands = section_names(registry)
    choices: dict[str, Sequence[str]] = {name: [f.name for f in fields(cls)] for name, cls in _SECTIONS.items()}
    choices |= {"sampler": sampling, "prompts": [f.name for f in fields(PromptFile)]}
    choices |= {
        name: section_keys(registry, name) for name in commands if (name,) in {path[:1] for path, _ in composed.given}
    }
    for path, origin in composed.given:
        if path[0] not in RUN_KEYS and path[0] not in commands:
            choices |= {name: section_keys(registry, name) for name in commands if name not in choices}
            inside = " or ".join(f"'{name}.{path[0]}'" for name in choices if path[0] in choices[name])
            known = f"{nearest(str(path[0]), (*RUN_KEYS, *commands))}{registry.failure_hint('commands')}"
            if inside:
                known = f"did you mean {inside}? Valid: {known.partition('Valid: ')[2]}"
            raise ConfigError(f"{origin}: unknown key {dotted(path)!r}; {known}")
        if len(path) != 2 or path[0] not in choices:
            continue
        if isinstance(path[1], int) and (path[0] == "prompts" or not isinstance(composed.data.get(path[0]), Mapping)):
            continue  # an item of a list
        if path[1] not in choices[str(path[0])]:
            key, valid = str(path[1]), choices[str(path[0])]
            why = nearest(key, valid)
            if path[0] == "sampler":
                failed, unsupported = registry.failure_hint("samplers"), NOT_SUPPORTED.get(key)
                why = f"not supported: {unsupported}" if unsupported else nearest_part(key, valid) + failed
            raise ConfigError(f"{origin}: unknown key {dotted(path)!r}; {why}")


def _section(composed: Composed, name: str, cls: type[Any]) -> Any:
    """A section as its dataclass; one that is empty or absent has its defaults."""
    given = composed.data.get(name)
    if given is None:
        given = {}
    if isinstance(given, str) and name in ("model", "attention"):  # from an interpolation: `model: ${oc.env:MODEL}`
        given = {fields(cls)[0].name: given}
    if not isinstance(given, Mapping):
        valid = ", ".join(f.name for f in fields(cls))
        raise ConfigError(f"{composed.origin((name,))}: {name} must be a mapping of {valid}, not {given!r}")
    hints = typing.get_type_hints(cls)
    values = {key: _value(composed, (name, key), hints[key], value) for key, value in given.items()}
    if name == "model" and not values.get("source"):
        raise ConfigError(f"{composed.origin((name,))}: model.source must be given: a registered name or a path")
    try:
        with plugin_call(f"{cls.__qualname__} failed", cls):
            return cls(**values)
    except ConfigError as error:  # out of range; it begins with the option's name, "engine.seed"
        key = str(error).split(maxsplit=1)[0].removeprefix(f"{name}.")
        raise ConfigError(f"{composed.origin((name, key))}: {error}") from error


def _value(composed: Composed, path: KeyPath, annotation: Any, value: Any) -> Any:
    try:
        return conform_text(dotted(path), value, annotation)
    except ParamsError as error:
        hint = dtype_hint(value) if path == ("engine", "dtype") else ""
        raise ConfigError(f"{composed.origin(path)}: {error}{hint}") from error
    except ConfigError as error:  # of a dataclass within the section; it begins with the key, too
        raise ConfigError(f"{composed.origin(_path(str(error), path))}: {error}") from error


def _path(message: str, path: KeyPath) -> KeyPath:
    """The key that the message begins with, if it is in `path`."""
    named = tuple(message.split(maxsplit=1)[0].split("."))
    return named if named[: len(path)] == path else path
