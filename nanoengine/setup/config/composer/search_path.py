"""Where config files are looked for: the folder of the user's file first, then the root of every provider."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nanoengine.api.errors import ConfigError, PluginError, described, is_failure
from nanoengine.setup.config.composer.yaml_file import ConfigFile, not_a_file, read_yaml


@dataclass(frozen=True, slots=True)
class Root:
    """A folder of config groups. `name` is what messages show, `provider` who put it there."""

    folder: Path
    name: str
    provider: str


def package_root(root: str, provider: str) -> list[Root]:
    """The folders of "pkg://package.module". Raises `PluginError` naming the provider if there are none."""
    scheme, _, package = root.partition("://")
    if scheme != "pkg" or not package:
        raise PluginError(
            f"{provider} registered the config root {root!r}; it must be of the form pkg://package.module"
        )
    try:
        spec = importlib.util.find_spec(package)
    except BaseException as error:  # the packages around it are imported
        if not is_failure(error):
            raise
        raise PluginError(f"{provider}: config root {root!r} cannot be imported: {described(error)}") from error
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise PluginError(f"{provider}: config root {root!r} is no importable package folder")
    return [Root(Path(folder), root, provider) for folder in folders]


@dataclass
class SearchPath:
    """Finds the files of groups, `GROUP/OPTION.yaml`, and those at the root, `NAME.yaml` (group "").

    A file in the user's own folder shadows one of that name in a root, as Hydra's users expect; two roots that have it
    are an error. `failure_hint`: what to add where something is not found: the providers that failed.
    """

    own: Root | None
    roots: Sequence[Root]
    failure_hint: str = ""
    _read: dict[Path, ConfigFile] = field(default_factory=dict)

    def find(self, group: str, option: str, where: str = "") -> ConfigFile | None:
        """The file, read; None where it is not there.

        Raises `ConfigError` where two roots have it, or what is there is no file. `where`: who asks for it.
        """
        if "/" in option:
            return None
        name = f"{group}/{option}" if group else option
        asked = f"{where}: " if where else ""
        if self.own is not None and (path := _file(self.own, name, asked)):
            return self.read(path, str(self.own.folder / f"{name}.yaml"))
        found = {path.resolve(): root for root in reversed(self.roots) if (path := _file(root, name, asked))}
        if len(found) > 1:
            who = " and ".join(f"{root.provider} ({path})" for path, root in reversed(found.items()))
            raise ConfigError(f"{asked}config file {name!r} is provided by {who}; remove or rename one of them")
        return next((self.read(path, f"{root.name}/{name}.yaml") for path, root in found.items()), None)

    def read(self, path: Path, label: str) -> ConfigFile:
        """A file, read once."""
        if path not in self._read:
            self._read[path] = read_yaml(path, label)
        return self._read[path]

    def options(self, group: str) -> list[str]:
        """Options of a group ("" for the files at the roots)."""
        return sorted({file.stem for file in self._files(group)})

    def is_group(self, group: str) -> bool:
        """Whether it is a folder with a config in it, on any root."""
        return next(self._files(group), None) is not None

    def groups(self) -> list[str]:
        """Every group, for messages."""
        return sorted({file.parent.name for root in self._all() for file in root.folder.glob("*/*.yaml")})

    def _files(self, group: str) -> Iterator[Path]:
        for folder in (root.folder / group for root in self._all()):
            if folder.is_dir():
                yield from (file for file in folder.glob("*.yaml") if file.is_file())

    def _all(self) -> list[Root]:
        return [self.own, *self.roots] if self.own else list(self.roots)


def _file(root: Root, name: str, asked: str) -> Path | None:
    path = root.folder / f"{name}.yaml"
    try:
        path.lstat()
    except (OSError, ValueError):  # nothing is there; a name that no file can have
        return None
    if not path.is_file():
        raise ConfigError(f"{asked}{path} {not_a_file(path)}")
    return path
