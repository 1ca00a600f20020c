"""The one place where config.json's quantisation decides: the methods of layers, or how weights are unpacked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from nanoengine.api.errors import ModelError, shown
from nanoengine.api.layers import ChooseMethod
from nanoengine.setup.start.mxfp4 import MXFP4
from nanoengine.setup.start.packed import PackedFormat

_KEYS = ("quantization_config", "compression_config")  # the second is an older name of compressed-tensors'
PACKED = (MXFP4,)
"""Formats that are dequantised while loading."""


def choose_methods(hf_config: Mapping[str, Any]) -> ChooseMethod | None:
    """What chooses the method of each layer, by what config.json says of the weights; None: all are plain.

    Raises `ModelError` as `packed_format` does. Today no format has methods.
    """
    packed_format(hf_config)
    return None


def packed_format(hf_config: Mapping[str, Any]) -> PackedFormat | None:
    """How the checkpoint's tensors become plain ones while they are loaded; None: they are plain.

    Raises `ModelError` for a format that is not supported.
    """
    found = None
    for path, given in _quantised(hf_config):
        method = given.get("quant_method") if isinstance(given, Mapping) else given
        found = next((each for each in PACKED if each.method == method), None)
        if path != _KEYS[0] or not isinstance(given, Mapping) or found is None:
            known = " or ".join(each.method for each in PACKED)
            raise ModelError(
                f"config.json: {path} says that the weights are quantised (quant_method {shown(method)}); supported is "
                f"a {_KEYS[0]} with {known}, which is dequantised while loading: otherwise use the checkpoint that "
                "this one was made from, or a GGUF file, whose weights are expanded"
            )
        if unknown := given.keys() - {"quant_method", *found.options}:
            raise ModelError(
                f"config.json: {path} of {found.method} has {', '.join(sorted(unknown))}, which may mean other values; "
                f"known: {', '.join(sorted(found.options))}"
            )
    if found is not None:
        hf_config[_KEYS[0]].items()  # notes its keys as read
    return found


def _quantised(hf_config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Path and value of all that says that weights are quantised. Notes no key as read."""
    whole = dict(dict.items(hf_config)) if isinstance(hf_config, dict) else dict(hf_config)
    inner = {f"{name}.": dict(dict.items(each)) for name, each in whole.items() if isinstance(each, dict)}
    for prefix, fields in {"": whole, **inner}.items():
        for key in _KEYS:
            if prefix[:-1] not in _KEYS and fields.get(key) is not None:
                yield f"{prefix}{key}", fields[key]
