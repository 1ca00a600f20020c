"""Imports the targets ("module:Class") of an engine's parts, and plugin files. Every rank imports the same code."""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

from nanoengine.api.errors import PluginError, described, is_failure, nearest
from nanoengine.api.specs import PluginFile


@dataclass(frozen=True)
class TargetLoader:
    """Imports targets. `local` has classes passed in Python that cannot be imported by name."""

    plugin_files: tuple[PluginFile, ...] = ()
    local: Mapping[str, type[Any]] = field(default_factory=dict)

    def load(self, target: str) -> Any:
        """Imports the object of "package.module:Class". Raises `PluginError` that names the target and the cause."""
        if target in self.local:
            return self.local[target]
        module_name, _, attribute = target.partition(":")
        try:
            found: Any = self._module(module_name)
        except BaseException as error:  # a plugin may call sys.exit() when imported
            if not is_failure(error):
                raise
            from nanoengine.api.plugin_calls import place_and_fix

            text = f"cannot load {self.describe(target)}: {described(error)}"
            raise PluginError(text + place_and_fix(error, module_name, text)) from error
        for part in attribute.split("."):
            try:
                found = getattr(found, part)
            except BaseException as error:
                if not is_failure(error):
                    raise
                here = vars(found) if hasattr(found, "__dict__") else {}
                own = [n for n, c in here.items() if isinstance(c, type) and c.__module__ == module_name]
                raise PluginError(
                    f"cannot load {self.describe(target)}: {type(error).__name__}: it has no {part!r}; "
                    f"{nearest(part, own)}"
                ) from error
        return found

    def describe(self, target: str) -> str:
        """The target for messages: with the path of a plugin file instead of the module name that is made for it."""
        module_name, _, attribute = target.partition(":")
        file = self._file(module_name)
        return repr(target) if file is None else f"{attribute!r} of plugin file {file.path}"

    def _file(self, module: str) -> PluginFile | None:
        return next((file for file in self.plugin_files if file.module == module), None)

    def _module(self, name: str) -> Any:
        file = self._file(name)
        return importlib.import_module(name) if file is None else load_plugin_file(file)


class _ExactLoader(importlib.machinery.SourceFileLoader):
    """Loads a plugin file if it has the digest. Cached bytecode is not used: Python checks it by time and size only."""

    def __init__(self, file: PluginFile) -> None:
        super().__init__(file.module, file.path)
        self._digest = file.digest

    def get_code(self, fullname: str) -> CodeType:
        source = self.get_data(self.path)
        if hashlib.sha256(source).hexdigest() != self._digest:
            raise PluginError(f"plugin file {self.path} has changed since the engine read it; start the engine again")
        code: CodeType = self.source_to_code(source, self.path)
        return code


def load_plugin_file(file: PluginFile) -> Any:
    """Imports a plugin file under its module name, once per process.

    Raises what its code raises, `OSError` if the file does not exist any more, `PluginError` if its content has changed
    (`file.digest`).
    """
    if file.module in sys.modules:
        return sys.modules[file.module]
    spec = importlib.util.spec_from_file_location(file.module, file.path, loader=_ExactLoader(file))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.module] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[file.module]
        raise
    return module
