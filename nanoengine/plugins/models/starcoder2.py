"""StarCoder2: LayerNorm, biases, an MLP without a gate, one window for all layers."""

from __future__ import annotations

from dataclasses import replace

from nanoengine.layers.decoder import DECODER_WEIGHTS, DecoderConfig, DecoderLM, read_decoder
from nanoengine.layers.hf_config import ConfigJSON, Fields, same_windows

# Defaults of transformers' Starcoder2Config.
DEFAULTS = {
    "vocab_size": 49152,
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 4096,
    "norm_epsilon": 1e-5,
    "use_bias": True,
    "tie_word_embeddings": True,
}


class Starcoder2(DecoderLM):
    weights = replace(DECODER_WEIGHTS, rules={"mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"})

    @classmethod
    def read_config(cls, hf: ConfigJSON) -> DecoderConfig:
        fields = Fields(hf, model_type="starcoder2", defaults=DEFAULTS, names={"rms_norm_eps": "norm_epsilon"})
        fields.refuse("mlp_type", "default")  # in files, but not in transformers' class, as the next two
        fields.refuse("norm_type", "layer_norm")
        fields.unused("layer_norm_epsilon")
        bias = fields.bool("use_bias")
        return read_decoder(
            fields,
            attention_bias=bias,
            output_bias=bias,
            mlp_bias=bias,
            gated=False,
            norm="layer",
            norm_bias=True,
            windows=same_windows(fields),
        )
