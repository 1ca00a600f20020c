"""`EnginePlan`: everything a worker process needs to build the engine's device side. Frozen and picklable.

It holds "module:Class" targets, never classes, so that every rank imports the same plugins and just those.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanoengine.core.errors import PluginError
from nanoengine.core.setup.options import EngineOptions
from nanoengine.core.setup.specs import ColumnSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginFile:
    """A plugin given as a file: the module name it is loaded under, and where it lies."""

    module: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """A sampler stage: its name, the target of its class, and the device columns its parameters declare."""

    name: str
    target: str
    columns: Mapping[str, ColumnSpec]


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """The frozen choice of parts.

    Attributes:
        model_path: folder with config.json (and, unless dummy, safetensors).
        hf_config: config.json, read once.
        model: target of the `Model` class. attention: name and target of the backend.
        stages: every registered stage, in application order within its phase.
        options: with every `None` that the choice of parts decides filled in (device, dtype, block_size,
            max_model_len, max_num_batched_tokens).
        plugin_files: modules that must be loaded from a file before a target of theirs can be imported.
    """

    model_path: str
    hf_config: Mapping[str, Any]
    model: str
    attention_name: str
    attention: str
    stages: tuple[StagePlan, ...]
    options: EngineOptions
    plugin_files: tuple[PluginFile, ...] = ()


@dataclass(frozen=True)
class TargetLoader:
    """Imports targets. `local` holds classes handed over in Python that no import could find again."""

    plugin_files: tuple[PluginFile, ...] = ()
    local: Mapping[str, type[Any]] = field(default_factory=dict)

    def load(self, target: str) -> Any:
        """The object behind "package.module:Class"; raises `PluginError` naming target and cause."""
        if target in self.local:
            return self.local[target]
        module_name, _, attribute = target.partition(":")
        try:
            found: Any = self._module(module_name)
            for part in attribute.split("."):
                found = getattr(found, part)
        except (Exception, SystemExit) as error:  # a plugin may call sys.exit() when imported
            raise PluginError(f"cannot load {target!r}: {type(error).__name__}: {error}") from error
        return found

    def _module(self, name: str) -> Any:
        for file in self.plugin_files:
            if file.module == name:
                return load_plugin_file(file)
        return importlib.import_module(name)


def load_plugin_file(file: PluginFile) -> Any:
    """Import a plugin file under its module name, once a process."""
    if file.module in sys.modules:
        return sys.modules[file.module]
    spec = importlib.util.spec_from_file_location(file.module, Path(file.path))
    if spec is None or spec.loader is None:
        raise PluginError(f"{file.path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.module] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[file.module]
        raise
    return module
