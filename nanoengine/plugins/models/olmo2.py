"""OLMo 2. No norms before attention and MLP but after them; queries and keys are normalised over all heads at once."""

from __future__ import annotations

from nanoengine.layers.decoder import POST_NORMS, DecoderConfig, DecoderLM, read_decoder
from nanoengine.layers.hf_config import ConfigJSON, Fields

# Defaults of transformers' Olmo2Config.
DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_bias": False,
}


class Olmo2(DecoderLM):
    @classmethod
    def read_config(cls, hf: ConfigJSON) -> DecoderConfig:
        fields = Fields(hf, model_type="olmo2", defaults=DEFAULTS)
        bias = fields.bool("attention_bias")
        return read_decoder(
            fields, attention_bias=bias, output_bias=bias, norms=POST_NORMS, qk_norm=True, qk_norm_over="all_heads"
        )
