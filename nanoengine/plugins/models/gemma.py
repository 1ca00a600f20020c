"""Gemma 1. Norm weights are stored minus one, and embedded tokens are scaled."""

from __future__ import annotations

from nanoengine.layers.decoder import ACTIVATIONS, DecoderConfig, DecoderLM, read_decoder
from nanoengine.layers.hf_config import ConfigJSON, Fields

# Defaults of transformers' GemmaConfig.
DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
_ACTIVATIONS = {**ACTIVATIONS, "gelu": "gelu_tanh"}  # the first files say gelu, and mean the approximation


class Gemma(DecoderLM):
    @classmethod
    def read_config(cls, hf: ConfigJSON) -> DecoderConfig:
        fields = Fields(hf, model_type="gemma", defaults=DEFAULTS)
        fields.refuse("use_bidirectional_attention", False)
        fields.unused("hidden_activation")  # an older name, which transformers does not read
        bias = fields.bool("attention_bias")
        return read_decoder(
            fields,
            activation=_ACTIVATIONS[fields.choice("hidden_act", tuple(_ACTIVATIONS))],
            attention_bias=bias,
            output_bias=bias,
            embedding_scale=fields.int("hidden_size") ** 0.5,
            unit_offset=True,
        )
