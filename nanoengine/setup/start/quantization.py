"""The one place where a checkpoint's quantisation chooses the methods of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanoengine.api.errors import ModelError, shown
from nanoengine.api.layers import ChooseMethod

_KEYS = ("quantization_config", "compression_config")  # the second is an older name of compressed-tensors'


def choose_methods(hf_config: Mapping[str, Any]) -> ChooseMethod | None:
    """What chooses the method of each layer, by what config.json says of the weights; None: all are plain.

    Raises `ModelError` for a format that is not supported, which today is every one.
    """
    whole = dict(dict.items(hf_config)) if isinstance(hf_config, dict) else dict(hf_config)  # notes no key as read
    inner = {f"{name}.": dict(dict.items(each)) for name, each in whole.items() if isinstance(each, dict)}
    for prefix, fields in {"": whole, **inner}.items():
        for key in _KEYS:
            if (given := fields.get(key)) is None or prefix[:-1] in _KEYS:
                continue
            method = given.get("quant_method") if isinstance(given, Mapping) else given
            raise ModelError(
                f"config.json: {prefix}{key} says that the weights are quantised (quant_method {shown(method)}), "
                "and no quantised format is supported: use the checkpoint that this one was made from, or a GGUF "
                "file, whose weights are expanded"
            )
    return None
