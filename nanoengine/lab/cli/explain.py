"""`nanoengine config explain`: what keys of a configuration mean, also keys of plugins. The reference in a terminal."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

import typer

from nanoengine.api.errors import ConfigError, nearest
from nanoengine.cli.common import DebugOption, PluginOption, answer, user_errors
from nanoengine.lab.facts import Fact, default, facts, meanings, source
from nanoengine.params.engine_options import EngineOptions
from nanoengine.params.sampling_fields import CoreFields
from nanoengine.params.speculation import SpeculationOptions
from nanoengine.setup.config.config import AttentionSection, ModelSection, RunConfig
from nanoengine.setup.config.prompts import PromptFile
from nanoengine.setup.config.sampler_section import logits_processors
from nanoengine.setup.config.sections import section_class, section_names
from nanoengine.setup.plugins.discover import discover
from nanoengine.setup.plugins.registry import Registry

_WIDTH = 100  # of a line that is not for a terminal
_OWN: tuple[tuple[str, type[Any], Mapping[str, Any]], ...] = (  # section, its class, and fields that have no default
    ("model", ModelSection, {"source": "m"}),
    ("attention", AttentionSection, {}),
    ("engine", EngineOptions, {}),
    ("speculation", SpeculationOptions, {"method": "ngram"}),
    ("prompts", PromptFile, {"file": "f"}),
)


@dataclass(frozen=True, slots=True)
class Key:
    """A key, as "engine.block_size", and what is known of it. `owner`: the part that has it, if it is no section."""

    name: str
    fact: Fact
    owner: str = ""


def _complete(incomplete: str) -> list[str]:
    names = [each.name for each in keys(discover())]
    plain = [name.rpartition(".")[2] for name in names]
    return list(dict.fromkeys(each for each in (*names, *plain) if each.startswith(incomplete)))


def explain(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY]...",
            help="Keys or sections: temperature, engine.block_size, server.",
            show_default=False,
            autocompletion=_complete,
        ),
    ] = None,
    plugin: PluginOption = None,
    debug: DebugOption = False,
) -> None:
    """Print what keys of a configuration mean: type, default, range. Without a key: all keys."""
    with user_errors(debug):
        known = list(keys(discover(plugin or ())))
        if not names:
            answer("\n".join(f"{each.name}: {_type(each.fact)}" for each in known))
            return
        answer("\n\n".join(_text(key) for key in _chosen(names, known)))


def keys(registry: Registry) -> Iterator[Key]:
    """All keys that have a meaning of their own, section by section."""
    for name, cls, given in _OWN:
        yield from _section(name, cls, given)
    said = meanings(RunConfig)
    for each in fields(RunConfig):
        if each.name in ("output", "chat"):
            yield Key(each.name, Fact(each.name, source(each.type), default(each), said[each.name]))
    for drafter in registry.drafters.values():
        yield from _section("speculation", drafter.spec.params, {}, f"the drafter {drafter.spec.name}")
    yield from _section("sampler", CoreFields, {})
    for name, params in logits_processors(registry):
        yield from _section("sampler", params, {}, f"the logits processor {name}")
    for name in section_names(registry):
        yield from _section(name, section_class(registry, name), {})


def _section(name: str, cls: type[Any], given: Mapping[str, Any], owner: str = "") -> Iterator[Key]:
    for fact in facts(cls, given=given, complete=False):
        yield Key(f"{name}.{fact.name}", fact, owner)


def _chosen(names: Sequence[str], known: Sequence[Key]) -> list[Key]:
    """The keys of these names: whole, or without the section; or all of a section. Raises `ConfigError`."""
    found = list[Key]()
    for name in names:
        plain = name.rstrip(".")
        which = [each for each in known if f".{plain}." in f".{each.name}."]
        if not which:
            words = {part for each in known for part in (each.name, each.name.rpartition(".")[2])}
            close = nearest(plain, words).partition("Valid: ")[0]
            raise ConfigError(f"no key is called {name!r}; {close}nanoengine config explain lists all keys")
        found += which
    return list(dict.fromkeys(found))


def _type(fact: Fact) -> str:
    return fact.kind + (f" = {fact.default}" if fact.default else "")


def _text(key: Key) -> str:
    fact = replace(key.fact, meaning=key.fact.meaning or "its plugin says nothing about it")
    parts = [fact.meaning, f"it must be {fact.rules}" if fact.rules else "", f"of {key.owner}" if key.owner else ""]
    text = ". ".join(f"{part[0].upper()}{part[1:]}" for part in parts if part)
    width = min(shutil.get_terminal_size((_WIDTH, 0)).columns, _WIDTH)
    body = textwrap.fill(f"{text}.", width, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)
    return f"{key.name}: {_type(fact)}\n{body}"
