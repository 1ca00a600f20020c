"""Llama 2, 3, 3.1, 3.2 and models of their architecture (SmolLM2)."""

from __future__ import annotations

from nanoengine.layers.decoder import DecoderConfig, DecoderLM, read_decoder
from nanoengine.layers.hf_config import ConfigJSON, Fields

# The defaults of transformers' LlamaConfig for fields that are missing in the file.
DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


class Llama(DecoderLM):
    @classmethod
    def read_config(cls, hf: ConfigJSON) -> DecoderConfig:
        fields = Fields(hf, model_type="llama", defaults=DEFAULTS)
        bias = fields.bool("attention_bias")
        return read_decoder(fields, attention_bias=bias, output_bias=bias, mlp_bias=fields.bool("mlp_bias"))
