"""Typed reading of config.json: a field that is missing or of the wrong type raises a `ModelError` that names it."""

from __future__ import annotations

import builtins
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nanoengine.api import ModelError

__all__ = ["ConfigJSON", "Fields", "layer_windows", "same_windows", "used_window"]

ConfigJSON = Mapping[str, Any]
"""config.json, as `Model.read_config` gets it."""

_REQUIRED: Any = object()
_LOCAL = "sliding_attention"
_LAYER_TYPES = ("full_attention", _LOCAL)
_INT32 = 2**31 - 1
LARGEST: Mapping[str, int] = {
    "num_hidden_layers": 1024,
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "moe_intermediate_size": 2**20,
    "shared_expert_intermediate_size": 2**20,
    "num_experts": 2**12,
    "num_local_experts": 2**12,
    "num_experts_per_tok": 2**6,
    "n_routed_experts": 2**12,
    "n_shared_experts": 2**6,
    "n_group": 2**12,
    "topk_group": 2**12,
    "first_k_dense_replace": 2**12,
    "q_lora_rank": 2**18,
    "kv_lora_rank": 2**18,
    "qk_nope_head_dim": 2**12,
    "qk_rope_head_dim": 2**12,
    "v_head_dim": 2**12,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**12,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**27,
}
"""Sizes far above every known model. A larger one is a mistake, and building the model would never end or not fit."""


class Fields:
    """Reads fields of one JSON object. A default makes a field optional.

    Args:
        data: the object. prefix: path of the object in config.json, for messages.
        defaults: values of fields that the file does not have. For a null in the file they are not used: then the
            default of the method is used, or an error is raised if it has none.
        names: usual name -> the family's own, e.g. {"hidden_size": "n_embd"}: methods take both, the file may have
            either, `defaults` and messages have the family's.
        model_type: the family's; a file with another one is rejected.
    """

    def __init__(
        self,
        data: Any,
        prefix: str = "",
        defaults: Mapping[str, Any] | None = None,
        names: Mapping[str, str] | None = None,
        *,
        model_type: str | None = None,
    ) -> None:
        if not isinstance(data, Mapping):
            raise ModelError(f"config.json: {prefix.rstrip('.') or 'the file'} must be an object, not {shown(data)}")
        self.data: Mapping[str, Any] = data
        self.prefix = prefix
        self.defaults = defaults or {}
        self.names = names or {}
        if model_type is not None:
            self.refuse("model_type", model_type)

    def own_name(self, name: str) -> str:
        """The name that the field has in the file. Raises `ModelError` for two names with different values."""
        own = self.names.get(name, name)
        if own == name or name not in self.data:
            return own
        if own in self.data and self.data[own] != self.data[name]:
            raise ModelError(
                f"config.json: {self.prefix}{own} {shown(self.data[own])} contradicts {self.prefix}{name} "
                f"{shown(self.data[name])}: leave out one of them"
            )
        return own if own in self.data else name

    def get(self, name: str) -> Any:
        """The value in the file, else the default; None if there is neither."""
        name = self.own_name(name)
        return self.data[name] if name in self.data else self.defaults.get(name)

    def has(self, name: str) -> bool:
        """Whether the field has a value that is not null."""
        return self.get(name) is not None

    def nested(self, name: str, defaults: Mapping[str, Any] | None = None) -> Fields:
        """The object in a field; an empty one if the field is missing or null."""
        value = self.get(name)
        return Fields({} if value is None else value, f"{self.prefix}{name}.", defaults)

    def int(self, name: str, default: Any = _REQUIRED, *, least: int = 1, most: int | None = None) -> int:
        """An integer from `least` to `most`. The default of `most` is the name's entry in `LARGEST`."""
        value, most = self._get(name, default), LARGEST.get(name, _INT32) if most is None else most
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.wrong(name, value, "a positive integer" if least == 1 else f"an integer of {least} or more")
        if value > most:
            raise self.wrong(name, value, f"at most {most}")
        return value

    def float(self, name: str, default: Any = _REQUIRED) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _LARGEST_FLOAT:
            raise self.wrong(name, value, "a positive number")
        return value * 1.0

    def optional_float(self, name: str) -> builtins.float | None:
        return self.float(name) if self.has(name) else None

    def floats(self, name: str) -> tuple[builtins.float, ...]:
        """A list of positive numbers."""
        value = self._get(name, _REQUIRED)
        if not isinstance(value, list):
            raise self.wrong(name, value, "a list of positive numbers")
        return tuple(Fields({name: each}, self.prefix).float(name) for each in value)

    def ints(
        self,
        name: str,
        default: Any = _REQUIRED,
        *,
        layers: builtins.int = 0,
        least: builtins.int = 0,
        most: builtins.int = _INT32,
    ) -> tuple[builtins.int, ...]:
        """A list of integers from `least` to `most`; with `layers` one for each of so many layers, or more."""
        value = self._get(name, default)
        if value is default:
            return tuple(value)
        known = isinstance(value, list) and all(isinstance(each, int) and not isinstance(each, bool) for each in value)
        if not known or len(value) < layers or not all(least <= each <= most for each in value):
            wanted = f"of {least} or more" if most == _INT32 else f"from {least} to {most}"
            each = f", one for each of {layers} layers (num_hidden_layers)" if layers else ""
            raise self.wrong(name, value, f"a list of integers {wanted}{each}")
        return tuple(value)

    def bool(self, name: str, default: Any = _REQUIRED) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self.wrong(name, value, "true or false")
        return value

    def choice(self, name: str, choices: Sequence[str], default: Any = _REQUIRED) -> str:
        value = self._get(name, default)
        if not isinstance(value, str) or value not in choices:
            raise self.wrong(name, value, f"one of {', '.join(choices)}")
        return value

    def refuse(self, name: str, *harmless: Any) -> None:
        """Raises `ModelError` unless the field is missing, null or one of `harmless`. For unsupported features."""
        value = self.get(name)
        if value is not None and not among(value, harmless):
            raise ModelError(
                f"config.json: {self.prefix}{self.own_name(name)} = {shown(value)} is not supported by this model; "
                f"supported: {', '.join(['null', *map(shown, harmless)])}"
            )

    def unused(self, *names: str) -> None:
        """Marks fields as read that change no result, whatever their values are; nested fields too."""
        for name in names:
            _walk(self.get(name))
        recorded: set[str] | None = getattr(self.data, "unused", None)  # a `Recorded` has it
        if recorded is not None:
            recorded.update(names)

    def _get(self, name: str, default: Any) -> Any:
        value = self.get(name)
        if value is not None:
            return value
        if default is not _REQUIRED:
            return default
        name = self.own_name(name)
        if name in self.data:
            raise ModelError(f"config.json: {self.prefix}{name} must not be null")
        raise ModelError(f"config.json lacks {self.prefix}{name}")

    def wrong(self, name: str, value: Any, wanted: str) -> ModelError:
        """The error for a field with a wrong value."""
        return ModelError(f"config.json: {self.prefix}{self.own_name(name)} must be {wanted}, not {shown(value)}")


