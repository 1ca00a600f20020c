"""Phi-1, Phi-1.5 and Phi-2: attention and MLP side by side after one LayerNorm, half of each head rotated, biases."""

from __future__ import annotations

from dataclasses import replace

from nanoengine.layers.decoder import DECODER_WEIGHTS, DecoderConfig, DecoderLM, NormNames, read_decoder
from nanoengine.layers.hf_config import ConfigJSON, Fields
from nanoengine.layers.rope import read_rope

# Defaults of transformers' PhiConfig.
DEFAULTS = {
    "vocab_size": 51200,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "hidden_act": "gelu_new",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "qk_layernorm": False,
}
_RULES = {
    "final_layernorm": "norm",
    "self_attn.dense": "self_attn.o_proj",
    "q_layernorm": "q_norm",
    "k_layernorm": "k_norm",
    "mlp.fc1": "mlp.up_proj",
    "mlp.fc2": "mlp.down_proj",
}


class Phi(DecoderLM):
    weights = replace(
        DECODER_WEIGHTS, rename={**DECODER_WEIGHTS.rename, "final_layernorm.": "model.final_layernorm."}, rules=_RULES
    )

    @classmethod
    def read_config(cls, hf: ConfigJSON) -> DecoderConfig:
        fields = Fields(hf, model_type="phi", defaults=DEFAULTS, names={"rms_norm_eps": "layer_norm_eps"})
        fields.unused("attention_bias", "rotary_dim")  # in files, but not in transformers' class
        return read_decoder(
            fields,
            rope=read_rope(fields, partial=0.5),
            attention_bias=True,
            output_bias=True,
            mlp_bias=True,
            head_bias=True,
            qk_norm=fields.bool("qk_layernorm"),
            gated=False,
            norm="layer",
            norm_bias=True,
            norms=NormNames(before_attention="input_layernorm"),
            parallel=True,
        )
