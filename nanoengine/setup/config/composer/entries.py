"""One defaults list, parsed: its entries, and where what they choose is put (its package)."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from nanoengine.api.errors import ConfigError
from nanoengine.setup.config.composer.yaml_file import ConfigFile

_PACKAGE = re.compile(r"[\w$-]+(\.[\w$-]+)*")


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of a defaults list.

    Attributes:
        where: "file:line", or the override it came from.
        group: from the root of the search path; relative: as written, which decides the package. "" for plain files
            that lie where the list does.
        options: files to take from the group, in order; none for `null`.
        is_group: it can be overridden; False for plain files and `_self_`.
        package: what stands behind `@`.
    """

    where: str
    group: str
    relative: str
    options: tuple[str, ...]
    is_group: bool = True
    package: str | None = None
    override: bool = False
    optional: bool = False

    @property
    def is_self(self) -> bool:
        return not self.is_group and self.options == ("_self_",)

    def final_package(self, parent: str, header: str | None = None) -> str:
        """Where it goes: `@package`, else the file's header, else the group, below the package of the list's file."""
        package = self.package if self.package is not None else header
        if package is None:
            package = self.relative.replace("/", ".")
        package = package.replace("_group_", "_global_." + self.group.replace("/", "."))
        if package == "_here_":
            package = ""
        joined = ".".join(part for part in (parent, package) if part)
        before, glob, after = joined.rpartition("_global_")
        return after.removeprefix(".") if glob else before + after

    def key(self, parent: str) -> str:
        """What overrides call it: the group, with its package where that is not the group's own."""
        package = self.final_package(parent)
        return self.group if package == self.group.replace("/", ".") else f"{self.group}@{package or '_global_'}"

    def choosing(self, options: tuple[str, ...], where: str) -> Entry:
        return replace(self, options=options, where=where)


def parse_entries(file: ConfigFile, folder: str) -> list[Entry]:
    """The defaults list of a file that lies in `folder` of the search path; `_self_` stands last where it is missing.

    Raises `ConfigError` naming file, line and entry.
    """
    raw = file.defaults
    if raw is None:
        raw = []
    if not isinstance(raw, list):
        raise ConfigError(f"{file.origin(('defaults',))}: defaults must be a list, such as '- sampler: greedy'")
    entries = [_parse(item, file.origin(("defaults", index)), folder) for index, item in enumerate(raw)]
    selves = [entry for entry in entries if entry.is_self]
    if len(selves) > 1:
        raise ConfigError(f"{selves[1].where}: _self_ stands twice in the defaults list")
    overriding = False
    for entry in entries:
        if overriding and not entry.override and not entry.is_self:
            raise ConfigError(f"{entry.where}: override entries must stand at the end of the defaults list")
        overriding = overriding or entry.override
    return entries if selves else [*entries, Entry(file.label, "", "", ("_self_",), is_group=False)]


def _parse(item: Any, where: str, folder: str) -> Entry:
    if isinstance(item, str) and "${" not in item:
        name, package = split_package(item, where)
        if name == "_self_":
            return Entry(where, "", "", ("_self_",), is_group=False)
        group, _, option = name.lstrip("/").rpartition("/")
        return Entry(where, _absolute(name, group, folder), group, (option,), is_group=False, package=package)
    if isinstance(item, dict) and len(item) == 1:
        [(key, value)] = item.items()
        *words, group = str(key).split()
        if len(words) > 1 or not set(words) <= {"override", "optional"}:
            raise ConfigError(f"{where}: {key!r}: only one of 'override' and 'optional' may stand before a group")
        group, package = split_package(group, where)
        return Entry(
            where,
            _absolute(group, group.lstrip("/"), folder),
            group.lstrip("/"),
            parse_options(value, where),
            package=package,
            override="override" in words,
            optional="optional" in words,
        )
    if isinstance(item, str):
        raise ConfigError(f"{where}: {item!r}: interpolation inside a defaults list is not supported")
    raise ConfigError(
        f"{where}: {item!r} is no entry of a defaults list; write '- group: option', '- file' or '- _self_'"
    )


def _absolute(written: str, relative: str, folder: str) -> str:
    return relative if written.startswith("/") else "/".join(part for part in (folder, relative) if part)


def parse_options(value: Any, where: str) -> tuple[str, ...]:
    """The option or options of a group; `null` is none. Raises `ConfigError`."""
    if value is None:
        return ()
    items = value if isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, bool | float) or not isinstance(item, str | int) or item == "":
            raise ConfigError(
                f"{where}: {item!r} is no name of an option; put a name that YAML reads otherwise in quotes"
            )
        if "${" in str(item):
            raise ConfigError(f"{where}: {item!r}: interpolation inside a defaults list is not supported")
    return tuple(map(str, items))


def split_package(text: str, where: str) -> tuple[str, str | None]:
    """ "group@package" -> (group, package or None); raises `ConfigError` on a package that is none."""
    name, at, package = text.partition("@")
    return name, check_package(package, where) if at else None


def check_package(package: str, where: str) -> str:
    if ":" in package:
        raise ConfigError(
            f"{where}: renaming a package (@{package}) is not supported; delete the one and add the other"
        )
    if "_name_" in package or not _PACKAGE.fullmatch(package):
        raise ConfigError(f"{where}: {package!r} is no package; write dotted keys, _global_, _here_ or _group_")
    return package
