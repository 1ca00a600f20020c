"""Typed reading of config.json: a field that is missing or of the wrong kind is a `ModelError` that names it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from nanoengine.api import ModelError

T = TypeVar("T")
_REQUIRED: Any = object()


class Fields:
    """Reads fields of one JSON object; a default makes a field optional (null counts as absent).

    Args:
        data: the object. prefix: path of the object in config.json, for messages.
    """

    def __init__(self, data: Mapping[str, Any], prefix: str = "") -> None:
        if not isinstance(data, Mapping):
            raise ModelError(f"config.json: {prefix.rstrip('.') or 'the file'} must be an object, not {data!r}")
        self.data = data
        self.prefix = prefix

    def int(self, name: str, default: Any = _REQUIRED) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._wrong(name, value, "a positive integer")
        return value

    def float(self, name: str, default: Any = _REQUIRED) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self._wrong(name, value, "a positive number")
        return value * 1.0

    def bool(self, name: str, default: Any = _REQUIRED) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def choice(self, name: str, choices: Sequence[str], default: Any = _REQUIRED) -> str:
        value = self._get(name, default)
        if value not in choices:
            raise self._wrong(name, value, f"one of {', '.join(choices)}")
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

    def _wrong(self, name: str, value: Any, wanted: str) -> ModelError:
        return ModelError(f"config.json: {self.prefix}{name} must be {wanted}, not {value!r}")
