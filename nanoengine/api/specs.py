"""What a plugin registers: frozen typed specs. Torch-free, so that listing plugins costs nothing.

A spec names its implementation by *target*, "package.module:Class", which is imported only when it is chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any, ClassVar, Protocol

API_VERSION = 1
"""The version of the plugin interface this engine speaks; every spec says which one it was written for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model implementation, chosen by the `architectures` of a checkpoint's config.json.

    Attributes:
        name: what the user sees and may select, e.g. "acme".
        architectures: the HF architecture names it serves, e.g. ("AcmeForCausalLM",).
        target: "package.module:Class" of a `nanoengine.api.Model`.
        api: the interface version the plugin was written for.
    """

    name: str
    architectures: tuple[str, ...]
    target: str
    api: int


class StandardOp(StrEnum):
    """Operations that the core may fuse, whichever plugin provides the column that parametrises them.

    TEMPERATURE: logits / value; 0 means greedy. TOP_K: keep the k highest; 0 means all. TOP_P: nucleus; 1 means all.
    MIN_P: keep p >= value * max p; 0 means all.
    """

    TEMPERATURE = "temperature"
    TOP_K = "top_k"
    TOP_P = "top_p"
    MIN_P = "min_p"


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnSpec:
    """One column of per-slot values that a processor reads on the device.

    Attributes:
        dtype: "float32", "int32" or "bool".
        ragged: several values a slot; the device table is then [slots, width], and grows in width when needed.
        default: the inert value, standing in slots that do not use the processor and behind the end of ragged rows.
        op: the standard operation this column parametrises, if it is one.
    """

    dtype: str
    ragged: bool = False
    default: float | int | bool = 0
    op: StandardOp | None = None


class ParamsContext(Protocol):
    """What parameters may be checked against when a request is submitted."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_model_len(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` without special tokens; raises `TokenizerMissing` where there is no tokenizer."""
        ...


class ProcessorParams:
    """Base of a processor's parameter dataclass: `@dataclass(frozen=True)`, each field with its inert default.

    The fields become legal keys of `SamplingParams`. Types are checked by the engine against the annotations;
    ranges are the dataclass's own, in `__post_init__`, by `ParamsError`.

    Class attributes:
        columns: the device columns the processor reads, by name.
        host_tokens: True where `host_columns` must see every token before the next may be drawn; such a request is
            not run ahead.
    """

    columns: ClassVar[Mapping[str, ColumnSpec]] = {}
    host_tokens: ClassVar[bool] = False

    def active(self) -> bool:
        """Whether a request with these values wants the processor at all. Default: any field off its default."""
        return self != type(self)()

    def pack(self, ctx: ParamsContext) -> Mapping[str, Any]:
        """Column values for one slot: a scalar, or a sequence for a ragged column. Default: fields of that name.

        Raises `ParamsError` for what only the context can tell (a token id outside the vocabulary).
        """
        return {name: getattr(self, name) for name in self.columns}

    def host_columns(self, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int]) -> Mapping[str, Any]:
        """Only with `host_tokens`: columns computed afresh before each draw, from all tokens so far.

        An exception raised here fails that request alone.
        """
        return {}


class Phase(IntEnum):
    """When a processor runs. Within a phase: registration order, truncations top-k, top-p, min-p first."""

    MASK = 0
    BIAS = 1
    PENALTY = 2
    TEMPERATURE = 3
    TRUNCATE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerSpec:
    """A logits processor.

    Attributes:
        name: what the user sees, e.g. "top_k".
        params: its `ProcessorParams` dataclass, from a module that imports no torch.
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
        preference: `auto` takes the supported backend with the highest one; ties go by name.
        requires: importable modules it needs; `auto` passes over it, with the reason, where one is missing.
        install: what to type when a required module is missing.
    """

    name: str
    target: str
    api: int
    preference: int = 0
    requires: tuple[str, ...] = ()
    install: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSourceSpec:
    """A place models come from.

    Attributes:
        name: what the user sees, e.g. "folder".
        target: "package.module:Class" of a `nanoengine.api.ModelSource`.
        api: the interface version the plugin was written for.
        order: sources are asked in ascending order.
        models: names it provides by itself, e.g. ("acme-1b",), for listings and did-you-mean.
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
        name: the words behind `nanoengine`: "tune", or "bench tune" for a command in the group `bench`.
        target: "package.module:attribute" of a function with typer's annotations, a typer app, or a click command or
            group. Imported when the command is called.
        help: one line for listings, which do not import the target.
        api: the interface version the plugin was written for.
    """

    name: str
    target: str
    help: str
    api: int


Spec = ModelSpec | SamplerSpec | AttentionSpec | ModelSourceSpec | CommandSpec


PROJECT = "nanoengine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a plugin came from.

    Attributes:
        plugin: name of its entry point, of its file, or the name it was handed over under.
        distribution, version: of the installed package; None for a file or an object.
        module: its entry point's value, or the module a file was loaded under. file: path of a plugin file.
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
        return f"object {self.plugin!r} handed over in Python"

    @property
    def fix(self) -> str:
        """What removes this provider; "" for nanoengine itself, where the other one must give way."""
        if self.distribution == PROJECT:
            return ""
        if self.file is not None:
            return f"leave out --plugin {self.file}"
        if self.distribution is not None:
            return f"pip uninstall {self.distribution}"
        return f"do not hand over {self.plugin!r}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginFile:
    """A plugin given as a file.

    Attributes:
        module: the name it is loaded under. path: where it lies.
        digest: SHA-256 of its content, so that every process loads the very same, or says that it changed.
    """

    module: str
    path: str
    digest: str
