"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini, dense. Their files hold q, k, v and gate, up as one tensor each."""

from __future__ import annotations

from nanoengine.layers.decoder import DecoderConfig, DecoderLM, read_decoder
from nanoengine.layers.hf_config import ConfigJSON, Fields, same_windows
from nanoengine.layers.rope import read_rope

# Defaults of transformers' Phi3Config.
DEFAULTS = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_OLDER_NAMES = {"su": "longrope", "yarn": "longrope"}  # of the rope type


class Phi3(DecoderLM):
    @classmethod
    def read_config(cls, hf: ConfigJSON) -> DecoderConfig:
        fields = Fields(hf, model_type="phi3", defaults=DEFAULTS)
        for name in ("attention_bias", "mlp_bias", "lm_head_bias"):  # in files, but not in transformers' class
            fields.refuse(name, False)
        for name in ("full_attn_mod", "interpolate_factor"):  # of Phi-4-mini's files
            fields.refuse(name, 1)
        return read_decoder(
            fields,
            windows=same_windows(fields),
            rope=read_rope(fields, partial=1.0, kinds=("default", "longrope"), aliases=_OLDER_NAMES),
        )
