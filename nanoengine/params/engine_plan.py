"""`EnginePlan`: the parts that were chosen for an engine. Frozen and picklable; every rank imports its targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanoengine.api.processor_params import ColumnSpec
from nanoengine.api.specs import PluginFile
from nanoengine.params.engine_options import EngineOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorPlan:
    """A logits processor.

    Attributes:
        name: name in its spec. target: target of its class. columns: the device columns that its parameters declare.
        origin: the plugin that registered it, for messages; "" if unknown.
    """

    name: str
    target: str
    columns: Mapping[str, ColumnSpec]
    origin: str = ""

    @property
    def where(self) -> str:
        """Name and origin, for messages: "logits processor 'x' (Class of plugin file /some/x.py)"."""
        known = f"{self.target.partition(':')[2]} of {self.origin}" if self.origin else self.target
        return f"logits processor {self.name!r} ({known})"


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationPlan:
    """A drafter, and how far it drafts.

    Attributes:
        method: name in its spec. target: target of its class. params_target: of the dataclass of its parameters.
        params: the parameters that were given, checked. device: it is a `DeviceDrafter`.
        tokens, min_acceptance, step_tokens: as in `SpeculationOptions`.
        origin: the plugin that registered it, for messages.
    """

    method: str
    target: str
    params_target: str
    params: Mapping[str, Any]
    device: bool
    tokens: int
    min_acceptance: float
    step_tokens: int | None
    origin: str

    @property
    def where(self) -> str:
        """Name and origin, for messages: "drafter 'x' (Class of plugin file /some/x.py)"."""
        return f"drafter {self.method!r} ({self.target.partition(':')[2]} of {self.origin})"


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyPlan:
    """A scheduling policy.

    Attributes:
        name: name in its spec. target: target of its class. params_target: of the dataclass of its parameters.
        params: the parameters that were given, checked. origin: the plugin that registered it, for messages.
    """

    name: str
    target: str
    params_target: str
    params: Mapping[str, Any]
    origin: str

    @property
    def where(self) -> str:
        """Name and origin, for messages: "scheduling policy 'x' (Class of plugin file /some/x.py)"."""
        return f"scheduling policy {self.name!r} ({self.target.partition(':')[2]} of {self.origin})"


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationPlan:
    """How weights are stored in fewer bits.

    Attributes:
        name: name in its spec. target: target of its class. origin: the plugin that registered it, for messages.
        config: `quantization_config` of config.json; {}: plain weights are quantised while they are loaded.
    """

    name: str
    target: str
    config: Mapping[str, Any]
    origin: str

    @property
    def where(self) -> str:
        """Name and origin, for messages: "quantisation 'x' (Class of plugin file /some/x.py)"."""
        return f"quantisation {self.name!r} ({self.target.partition(':')[2]} of {self.origin})"


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan:
    """The parts that were chosen for an engine, with its options.

    Attributes:
        model_path: folder with config.json (and, unless dummy, safetensors).
        hf_config: config.json, read once.
        model: target of the `Model` class. attention: name and target of the backend.
        processors: every registered processor, in the order in which they are applied in a phase.
        options: engine options. Those that the user left open are set (device, dtype, block_size, max_model_len,
            max_num_batched_tokens).
        policy: the scheduling policy.
        speculation: the drafter; None: speculation is off.
        quantization: how weights are stored in fewer bits; None: they are plain.
        plugin_files: files that must be loaded before targets in them can be imported.
    """

    model_path: str
    hf_config: Mapping[str, Any]
    model: str
    attention_name: str
    attention: str
    processors: tuple[ProcessorPlan, ...]
    options: EngineOptions
    policy: PolicyPlan
    speculation: SpeculationPlan | None = None
    quantization: QuantizationPlan | None = None
    plugin_files: tuple[PluginFile, ...] = ()
