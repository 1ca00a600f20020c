"""Mistral 7B, Nemo, Small and others of their architecture. The first of them look back a window of tokens only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanoengine.layers.decoder import DecoderConfig, DecoderLM, read_decoder
from nanoengine.layers.hf_config import Fields

_WINDOW = 4096  # where the file does not name one; null means none


class Mistral(DecoderLM):
    @classmethod
    def read_config(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        fields = Fields({"sliding_window": _WINDOW, **hf})
        fields.choice("hidden_act", ["silu"], "silu")
        fields.refuse("layer_types")
        windows = (
            (fields.int("sliding_window"),) * fields.int("num_hidden_layers") if fields.has("sliding_window") else ()
        )
        return read_decoder(fields, windows=windows)
