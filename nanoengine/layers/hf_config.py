"""Typed reading of config.json: a field that is missing or of the wrong kind is a `ModelError` that names it."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from nanoengine.api import ModelError

T = TypeVar("T")
_REQUIRED: Any = object()
_LOCAL = "sliding_attention"
_LAYER_TYPES = ("full_attention", _LOCAL)


class Fields:
    """Reads fields of one JSON object; a default makes a field optional (null counts as absent).

    Args:
        data: the object. prefix: path of the object in config.json, for messages.
    """

    def __init__(self, data: Any, prefix: str = "") -> None:
        if not isinstance(data, Mapping):
            raise ModelError(f"config.json: {prefix.rstrip('.') or 'the file'} must be an object, not {data!r}")
        self.data: Mapping[str, Any] = data
        self.prefix = prefix

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.data.get(name) is not None

    def int(self, name: str, default: Any = _REQUIRED, *, least: int = 1) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(name, value, "a positive integer" if least == 1 else f"an integer of {least} or more")
        return value

    def float(self, name: str, default: Any = _REQUIRED) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self.wrong(name, value, "a positive number")
        return value * 1.0

    def optional_float(self, name: str) -> builtins.float | None:
        return self.float(name) if self.has(name) else None

    def bool(self, name: str, default: Any = _REQUIRED) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def choice(self, name: str, choices: Sequence[str], default: Any = _REQUIRED) -> str:
        value = self._get(name, default)
        if value not in choices:
            raise self.wrong(name, value, f"one of {', '.join(choices)}")
        return str(value)

    def refuse(self, name: str, *harmless: Any) -> None:
        """For what the model does not serve: the field must be absent, null or one of `harmless`."""
        value = self.data.get(name)
        if value is not None and value not in harmless:
            raise ModelError(f"config.json: {self.prefix}{name} = {value!r} is not served by this model")

    def _get(self, name: str, default: Any) -> Any:
        value = self.data.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise ModelError(f"config.json lacks {self.prefix}{name}")
        return default

    def wrong(self, name: str, value: Any, wanted: str) -> ModelError:
        """The error to raise about a field."""
        return ModelError(f"config.json: {self.prefix}{name} must be {wanted}, not {value!r}")


def layer_windows(
    fields: Fields, layers: int, window: int | None, is_local: Callable[[int], bool] = lambda layer: True
) -> tuple[int | None, ...]:
    """Each layer's attention window: `window` in those that `layer_types`, or else `is_local`, calls local.

    `window` None: the file has none, and `layer_types` may name no local layer. Raises `ModelError`.
    """
    kinds = fields.data.get("layer_types")
    if kinds is None:
        return tuple(window if is_local(layer) else None for layer in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in _LAYER_TYPES for kind in kinds):
        raise fields.wrong("layer_types", kinds, f"a list of {layers} of {' and '.join(_LAYER_TYPES)}")
    if window is None and _LOCAL in kinds:
        raise ModelError(f"config.json: {fields.prefix}layer_types names {_LOCAL}, but no sliding_window is in use")
    return tuple(window if kind == _LOCAL else None for kind in kinds)
