"""Mistral 7B, Nemo, Small and others of this architecture. The first of them have a sliding window."""

from __future__ import annotations

from nanoengine.layers.decoder import DecoderConfig, DecoderLM, read_decoder
from nanoengine.layers.hf_config import ConfigJSON, Fields, same_windows

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
    def read_config(cls, hf: ConfigJSON) -> DecoderConfig:
        fields = Fields(hf, model_type="mistral", defaults=DEFAULTS)
        fields.refuse("layer_types")
        return read_decoder(fields, windows=same_windows(fields))
