"""SmolLM3: Llama whose every fourth layer does not rotate queries and keys."""

from __future__ import annotations

from nanoengine.layers.decoder import DecoderConfig, DecoderLM, read_decoder
from nanoengine.layers.hf_config import ConfigJSON, Fields, layer_windows, used_window
from nanoengine.layers.rope import read_rope

# Defaults of transformers' SmolLM3Config.
DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "no_rope_layer_interval": 4,
    "use_sliding_window": False,
}


class SmolLM3(DecoderLM):
    @classmethod
    def read_config(cls, hf: ConfigJSON) -> DecoderConfig:
        fields = Fields(hf, model_type="smollm3", defaults=DEFAULTS)
        fields.unused("max_window_layers")  # in files, but not in transformers' class
        layers, interval = fields.int("num_hidden_layers"), fields.int("no_rope_layer_interval")
        usual = [(i + 1) % interval for i in range(layers)]
        rotated = fields.ints("no_rope_layers", usual, layers=layers)[:layers]  # 0: the layer does not rotate
        bias = fields.bool("attention_bias")
        return read_decoder(
            fields,
            rope=read_rope(fields, 2000000.0),
            rotated=tuple(map(bool, rotated)),
            windows=layer_windows(fields, layers, used_window(fields), lambda layer: not rotated[layer]),
            attention_bias=bias,
            output_bias=bias,
            mlp_bias=fields.bool("mlp_bias"),
        )
