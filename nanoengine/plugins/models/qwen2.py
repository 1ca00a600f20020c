"""Qwen2 and Qwen2.5, dense. Queries, keys and values have a bias, the attention's output has none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanoengine.layers.decoder import DecoderConfig, DecoderLM, read_decoder
from nanoengine.layers.hf_config import Fields, layer_windows


class Qwen2(DecoderLM):
    @classmethod
    def read_config(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        fields = Fields(hf)
        fields.choice("hidden_act", ["silu"], "silu")
        return read_decoder(fields, attention_bias=True, windows=read_windows(fields))


def read_windows(fields: Fields) -> tuple[int | None, ...]:
    """A window, if it is switched on at all, in the layers from `max_window_layers` on."""
    layers = fields.int("num_hidden_layers")
    if not fields.bool("use_sliding_window", False):
        return layer_windows(fields, layers, None)
    first = fields.int("max_window_layers", 28, least=0)
    return layer_windows(fields, layers, fields.int("sliding_window", 4096), lambda layer: layer >= first)
