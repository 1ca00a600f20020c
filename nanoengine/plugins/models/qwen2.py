"""Qwen2 and Qwen2.5, dense. Queries, keys and values have a bias; the output of the attention has none."""

from __future__ import annotations

from nanoengine.layers.decoder import DecoderConfig, DecoderLM, read_decoder
from nanoengine.layers.hf_config import ConfigJSON, Fields, layer_windows, used_window

# The defaults of transformers' Qwen2Config for fields that are missing in the file.
DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


class Qwen2(DecoderLM):
    @classmethod
    def read_config(cls, hf: ConfigJSON) -> DecoderConfig:
        fields = Fields(hf, model_type="qwen2", defaults=DEFAULTS)
        return read_decoder(fields, attention_bias=True, windows=read_windows(fields))


def read_windows(fields: Fields) -> tuple[int | None, ...]:
    """The window of each layer: if it is enabled and not null, layers from `max_window_layers` on have it."""
    layers, first = fields.int("num_hidden_layers"), fields.int("max_window_layers", least=-(2**31))
    return layer_windows(fields, layers, used_window(fields), lambda layer: layer >= first)
