"""Mistral 7B, Nemo, Small and others of this architecture. The first of them have a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanoengine.layers.decoder import DecoderConfig, DecoderLM, read_decoder
from nanoengine.layers.hf_config import Fields, same_windows

# The defaults of transformers' MistralConfig for fields that are missing in the file. A window of null means no window.
DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 4096 * 32,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "sliding_window": 4096,
}


class Mistral(DecoderLM):
    @classmethod
    def read_config(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        fields = Fields(hf, defaults=DEFAULTS)
        fields.refuse("model_type", "mistral")
        fields.refuse("layer_types")
        return read_decoder(fields, windows=same_windows(fields))
