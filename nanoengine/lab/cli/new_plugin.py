"""`nanoengine plugins new`: writes a package with one working part and its tests."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Any, cast

import typer
import yaml

from nanoengine import __version__
from nanoengine.api.errors import ConfigError, nearest
from nanoengine.cli.common import DebugOption, answer, user_errors
from nanoengine.params.sampling_fields import CORE_TYPES, PROCESSOR_MEMBERS
from nanoengine.setup.plugins.discover import Registered, Registry, discover

_NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
_PREFIX = "nanoengine-"
_LONGEST = 64  # most characters of a name: file systems allow about 200 for the names that are made of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What a package of one kind has.

    Attributes:
        summary: of what it is. classes: ends of the names of its classes.
        registry: attribute of `Registry` with the names that are taken. reserved: names that no part may have.
        configs: it has config groups. steps: commands to try it with, as templates.
    """

    summary: str
    classes: Sequence[str]
    registry: str
    reserved: Sequence[str] = ()
    configs: bool = False
    steps: Sequence[str] = ("nanoengine run run.yaml",)


_AUTO = ("auto",)
_PARTS: Mapping[str, Part] = {
    "model": Part(
        summary="A model",
        classes=("Model", "Config", "Layer", "Attention"),
        registry="models",
        reserved=_AUTO,
        configs=True,
        steps=("python -m {module}.tiny tiny", "nanoengine run run.yaml"),
    ),
    "sampler": Part(summary="A logits processor", classes=("Processor", "Params"), registry="samplers", configs=True),
    "attention": Part(
        summary="An attention backend",
        classes=("Backend",),
        registry="attention_backends",
        reserved=_AUTO,
        configs=True,
    ),
    "tool-parser": Part(
        summary="A tool parser",
        classes=("Parser",),
        registry="tool_parsers",
        reserved=_AUTO,
        steps=("nanoengine serve quickstart server.tool_parser={name}",),
    ),
    "policy": Part(summary="A scheduling policy", classes=("Policy", "Params"), registry="policies"),
    "drafter": Part(
        summary="A drafter", classes=("Drafter", "State", "Params"), registry="drafters", reserved=("none",)
    ),
    "grammar": Part(
        summary="A grammar backend", classes=("Backend", "Grammar", "Matcher"), registry="grammars", reserved=_AUTO
    ),
    "command": Part(summary="A command", classes=(), registry="commands", steps=("nanoengine {name} --help",)),
}
_METAVAR = "|".join(_PARTS)


@dataclass(frozen=True, slots=True)
class Names:
    """The names that are made of the name of a plugin ("soft-cap").

    Attributes:
        word: an identifier, "soft_cap". package: name of the distribution, "nanoengine-soft-cap".
        module: "nanoengine_soft_cap". cls: beginning of the names of classes, "SoftCap".
    """

    name: str
    word: str
    package: str
    module: str
    cls: str

    @classmethod
    def of(cls, name: str) -> Names:
        """The names for `name`. Raises `ConfigError` if it cannot be the name of a package and an identifier."""
        short = name.removeprefix(_PREFIX)
        word = short.replace("-", "_")
        if not _NAME.fullmatch(short):
            raise ConfigError(
                f"{name!r} cannot be the name of a plugin: use lower-case letters, digits, and single - or _ between "
                f"them, beginning with a letter; for example {_example(short)}"
            )
        unfit = None
        if keyword.iskeyword(word):
            unfit = f"{word!r} is a keyword of Python"
        elif len(short) > _LONGEST:
            unfit = f"it has {len(short)} characters, but at most {_LONGEST} are allowed"
        elif yaml.safe_load(short) != short:
            unfit = f"YAML reads {short!r} as {yaml.safe_load(short)!r}"
        if unfit:
            raise ConfigError(f"{name!r} cannot be the name of a plugin: {unfit}")
        return cls(
            name=short,
            word=word,
            package=_PREFIX + short.replace("_", "-"),
            module=f"nanoengine_{word}",
            cls="".join(part.capitalize() for part in word.split("_")),
        )


def _example(name: str) -> str:
    """A similar name that is valid."""
    words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower())
    return repr("-".join(words).lstrip("0123456789-") or "soft-cap")


