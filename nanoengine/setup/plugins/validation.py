"""Checks of the values and specs that hooks return, before their targets are imported."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

from nanoengine.api.errors import PluginError, shown
from nanoengine.api.processor_params import ColumnSpec, ProcessorParams, StandardOp
from nanoengine.api.specs import (
    API_VERSION,
    AttentionSpec,
    CommandSpec,
    DrafterParams,
    DrafterSpec,
    GrammarSpec,
    ModelSourceSpec,
    ModelSpec,
    PolicyParams,
    PolicySpec,
    QuantizationSpec,
    SamplerSpec,
    Spec,
    ToolParserSpec,
)
from nanoengine.params.sampling_fields import legal_fields, plugin_fields
from nanoengine.params.speculation import NO_SPECULATION, drafter_types
from nanoengine.setup.plugins.registry import Kind

SPEC_HOOKS: Mapping[str, tuple[Kind, type[Spec]]] = {
    "register_models": ("models", ModelSpec),
    "register_samplers": ("samplers", SamplerSpec),
    "register_attention_backends": ("attention_backends", AttentionSpec),
    "register_model_sources": ("model_sources", ModelSourceSpec),
    "register_drafters": ("drafters", DrafterSpec),
    "register_grammars": ("grammars", GrammarSpec),
    "register_tool_parsers": ("tool_parsers", ToolParserSpec),
    "register_policies": ("policies", PolicySpec),
    "register_quantizations": ("quantizations", QuantizationSpec),
    "register_commands": ("commands", CommandSpec),
}
HOOKS = (*SPEC_HOOKS, "register_configs")
RUN_KEYS = ("model", "sampler", "attention", "engine", "prompts", "output", "chat", "speculation")
"""The keys of a configuration that are nanoengine's own: no command may have a section of such a name."""
NO_QUANTIZATION_NAMES = ("auto", "none")
"""Values of `engine.quantization` that are no names of quantisations."""
COLUMN_DTYPES = ("float32", "int32", "bool")
_OPS: Mapping[StandardOp, tuple[str, tuple[float, ...]]] = {
    StandardOp.TEMPERATURE: (
        "float32",
        (1.0, 0.0),
    ),  # the values of a request decide whether it is greedy, not the default
    StandardOp.TOP_K: ("int32", (0, -1)),
    StandardOp.TOP_P: ("float32", (1.0,)),
    StandardOp.MIN_P: ("float32", (0.0,)),
    StandardOp.BITMASK: ("int32", (-1,)),
}
"""Dtype of a standard operation's column, and the values without effect."""

_MOST_ITEMS = 10_000  # of one hook: more means an endless iterator
_TARGET = re.compile(r"[\w.]+:[\w.]+")
_COMMAND = re.compile(r"\w[\w.-]*( \w[\w.-]*)*")


def checked_list(hook: str, values: Any) -> list[Any]:
    """The hook's return value as a list. Raises `PluginError` if it, or an item of it, has a wrong type."""
    wanted: type[Any] = SPEC_HOOKS[hook][1] if hook in SPEC_HOOKS else str
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise PluginError(f"{hook} returned {shown(values)}, not a list of {wanted.__name__}")
    items = list(islice(values, _MOST_ITEMS + 1))
    if len(items) > _MOST_ITEMS:
        raise PluginError(f"{hook} returned more than {_MOST_ITEMS:,} items; it must return a list")
    for item in items:
        if not isinstance(item, wanted):
            raise PluginError(f"{hook} returned a list with {shown(item)}, which is not a {wanted.__name__}")
    return items


def check_spec(spec: Any) -> None:
    """Raises `PluginError` that names the field of `spec` with an unsupported interface version, type or format."""
    if spec.api != API_VERSION:
        raise PluginError(
            f"it was written for plugin api {shown(spec.api)}, this nanoengine supports api {API_VERSION}; "
            f"{'upgrade nanoengine' if _newer(spec.api) else 'upgrade the plugin'}"
        )
    for field_ in dataclasses.fields(spec):
        expected, valid = _SPEC_CHECKS.get(type(spec), _FIELD_CHECKS)[field_.name]
        value = getattr(spec, field_.name)
        if not valid(value):
            raise PluginError(f"{type(spec).__name__}.{field_.name} must be {expected}, not {shown(value)}")
    if isinstance(spec, SamplerSpec):
        legal_fields([(spec.name, spec.params)])  # rejects fields without default or type, and the engine's own names
        _check_columns(spec.params)
    if isinstance(spec, DrafterSpec):
        drafter_types(spec.name, spec.params)  # likewise
    if isinstance(spec, PolicySpec):
        plugin_fields(f"scheduling policy {spec.name!r}", spec.params)


