"""One defaults list, parsed into its entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nanoengine.api.errors import ConfigError, shown
from nanoengine.setup.config.composer.yaml_file import ConfigFile


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of a defaults list.

    Attributes:
        where: "file:line", or the override it came from.
        group: folder of the files, from the root of the search path, and the section that they fill; "" is the root.
        options: files to take from it, in order; none for `null`.
        is_group: it can be overridden; False for plain files and `_self_`.
    """

    where: str
    group: str
    options: tuple[str, ...]
    is_group: bool = True

    @property
    def is_self(self) -> bool:
        return not self.is_group and self.options == ("_self_",)


def parse_entries(file: ConfigFile, folder: str) -> list[Entry]:
    """The defaults list of a file that lies in `folder` of the search path; `_self_` stands last where it is missing.

    Raises `ConfigError` naming file, line and entry.
    """
    raw = [] if file.defaults is None else file.defaults
    if not isinstance(raw, list):
        raise ConfigError(f"{file.origin(('defaults',))}: defaults must be a list, such as '- sampler: greedy'")
    entries = [_parse(item, file.origin(("defaults", index)), folder) for index, item in enumerate(raw)]
    selves = [entry for entry in entries if entry.is_self]
    if len(selves) > 1:
        raise ConfigError(f"{selves[1].where}: _self_ stands twice in the defaults list")
    return entries if selves else [*entries, Entry(file.label, "", ("_self_",), is_group=False)]


def _parse(item: Any, where: str, folder: str) -> Entry:
    if isinstance(item, str):
        group, _, option = _plain(item, where).rpartition("/")
        return Entry(where, "" if item == "_self_" else _below(folder, group), (option,), is_group=False)
    if isinstance(item, dict) and len(item) == 1:
        [(key, value)] = item.items()
        return Entry(where, _below(folder, _plain(str(key), where)), parse_options(value, where))
    raise ConfigError(
        f"{where}: {shown(item)} is no entry of a defaults list; write '- group: option', '- file' or '- _self_'"
    )


def _plain(name: str, where: str) -> str:
    """`name`, of a group or file. Raises `ConfigError` on what Hydra has beside plain names."""
    if "${" in name:
        raise ConfigError(f"{where}: {shown(name)}: interpolation inside a defaults list is not supported")
    check_group(name, where)
    word, blank, _ = name.partition(" ")
    if blank and word in ("override", "optional"):
        raise ConfigError(
            f"{where}: '{word}' before a group is not supported; choose the option here, or on the command line"
        )
    if name.startswith("/"):
        raise ConfigError(f"{where}: {shown(name)}: names from the root are not supported in a defaults list")
    return name


def check_group(name: str, where: str) -> None:
    """Raises `ConfigError` on Hydra's `group@package`."""
    group, at, _ = name.partition("@")
    if at:
        raise ConfigError(
            f"{where}: {shown(name)}: packages (@) are not supported; the options of {group!r} fill the section "
            f"{group.replace('/', '.')!r}"
        )


def _below(folder: str, name: str) -> str:
    return "/".join(part for part in (folder, name) if part)


def parse_options(value: Any, where: str) -> tuple[str, ...]:
    """The option or options of a group; `null` is none. Raises `ConfigError`."""
    if value is None:
        return ()
    items = value if isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, bool | float) or not isinstance(item, str | int) or item == "":
            raise ConfigError(
                f"{where}: {shown(item)} is no name of an option; put a name that YAML reads otherwise in quotes"
            )
        if "${" in str(item):
            raise ConfigError(f"{where}: {shown(item)}: interpolation inside a defaults list is not supported")
    return tuple(map(str, items))
