"""The `sampler` section: a preset of `SamplingParams`, checked before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nanoengine.api.errors import ConfigError, ParamsError
from nanoengine.api.processor_params import ProcessorParams
from nanoengine.params.field_types import conform_text
from nanoengine.params.sampling_fields import CORE_TYPES, CoreFields, legal_fields, processor_types
from nanoengine.setup.plugins.registry import Registry

Processors = Sequence[tuple[str, type[ProcessorParams]]]


def logits_processors(registry: Registry) -> Processors:
    """Name and parameters of every registered processor. Raises `PluginError` where two of them clash."""
    return [(found.spec.name, found.spec.params) for found in registry.processors()]


def check_sampler(given: Any, processors: Processors, origin: Callable[..., str]) -> dict[str, Any]:
    """The section's values, of the right types and in range.

    `origin(key)` is where a key was given, `origin()` where the section was: "file:line". All keys are legal.

    Raises `ConfigError`.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"{origin()}: sampler must be a mapping of sampling parameters, not {given!r}")
    legal = legal_fields(processors)
    values: dict[str, Any] = {}
    for key, value in given.items():
        try:
            values[key] = conform_text(f"sampler.{key}", value, legal[key])
        except ParamsError as error:
            raise ConfigError(f"{origin(key)}: {error}") from error
    owners: list[tuple[type[Any], Mapping[str, Any]]] = [(CoreFields, CORE_TYPES)]
    for owner, names in [*owners, *((params, processor_types(name, params)) for name, params in processors)]:
        try:
            owner(**{key: value for key, value in values.items() if key in names})
        except ParamsError as error:
            key = str(error).split(maxsplit=1)[0]  # range errors begin with the field's name
            where = f"{origin(key)}: sampler." if key in values else f"{origin()}: sampler: "
            raise ConfigError(f"{where}{error}") from error
    return values
