"""Qwen3, dense. Queries and keys are normalised head by head; the head size stands by itself in the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanoengine.layers.decoder import DecoderConfig, DecoderLM, read_decoder
from nanoengine.layers.hf_config import Fields
from nanoengine.plugins.models.qwen2 import read_windows


class Qwen3(DecoderLM):
    @classmethod
    def read_config(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        fields = Fields(hf)
        fields.choice("hidden_act", ["silu"], "silu")
        bias = fields.bool("attention_bias", False)
        return read_decoder(
            fields,
            head_size=fields.int("head_dim"),
            attention_bias=bias,
            output_bias=bias,
            qk_norm=True,
            windows=read_windows(fields),
        )
