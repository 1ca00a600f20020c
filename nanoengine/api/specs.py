"""What a plugin registers: frozen typed specs. This module imports no torch, so that plugins are listed quickly.

A spec names its implementation by a *target*, "package.module:Class", which is imported only when it is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nanoengine.api.processor_params import ProcessorParams

API_VERSION = 1
"""The version of the plugin interface that this engine supports. Every spec gives the version it was written for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model implementation, chosen by the `architectures` of a checkpoint's config.json.

    Attributes:
        name: what the user sees and may select, e.g. "acme".
        architectures: the Hugging Face architecture names that it supports, e.g. ("AcmeForCausalLM",).
        target: "package.module:Class" of a `nanoengine.api.Model`.
        api: the interface version the plugin was written for.
    """

    name: str
    architectures: tuple[str, ...]
    target: str
    api: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSpec:
    """A logits processor.

    Attributes:
        name: what the user sees, e.g. "top_k".
        params: its `ProcessorParams` dataclass, in a module that imports no torch.
        target: "package.module:Class" of a `nanoengine.api.LogitsProcessor`.
        api: the interface version the plugin was written for.
    """

    name: str
    params: type[ProcessorParams]
    target: str
    api: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """An attention backend.

    Attributes:
        name: what `attention=` selects, e.g. "torch".
        target: "package.module:Class" of a `nanoengine.api.AttentionBackend`.
        api: the interface version the plugin was written for.
        preference: `auto` takes the supported backend with the highest preference; if equal, the first by name.
        requires: modules that it imports. If one is missing, `auto` skips the backend and gives the reason.
        install: the command to type if a required module is missing.
    """

    name: str
    target: str
    api: int
    preference: int = 0
    requires: tuple[str, ...] = ()
    install: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSourceSpec:
    """A source of models.

    Attributes:
        name: what the user sees, e.g. "folder".
        target: "package.module:Class" of a `nanoengine.api.ModelSource`.
        api: the interface version the plugin was written for.
        order: sources are asked in ascending order.
        models: names of models that it provides, e.g. ("acme-1b",), for listings and did-you-mean.
    """

    name: str
    target: str
    api: int
    order: int = 100
    models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandSpec:
    """A command of the command line.

    Attributes:
        name: the words after `nanoengine`: "tune", or "bench tune" for a command in the group `bench`.
        target: "package.module:attribute" of a function with typer's annotations, a typer app, or a click command or
            group. Imported when the command is called.
        help: one line for listings, which do not import the target.
        api: the interface version the plugin was written for.
        sections: sections of a configuration that the command reads: key -> "package.module:Class" of a frozen
            dataclass, in a module that imports no torch, whose fields are the section's keys. All have defaults.
        requires: modules that the target imports. If one is missing, a call says so before the target is imported.
        install: the command to type if a required module is missing.
    """

    name: str
    target: str
    help: str
    api: int
    sections: Mapping[str, str] = field(default_factory=dict)
    requires: tuple[str, ...] = ()
    install: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarSpec:
    """A grammar backend.

    Attributes:
        name: what `structured_outputs.backend` selects, e.g. "llguidance".
        target: "package.module:Class" of a `nanoengine.api.GrammarBackend`.
        api: the interface version the plugin was written for.
        preference: `auto` takes the installed backend with the highest preference; if equal, the first by name.
        requires: modules that it imports. If one is missing, `auto` skips the backend and gives the reason.
        install: the command to type if a required module is missing.
    """

    name: str
    target: str
    api: int
    preference: int = 0
    requires: tuple[str, ...] = ()
    install: str = ""


@dataclass(frozen=True, slots=True)
class DrafterParams:
    """Base class of a drafter's parameters: `@dataclass(frozen=True)`, each field with a default.

    The fields become valid keys of `speculation`. The engine checks types against the annotations; the dataclass checks
    ranges in `__post_init__` and raises `ParamsError`.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterSpec:
    """A drafter for speculation.

    Attributes:
        name: what `speculation: {method: ...}` selects, e.g. "ngram".
        target: "package.module:Class" of a `nanoengine.api.HostDrafter`, or, with `device`, of a `DeviceDrafter`.
        api: the interface version the plugin was written for.
        params: its `DrafterParams` dataclass, in a module that imports no torch.
        device: its drafts are made on the device.
    """

    name: str
    target: str
    api: int
    params: type[DrafterParams] = DrafterParams
    device: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolParserSpec:
    """A tool parser.

    Attributes:
        name: what `tool_parser` selects, e.g. "hermes".
        target: "package.module:Class" of a `nanoengine.api.ToolParser`, in a module that imports no torch.
        api: the interface version the plugin was written for.
        preference: `auto` takes the parser with the highest preference of those that match the chat template; if equal,
            the first by name.
    """

    name: str
    target: str
    api: int
    preference: int = 0


@dataclass(frozen=True, slots=True)
class PolicyParams:
    """Base class of a scheduling policy's parameters: `@dataclass(frozen=True)`, each field with a default.

    The fields become valid keys of `engine.policy_options`. The engine checks types against the annotations; the
    dataclass checks ranges in `__post_init__` and raises `ParamsError`.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySpec:
    """A scheduling policy.

    Attributes:
        name: what `engine.scheduling_policy` selects, e.g. "fcfs".
        target: "package.module:Class" of a `nanoengine.api.Policy`.
        help: one line for listings.
        api: the interface version the plugin was written for.
        params: its `PolicyParams` dataclass, in a module that imports no torch.
    """

    name: str
    target: str
    help: str
    api: int
    params: type[PolicyParams] = PolicyParams


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationSpec:
    """A way to store weights in fewer bits.

    Attributes:
        name: what `engine.quantization` selects, e.g. "fp8".
        target: "package.module:Class" of a `nanoengine.api.Quantization`.
        help: one line for listings.
        api: the interface version the plugin was written for.
        formats: values of `quant_method` in config.json's `quantization_config` that it reads.
        online: it can quantise a plain checkpoint while it is loaded.
    """

    name: str
    target: str
    help: str
    api: int
    formats: tuple[str, ...] = ()
    online: bool = False


Spec = (
    ModelSpec
    | SamplerSpec
    | AttentionSpec
    | ModelSourceSpec
    | DrafterSpec
    | GrammarSpec
    | PolicySpec
    | QuantizationSpec
    | ToolParserSpec
    | CommandSpec
)


PROJECT = "nanoengine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a plugin came from.

    Attributes:
        plugin: name of its entry point or file, or the name of an object that was passed in Python.
        distribution, version: those of the installed package; None for a file or an object.
        module: the entry point's value, or the module name of a plugin file. file: path of a plugin file.
    """

    plugin: str
    distribution: str | None = None
    version: str | None = None
    module: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        if self.file is not None:
            return f"plugin file {self.file}"
        if self.distribution is not None:
            return f"{self.distribution} {self.version} (plugin {self.plugin!r})"
        return f"object {self.plugin!r} passed in Python"

    @property
    def fix(self) -> str:
        """How to remove this plugin; "" for nanoengine itself, which cannot be removed."""
        if self.distribution == PROJECT:
            return ""
        if self.file is not None:
            return f"leave out --plugin {self.file}"
        if self.distribution is not None:
            return f"pip uninstall {self.distribution}"
        return f"do not pass {self.plugin!r}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginFile:
    """A plugin given as a file.

    Attributes:
        module: the module name under which it is loaded. path: of the file.
        digest: SHA-256 of its content, so that every process loads the same content or reports that it changed.
    """

    module: str
    path: str
    digest: str
