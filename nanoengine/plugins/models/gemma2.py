"""Gemma 2. Norms before and after attention and MLP, soft caps on scores and logits, every second layer is local."""

from __future__ import annotations

from nanoengine.layers.decoder import ACTIVATIONS, SANDWICH_NORMS, DecoderConfig, DecoderLM, DecoderTraits, read_decoder
from nanoengine.layers.hf_config import ConfigJSON, Fields, layer_windows

# The defaults of transformers' Gemma2Config and Gemma3TextConfig for fields that are missing in the file.
FAMILY_DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
# A null in the file means that there is no cap.
DEFAULTS = {
    **FAMILY_DEFAULTS,
    "vocab_size": 256000,
    "max_position_embeddings": 8192,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}


class Gemma2(DecoderLM):
    @classmethod
    def read_config(cls, hf: ConfigJSON) -> DecoderConfig:
        fields = Fields(hf, model_type="gemma2", defaults=DEFAULTS)
        fields.unused("sliding_window_size")  # the first files have it in addition to sliding_window
        layers, window = fields.int("num_hidden_layers"), fields.int("sliding_window")
        traits = family_traits(fields)
        traits["windows"] = layer_windows(fields, layers, window, lambda layer: layer % 2 == 0)
        traits["score_cap"] = fields.optional_float("attn_logit_softcapping")
        return read_decoder(fields, **traits)


def family_traits(fields: Fields) -> DecoderTraits:
    """The attributes that Gemma 2 and 3 have in common."""
    fields.refuse("use_bidirectional_attention", False)
    fields.unused("hidden_act")  # an older name, which transformers does not read
    bias = fields.bool("attention_bias")
    return {
        "head_size": fields.int("head_dim"),
        "attention_bias": bias,
        "output_bias": bias,
        "score_scale": fields.float("query_pre_attn_scalar") ** -0.5,
        "logit_cap": fields.optional_float("final_logit_softcapping"),
        "embedding_scale": fields.int("hidden_size") ** 0.5,
        "activation": ACTIVATIONS[fields.choice("hidden_activation", tuple(ACTIVATIONS))],
        "unit_offset": True,
        "norms": SANDWICH_NORMS,
    }
