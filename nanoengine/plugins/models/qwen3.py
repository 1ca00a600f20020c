"""Qwen3, dense. Queries and keys are normalised per head; the head size is a separate field of the config."""

from __future__ import annotations

from nanoengine.layers.decoder import DecoderConfig, DecoderLM, read_decoder
from nanoengine.layers.hf_config import ConfigJSON, Fields
from nanoengine.plugins.models import qwen2

# The defaults of transformers' Qwen3Config for fields that are missing in the file.
DEFAULTS = {**qwen2.DEFAULTS, "head_dim": 128, "attention_bias": False}


class Qwen3(DecoderLM):
    @classmethod
    def read_config(cls, hf: ConfigJSON) -> DecoderConfig:
        fields = Fields(hf, model_type="qwen3", defaults=DEFAULTS)
        bias = fields.bool("attention_bias")
        return read_decoder(
            fields,
            head_size=fields.int("head_dim"),
            attention_bias=bias,
            output_bias=bias,
            qk_norm=True,
            windows=qwen2.read_windows(fields),
        )
