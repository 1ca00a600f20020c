"""`nanoengine config list`: every config group, its options, and the package of each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from nanoengine.api.errors import ConfigError, NanoEngineError, nearest
from nanoengine.cli.common import DebugOption, PluginOption, answer, user_errors
from nanoengine.setup.config.composer import Root, package_root
from nanoengine.setup.config.composer.yaml_file import read_yaml
from nanoengine.setup.plugins.discover import discover
from nanoengine.setup.plugins.registry import Registry

RECIPES = "recipes"
_OWN = "your own folder"
_WIDTH = 72  # most characters of a description


@dataclass(frozen=True, slots=True)
class Option:
    """An option that can be chosen.

    Attributes:
        group: "model", "sampler" ..., or "recipes" for what `nanoengine run NAME` runs.
        name: what to write after `group=`. provider: the package that has it.
        file: the option's file; None if a plugin's part is chosen by its name.
        says: the first comment of the file, or what it sets. clash: another provider has the same; neither can be used.
    """

    group: str
    name: str
    provider: str
    file: str | None = None
    says: str = ""
    clash: bool = False


def _complete_group(incomplete: str) -> list[str]:
    return sorted({each.group for each in options_of(discover())[0] if each.group.startswith(incomplete)})


def list_options(
    group: Annotated[
        str | None,
        typer.Argument(
            help="Only this group, or recipes; default: all.", show_default=False, autocompletion=_complete_group
        ),
    ] = None,
    beside: Annotated[
        Path | None,
        typer.Option(
            metavar="CONFIG", help="Also the groups next to this file; they have priority.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    plugin: PluginOption = None,
    debug: DebugOption = False,
) -> None:
    """List the config groups with their options, the package of each, and the recipes."""
    with user_errors(debug):
        registry = discover(plugin or ())
        if beside is not None and not beside.is_file():
            raise ConfigError(f"no configuration file {beside} (looked for {beside.absolute()})")
        options, clashes = options_of(registry, None if beside is None else beside.parent)
        failed = [each for each in registry.failures if each.provides is None or each.provides[0] == "configs"]
        problems = [*map(str, failed), *clashes]
        groups = sorted({option.group for option in options}, key=lambda each: (each == RECIPES, each))
        if group is not None and group not in groups:
            raise ConfigError(f"there is no config group {group!r}; {nearest(group, groups)}")
        options = [option for option in options if group in (None, option.group)]
        found = {"options": [asdict(option) for option in options], "problems": problems}
        answer(json.dumps(found, indent=2) if as_json else as_text(options, groups, problems))


def options_of(registry: Registry, own: Path | None = None) -> tuple[list[Option], list[str]]:
    """All options, and messages about clashes. Order: files of `own`, files of each package, parts by name."""
    roots = {own: Root(own, str(own), _OWN)} if own else {}
    for root, origin in registry.config_roots:
        for each in package_root(root, str(origin)):
            roots.setdefault(each.folder, each)  # a folder that is registered twice is listed once
    clashes, found = list[str](), dict[tuple[str, str], list[Option]]()
    for folder in roots.values():
        for option in _files(folder, recipes=folder.folder != own):
            found.setdefault((option.group, option.name), []).append(option)
    for option in _parts(registry):
        found.setdefault((option.group, option.name), [option])
    options = list[Option]()
    for (group, name), claims in found.items():
        if claims[0].provider == _OWN:
            claims = claims[:1]  # it is used instead of the others
        if len(claims) > 1:
            claims = [replace(claim, clash=True) for claim in claims]
            who = " and ".join(claim.provider for claim in claims)
            clashes.append(f"{group}={name} is provided by {who}; remove or rename one of them")
        options += claims
    return sorted(options, key=lambda option: (option.group == RECIPES, option.group, option.name)), clashes


def _files(root: Root, *, recipes: bool) -> Iterator[Option]:
    """The options in a folder's groups; with `recipes` also the files in the folder itself."""
    for file in sorted([*root.folder.glob("*/*.yaml"), *(root.folder.glob("*.yaml") if recipes else ())]):
        group = RECIPES if file.parent == root.folder else file.parent.name
        yield Option(group, file.stem, root.provider, str(file), _says(file))


def _says(file: Path) -> str:
    """The description of a file: its first comment, else what it sets."""
    try:
        text, data = file.read_text("utf-8"), read_yaml(file, file.name).data
    except (NanoEngineError, OSError, UnicodeDecodeError) as error:
        return f"cannot be read: {str(error).splitlines()[0]}"
    comment = re.match(r"#\s*(.+)", text)
    said = comment[1].rstrip(".") if comment else ", ".join(f"{key}: {_short(value)}" for key, value in data.items())
    return said if len(said) <= _WIDTH else said[: _WIDTH - 1] + "…"


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _parts(registry: Registry) -> Iterator[Option]:
    """The options of `model=`, `attention=` and `speculation=` that are chosen by name, without a file."""
    for source in registry.model_sources.values():
        for name in source.spec.models:
            yield Option("model", name, str(source.origin), says=f"found by the model source {source.spec.name}")
    for name, backend in registry.attention_backends.items():
        yield Option("attention", name, str(backend.origin), says="the backend of that name")
    for name, drafter in registry.drafters.items():
        yield Option("speculation", name, str(drafter.origin), says="the drafter of that name")


def as_text(options: Sequence[Option], groups: Sequence[str], problems: Sequence[str]) -> str:
    """A table for each group."""
    lines = list[str]()
    for group in groups:
        rows = [option for option in options if option.group == group]
        if not rows:
            continue
        lines += [*([""] if lines else []), "recipes: nanoengine run NAME" if group == RECIPES else f"{group}="]
        providers = [row.provider.partition(" (plugin")[0] for row in rows]
        width, wide = max(len(row.name) for row in rows), max(map(len, providers))
        for row, provider in zip(rows, providers, strict=True):
            said = "CLASH" if row.clash else row.says
            lines.append(f"  {row.name:<{width}}  {provider:<{wide}}  {said}".rstrip())
    if problems:
        lines += ["", "problems:", *(f"  {problem}" for problem in problems)]
    return "\n".join(lines)
