"""The `sampler` section: a preset of `SamplingParams`, checked before anything heavy is imported."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from nanoengine.core.errors import ConfigError, ParamsError, PluginError
from nanoengine.core.setup.coerce import coerce
from nanoengine.core.setup.composer import Composed
from nanoengine.core.setup.registry import Registry
from nanoengine.core.setup.specs import StageParams

_CORE: Mapping[str, Any] = {
    "n": int, "seed": int | None, "max_tokens": int | None, "min_tokens": int,
    "stop": str | Sequence[str] | None, "stop_token_ids": Sequence[int] | None, "include_stop_str_in_output": bool,
    "ignore_eos": bool, "logprobs": int | None, "prompt_logprobs": int | None, "detokenize": bool,
    "skip_special_tokens": bool, "priority": int, "cache_salt": str | None,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SamplerField:
    """A legal key: what its value must be, and the stage's dataclass it belongs to (None: the core's own)."""

    annotation: Any
    owner: type[StageParams] | None = None


def sampler_fields(registry: Registry) -> Mapping[str, SamplerField]:
    """Every legal key of `sampler`: the core's and those of each registered stage. Raises `PluginError` on a clash."""
    legal = {name: SamplerField(annotation) for name, annotation in _CORE.items()}
    for found in registry.stages():
        try:
            hints = typing.get_type_hints(found.spec.params)
        except Exception as error:
            raise PluginError(
                f"{found.origin}: the annotations of {found.spec.params!r} cannot be read: {error}"
            ) from error
        legal |= {f.name: SamplerField(hints[f.name], found.spec.params) for f in fields(found.spec.params)}  # type: ignore[arg-type]
    return legal


def check_sampler(composed: Composed, legal: Mapping[str, SamplerField]) -> dict[str, Any]:
    """The section's values, of the right types and in range. Raises `ConfigError` naming who gave the key."""
    given = composed.data["sampler"]
    if not isinstance(given, Mapping):
        raise ConfigError(f"{composed.origin(('sampler',))}: sampler must be a mapping of parameters, not {given!r}")
    values: dict[str, Any] = {}
    for key, value in given.items():
        where = f"{composed.origin(('sampler', key))}: sampler.{key}"
        try:
            values[key] = coerce(value, legal[key].annotation)
            _in_range(legal[key].owner, {key: values[key]})
        except (TypeError, ParamsError) as error:
            raise ConfigError(f"{where} {error}" if isinstance(error, TypeError) else f"{where}: {error}") from error
    for owner in {legal[key].owner for key in values}:  # what a stage demands of its parameters together
        try:
            _in_range(owner, {key: value for key, value in values.items() if legal[key].owner is owner})
        except ParamsError as error:
            raise ConfigError(f"{composed.origin(('sampler',))}: sampler: {error}") from error
    return values


def _in_range(owner: type[StageParams] | None, values: Mapping[str, Any]) -> None:
    if owner is not None:
        owner(**values)