def new(
    kind: Annotated[
        str,
        typer.Argument(metavar=_METAVAR, help="What the package provides.", show_default=False),
    ],
    name: Annotated[str, typer.Argument(help="Its name, for example soft-cap.", show_default=False)],
    into: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to put the package's folder.")] = Path("."),
    debug: DebugOption = False,
) -> None:
    """Write a plugin package to start from. It installs, runs and passes its tests."""
    with user_errors(debug):
        _check_kind(kind, name)
        folder = write(kind, name, into)
        answer(f"wrote {folder}\n\n{_next_steps(_PARTS[kind], Names.of(name), folder)}")


def _check_kind(kind: str, name: str) -> None:
    """Raises `ConfigError` if the kind is unknown, or if kind and name are swapped."""
    if kind in _PARTS:
        return
    if name in _PARTS:
        raise ConfigError(f"the kind comes first: nanoengine plugins new {name} {kind}")
    raise ConfigError(f"there is no kind {kind!r} of packages; {nearest(kind, _PARTS)}")


def _next_steps(part: Part, names: Names, folder: Path) -> str:
    steps = [f"cd {folder}", "pip install -e '.[test]'", "pytest", *_steps(part, names)]
    return "\n".join(["next:", *(f"  {step}" for step in steps)])


def _steps(part: Part, names: Names) -> list[str]:
    return [step.format(name=names.name, module=names.module) for step in part.steps]


def write(kind: str, name: str, into: Path) -> Path:
    """Writes the package and returns its folder. Raises `ConfigError` if the name is wrong or the folder exists."""
    names = Names.of(name)
    _check_free(kind, names, discover())
    folder = into / names.package
    if folder.exists():
        raise ConfigError(f"{folder} exists already; remove it, choose another name, or give --into")
    rendered = dict(_render(kind, names))
    try:
        for path, text in rendered.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, "utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error}") from error
    return folder


def _check_free(kind: str, names: Names, registry: Registry) -> None:
    """Raises `ConfigError` if another package already has a name that this one would register or define."""
    taken: dict[str, str]
    part = _PARTS[kind]
    if kind == "sampler":
        params = [(found, each.name) for found in registry.samplers.values() for each in _fields(found.spec.params)]
        taken = {field: f"a parameter of {found.origin}" for found, field in params}
        taken |= {found.spec.name: f"a logits processor of {found.origin}" for found in registry.samplers.values()}
        taken |= dict.fromkeys(CORE_TYPES, "a field of SamplingParams")
        taken |= dict.fromkeys(PROCESSOR_MEMBERS, "a member of ProcessorParams")
        taken |= dict.fromkeys(("float", "self"), "a word in the generated code")
        wanted = names.word
    else:
        registered: Mapping[str, Registered[Any]] = getattr(registry, part.registry)
        taken = {name: f"registered by {found.origin}" for name, found in registered.items()}
        taken |= dict.fromkeys(part.reserved, "a reserved word")
        wanted = names.name
    if wanted in taken:
        raise ConfigError(f"{wanted!r} is {taken[wanted]} already; choose another name")
    from nanoengine import api

    for suffix in part.classes:
        if names.cls + suffix in api.__all__:
            raise ConfigError(f"{names.name!r} would make a class {names.cls + suffix}, which nanoengine.api has too; "
                              "choose another name")  # fmt: skip


def _fields(params: type[Any]) -> tuple[Any, ...]:
    return fields(cast(Any, params))


def _render(kind: str, names: Names) -> Iterator[tuple[str, str]]:
    """(path in the package, text) of every file."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    part = _PARTS[kind]
    values: dict[str, Any] = {field.name: getattr(names, field.name) for field in fields(names)}
    values |= {"kind": kind, "summary": f"{part.summary}: {names.name}", "nanoengine": __version__}
    values |= {"configs": part.configs, "steps": _steps(part, names)}
    templates = files("nanoengine.lab.cli") / "plugin_templates"
    for folder in ("common", kind):
        for path, template in _templates(templates / folder):
            if not part.configs and path.startswith("MODULE/configs/"):
                continue
            path = path.replace("MODULE", names.module).replace("NAME", names.name)
            yield path, environment.from_string(template.read_text("utf-8")).render(values)


def _templates(folder: Traversable, inside: str = "") -> Iterator[tuple[str, Traversable]]:
    for found in sorted(folder.iterdir(), key=lambda each: each.name):
        if found.is_dir():
            yield from _templates(found, f"{inside}{found.name}/")
        elif found.name.endswith(".jinja"):
            name = found.name.removesuffix(".jinja")
            yield inside + (".gitignore" if name == "gitignore" else name), found
