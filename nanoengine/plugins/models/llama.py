"""Llama 2, 3, 3.1, 3.2 and models of their architecture (SmolLM2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanoengine.layers.decoder import DecoderConfig, DecoderLM, read_decoder
from nanoengine.layers.hf_config import Fields


class Llama(DecoderLM):
    @classmethod
    def read_config(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        fields = Fields(hf)
        fields.choice("hidden_act", ["silu"], "silu")
        bias = fields.bool("attention_bias", False)
        return read_decoder(fields, attention_bias=bias, output_bias=bias, mlp_bias=fields.bool("mlp_bias", False))