_LARGEST_FLOAT = 3e38
"""The largest float32. The comparison with it is false for NaN."""


def shown(value: Any) -> str:
    """A value of config.json for a message: null, true and false as in JSON; at most a few lines long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value) if isinstance(value, str) and len(value) <= 120 else reprlib.repr(value)


def _walk(value: Any) -> None:
    """Reads every key of a value and of all objects in it, so that a `Recorded` mapping records them."""
    if isinstance(value, Mapping):
        for each in value.values():
            _walk(each)


def among(value: Any, choices: Sequence[Any]) -> bool:
    """Whether a value is one of the choices. Types count: true is not 1."""
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in choices)


def layer_windows(
    fields: Fields, layers: int, window: int | None, is_local: Callable[[int], bool] = lambda layer: True
) -> tuple[int | None, ...]:
    """Each layer's attention window: `window` in local layers, None in the others.

    `layer_types` of the file says which layers are local; if it is missing, `is_local` does. `window` None: the file
    has no window, so no layer may be local. Raises `ModelError`.
    """
    kinds = fields.get("layer_types")
    if kinds is None:
        return tuple(window if is_local(layer) else None for layer in range(layers))
    known = isinstance(kinds, list) and all(isinstance(kind, str) and kind in _LAYER_TYPES for kind in kinds)
    if not known or len(kinds) != layers:
        raise fields.wrong("layer_types", kinds, f"a list of {layers} of {' and '.join(_LAYER_TYPES)}")
    if window is None and _LOCAL in kinds:
        raise ModelError(f"config.json: {fields.prefix}layer_types has {_LOCAL}, but there is no sliding_window")
    return tuple(window if kind == _LOCAL else None for kind in kinds)


def same_windows(fields: Fields) -> tuple[int | None, ...]:
    """`sliding_window` as the window of each layer; (): it is missing or null. Raises `ModelError`."""
    return (fields.int("sliding_window"),) * fields.int("num_hidden_layers") if fields.has("sliding_window") else ()


def used_window(fields: Fields) -> int | None:
    """`sliding_window`, if `use_sliding_window` is true; None: it is null, or not used. Raises `ModelError`."""
    if fields.bool("use_sliding_window") and fields.has("sliding_window"):
        return fields.int("sliding_window")
    fields.unused("sliding_window")
    return None
