"""GPT-NeoX and Pythia: attention and MLP side by side with a norm each; q, k and v of a head beside each other."""

from __future__ import annotations

from dataclasses import replace

from nanoengine.api import WeightMap, WeightRule
from nanoengine.layers.decoder import DecoderConfig, DecoderLM, read_decoder
from nanoengine.layers.hf_config import ConfigJSON, Fields
from nanoengine.layers.rope import read_rope

# Defaults of transformers' GPTNeoXConfig.
DEFAULTS = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "hidden_act": "gelu",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "attention_bias": True,
}
NAMES = {"rms_norm_eps": "layer_norm_eps", "rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


class GPTNeoX(DecoderLM):
    weights = WeightMap(
        rename={"": "model.", "gpt_neox.": "model.", "embed_out.": "lm_head.", "lm_head.": "lm_head."},
        rules={
            "embed_in": "embed_tokens",
            "final_layer_norm": "norm",
            "attention.dense": "self_attn.o_proj",
            "mlp.dense_h_to_4h": "mlp.up_proj",
            "mlp.dense_4h_to_h": "mlp.down_proj",
        },
        skip=(".attention.bias", ".attention.masked_bias", "inv_freq"),  # in older files: they are computed
    )

    @classmethod
    def read_config(cls, hf: ConfigJSON) -> DecoderConfig:
        fields = Fields(hf, model_type="gpt_neox", defaults=DEFAULTS, names=NAMES)
        bias = fields.bool("attention_bias")
        return read_decoder(
            fields,
            rope=read_rope(fields, partial=0.25),
            num_kv_heads=fields.int("num_attention_heads"),
            attention_bias=bias,
            output_bias=bias,
            mlp_bias=True,
            gated=False,
            norm="layer",
            norm_bias=True,
            parallel=fields.bool("use_parallel_residual"),
        )

    @classmethod
    def weight_map(cls, config: DecoderConfig) -> WeightMap:
        given = super().weight_map(config)
        heads = WeightRule("self_attn.qkv_proj", ("q", "k", "v"), groups=config.num_heads)
        return replace(given, rules={**given.rules, "attention.query_key_value": heads})
