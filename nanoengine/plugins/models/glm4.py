"""GLM-4: half of each head rotated, neighbours together. GLM-4-0414 also normalises what attention and MLP return."""

from __future__ import annotations

from nanoengine.layers.decoder import PRE_NORMS, DecoderConfig, DecoderLM, NormNames, read_decoder
from nanoengine.layers.hf_config import ConfigJSON, Fields
from nanoengine.layers.rope import read_rope

# Defaults of transformers' GlmConfig and Glm4Config.
DEFAULTS = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 0.00000015625,
    "tie_word_embeddings": False,
    "attention_bias": True,
}


class Glm(DecoderLM):
    model_type, norms = "glm", PRE_NORMS

    @classmethod
    def read_config(cls, hf: ConfigJSON) -> DecoderConfig:
        fields = Fields(hf, model_type=cls.model_type, defaults=DEFAULTS)
        rope = read_rope(fields, partial=0.5, interleaved=True)
        return read_decoder(fields, rope=rope, attention_bias=fields.bool("attention_bias"), norms=cls.norms)


class Glm4(Glm):
    model_type = "glm4"
    norms = NormNames(
        before_attention="input_layernorm",
        after_attention="post_self_attn_layernorm",
        before_mlp="post_attention_layernorm",
        after_mlp="post_mlp_layernorm",
    )
