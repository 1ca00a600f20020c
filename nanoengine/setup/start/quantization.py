"""What config.json says of quantised weights, and which formats become plain ones while they are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nanoengine.api.errors import ModelError, shown
from nanoengine.setup.start.gguf_blocks import GGUF
from nanoengine.setup.start.mxfp4 import MXFP4
from nanoengine.setup.start.packed import PackedFormat

_KEYS = ("quantization_config", "compression_config")  # the second is an older name of compressed-tensors'
PACKED: tuple[PackedFormat, ...] = (MXFP4, GGUF)
"""Formats that are dequantised while loading."""


@dataclass(frozen=True, slots=True)
class Stated:
    """What config.json says of quantised weights. key: where. method: `quant_method`. config: the whole mapping."""

    key: str
    method: str
    config: Mapping[str, Any]

    def refused(self, why: str) -> ModelError:
        return ModelError(f"config.json: {self.key} {_says(self.method)}; {why}")


def quantised_by(hf_config: Mapping[str, Any]) -> Stated | None:
    """What config.json says of quantised weights; None: they are plain.

    Raises `ModelError` if that is no mapping with a quant_method, or is about a part of the model only.
    """
    found = list(_quantised(hf_config))
    for path, given in found:
        method = given.get("quant_method") if isinstance(given, Mapping) else given
        if path not in _KEYS or not isinstance(given, Mapping) or not isinstance(method, str):
            raise ModelError(
                f"config.json: {path} {_says(method)}; supported is a {_KEYS[0]} of the whole model, a mapping with a "
                "quant_method: otherwise use the checkpoint that this one was made from, or a GGUF file"
            )
    if not found:
        return None
    (path, given), *more = found
    if any(each != given for _, each in more):
        raise ModelError(f"config.json has {' and '.join(_KEYS)}, with different values")
    _note(hf_config[path])
    return Stated(path, given["quant_method"], dict(given))


def _packed(method: str) -> PackedFormat | None:
    return next((each for each in PACKED if each.method == method), None)


def is_packed(method: str) -> bool:
    """Whether weights of this format are dequantised while they are loaded."""
    return _packed(method) is not None


def packed_format(hf_config: Mapping[str, Any]) -> PackedFormat | None:
    """How the checkpoint's tensors become plain ones while they are loaded; None: they are plain.

    Raises `ModelError` for any other format of quantised weights.
    """
    stated = quantised_by(hf_config)
    if stated is None:
        return None
    found = _packed(stated.method)
    if found is None:
        known = ", ".join(each.method for each in PACKED)
        raise stated.refused(
            f"dequantised while loading are {known}: otherwise use the "
            "checkpoint that this one was made from, or a GGUF file"
        )
    if unknown := stated.config.keys() - {"quant_method", *found.options}:
        raise ModelError(
            f"config.json: {stated.key} of {found.method} has {', '.join(sorted(unknown))}, which may mean other "
            f"values; known: {', '.join(sorted(found.options))}"
        )
    return found.reading(stated.config)


def _note(config: Mapping[str, Any]) -> None:
    """Notes all keys of what config.json says as read: the format's reader decides about them."""
    for value in config.values():
        if isinstance(value, Mapping):
            _note(value)


def _says(method: object) -> str:
    return f"says that the weights are quantised (quant_method {shown(method)})"


def _quantised(hf_config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Path and value of all that says that weights are quantised. Notes no key as read."""
    whole = dict(dict.items(hf_config)) if isinstance(hf_config, dict) else dict(hf_config)
    inner = {f"{name}.": dict(dict.items(each)) for name, each in whole.items() if isinstance(each, dict)}
    for prefix, fields in {"": whole, **inner}.items():
        for key in _KEYS:
            if prefix[:-1] not in _KEYS and fields.get(key) is not None:
                yield f"{prefix}{key}", fields[key]
