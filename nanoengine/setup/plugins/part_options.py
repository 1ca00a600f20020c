"""Options of a part that is chosen by name: they are checked against the part's own dataclass of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nanoengine.api.errors import ConfigError, ParamsError
from nanoengine.api.plugin_calls import plugin_call
from nanoengine.params.field_types import conform


@dataclass(frozen=True, slots=True)
class PartOptions:
    """Values of the section `name`, as "speculation". `origin(key)` is where a key was given, as the beginning of a
    message: "file:line: ".

    Methods raise `ConfigError` that names the key.
    """

    name: str
    origin: Callable[[str], str]

    def conformed(self, key: str, value: Any, annotation: Any) -> Any:
        """`value` in the type of the annotation."""
        try:
            return conform(f"{self.name}.{key}", value, annotation)
        except ParamsError as error:
            raise ConfigError(f"{self.origin(key)}{error}") from error

    def made(self, cls: type[Any], values: Mapping[str, Any]) -> Any:
        """An instance of the engine's own dataclass."""
        try:
            return cls(**values)
        except ParamsError as error:  # out of range; it begins with the key's name
            raise ConfigError(f"{self.origin(str(error).split(maxsplit=1)[0])}{self.name}.{error}") from error

    def made_of_plugin(self, part: str, cls: type[Any], values: Mapping[str, Any]) -> None:
        """Checks that the plugin's dataclass takes the values. Raises `PluginError` too, where its code is wrong.
        part: its kind and name, for messages."""
        with plugin_call(f"{part}: {cls.__qualname__} failed", cls):
            self.made(cls, values)


def target_of(cls: type[Any]) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"