def _check_columns(params: type[ProcessorParams]) -> None:
    columns: object = params.columns
    if not isinstance(columns, Mapping) or not all(isinstance(name, str) for name in columns):
        raise PluginError(f"{params.__qualname__}.columns must map names to ColumnSpecs, not be {shown(columns)}")
    for name, column in columns.items():
        if not isinstance(column, ColumnSpec) or column.dtype not in COLUMN_DTYPES:
            raise PluginError(
                f"{params.__qualname__}.columns[{name!r}] must be a ColumnSpec of dtype {', '.join(COLUMN_DTYPES)}, "
                f"not {shown(column)}"
            )
        where = f"{params.__qualname__}.columns[{name!r}]"
        if not _holds(column.dtype, column.default):
            raise PluginError(
                f"{where}.default must be a number that fits in {column.dtype}, not {shown(column.default)}"
            )
        if column.width is not None and (column.ragged or not _is_int(column.width) or column.width < 1):
            raise PluginError(
                f"{where}.width must be None, or a positive integer of a column that is not ragged, not "
                f"{shown(column.width)}"
            )
        if column.op is not None and not isinstance(column.op, StandardOp):
            raise PluginError(f"{where}.op must be a nanoengine.api.StandardOp or None, not {shown(column.op)}")
        if column.op is not None:
            _check_op(where, column, column.op)


def _check_op(where: str, column: ColumnSpec, op: StandardOp) -> None:
    """Raises `PluginError` if the column of a standard operation is wrong.

    The core computes these operations for all rows of a batch, so the default must have no effect.
    """
    dtype, inert = _OPS[op]
    if column.ragged or column.width is not None or column.dtype != dtype:
        raise PluginError(
            f"{where}: {op.name} needs a column of dtype {dtype} that is neither ragged nor has a width of its own"
        )
    if column.default not in inert:
        raise PluginError(
            f"{where}.default is {column.default!r}, which has an effect in {op.name}: rows that do not use the "
            f"processor have the default; use {inert[0]}"
        )


def _holds(dtype: str, value: object) -> bool:
    if not isinstance(value, int | float):
        return False
    if dtype == "bool":
        return value in (0, 1)
    return dtype == "float32" or (isinstance(value, int) and -(2**31) <= value < 2**31)


def _newer(api: object) -> bool:
    return isinstance(api, int) and api > API_VERSION


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_names(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, str) and item for item in value)


def _is_params(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, ProcessorParams) and dataclasses.is_dataclass(value)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.split() == [value]


_FIELD_CHECKS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("a name without white space", _is_name),
    "target": ("of the form 'package.module:Class'", lambda v: isinstance(v, str) and bool(_TARGET.fullmatch(v))),
    "api": ("an integer", _is_int),
    "architectures": ("a tuple of architecture names", lambda v: _is_names(v) and bool(v)),
    "params": ("a dataclass derived from ProcessorParams", _is_params),
    "preference": ("an integer", _is_int),
    "order": ("an integer", _is_int),
    "requires": ("a tuple of module names", _is_names),
    "models": ("a tuple of model names", _is_names),
    "install": ("a string", lambda v: isinstance(v, str)),
}
_COMMAND_CHECKS = {
    **_FIELD_CHECKS,
    "name": ("words with one space between them", lambda v: _matches(_COMMAND, v)),
    "target": ("of the form 'package.module:attribute'", lambda v: _matches(_TARGET, v)),
    "help": ("one line of text", lambda v: isinstance(v, str) and len(v.strip().splitlines()) == 1),
    "sections": (
        f"a mapping from names, none of {', '.join(RUN_KEYS)}, to targets 'package.module:Class'",
        lambda v: isinstance(v, Mapping) and all(_is_section(name, target) for name, target in v.items()),
    ),
}
_DRAFTER_CHECKS = {
    **_FIELD_CHECKS,
    "name": (f"a name without white space, and not {NO_SPECULATION!r}", lambda v: _is_name(v) and v != NO_SPECULATION),
    "params": (
        "a dataclass derived from DrafterParams",
        lambda v: isinstance(v, type) and issubclass(v, DrafterParams),
    ),
    "device": ("True or False", lambda v: isinstance(v, bool)),
}
_POLICY_CHECKS = {
    **_FIELD_CHECKS,
    "help": _COMMAND_CHECKS["help"],
    "params": (
        "a dataclass derived from PolicyParams",
        lambda v: isinstance(v, type) and issubclass(v, PolicyParams),
    ),
}
_QUANTIZATION_CHECKS = {
    **_FIELD_CHECKS,
    "name": (
        f"a name without white space, and not {' or '.join(map(repr, NO_QUANTIZATION_NAMES))}",
        lambda v: _is_name(v) and v not in NO_QUANTIZATION_NAMES,
    ),
    "help": _COMMAND_CHECKS["help"],
    "formats": ("a tuple of quant_method values", _is_names),
    "online": ("True or False", lambda v: isinstance(v, bool)),
}
_SPEC_CHECKS: Mapping[type[Any], Mapping[str, tuple[str, Callable[[Any], bool]]]] = {
    CommandSpec: _COMMAND_CHECKS,
    DrafterSpec: _DRAFTER_CHECKS,
    PolicySpec: _POLICY_CHECKS,
    QuantizationSpec: _QUANTIZATION_CHECKS,
}


def _is_section(name: object, target: object) -> bool:
    return isinstance(name, str) and name.isidentifier() and name not in RUN_KEYS and _matches(_TARGET, target)


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and bool(pattern.fullmatch(value))
