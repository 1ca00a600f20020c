"""The choice of parts that an engine is started with: every rank imports its targets from it. Frozen and picklable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanoengine.api.specs import ColumnSpec, PluginFile
from nanoengine.params.engine_options import EngineOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorPlan:
    """A logits processor.

    Attributes:
        name: of its spec. target: of its class. columns: the device columns its parameters declare.
        origin: who registered it, for errors; "" if unknown.
    """

    name: str
    target: str
    columns: Mapping[str, ColumnSpec]
    origin: str = ""

    @property
    def where(self) -> str:
        """Name and origin: "logits processor 'x' (Class of plugin file /some/x.py)"."""
        known = f"{self.target.partition(':')[2]} of {self.origin}" if self.origin else self.target
        return f"logits processor {self.name!r} ({known})"


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """The frozen choice of parts.

    Attributes:
        model_path: folder with config.json (and, unless dummy, safetensors).
        hf_config: config.json, read once.
        model: target of the `Model` class. attention: name and target of the backend.
        processors: every registered processor, in application order within its phase.
        options: with every `None` that the choice of parts decides filled in (device, dtype, block_size,
            max_model_len, max_num_batched_tokens).
        plugin_files: modules that must be loaded from a file before a target of theirs can be imported.
    """

    model_path: str
    hf_config: Mapping[str, Any]
    model: str
    attention_name: str
    attention: str
    processors: tuple[ProcessorPlan, ...]
    options: EngineOptions
    plugin_files: tuple[PluginFile, ...] = ()
