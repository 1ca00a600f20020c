"""OLMoE: experts in every layer; queries and keys are normalised over all heads at once."""

from __future__ import annotations

from nanoengine.layers.decoder import read_decoder
from nanoengine.layers.hf_config import ConfigJSON, Fields
from nanoengine.layers.moe import MoEConfig, MoEDecoderLM, Routing, read_experts_info
from nanoengine.plugins.models import olmo2

# Defaults of transformers' OlmoeConfig.
DEFAULTS = {
    **olmo2.DEFAULTS,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "max_position_embeddings": 4096,
    "num_experts_per_tok": 8,
    "num_experts": 64,
    "norm_topk_prob": False,
}


class Olmoe(MoEDecoderLM):
    @classmethod
    def read_config(cls, hf: ConfigJSON) -> MoEConfig:
        fields = Fields(hf, model_type="olmoe", defaults=DEFAULTS)
        fields.refuse("clip_qkv")  # null in all published files
        bias = fields.bool("attention_bias")
        return read_decoder(
            fields,
            into=MoEConfig,
            attention_bias=bias,
            output_bias=bias,
            qk_norm=True,
            qk_norm_over="all_heads",
            experts=read_experts_info(fields, fields.int("intermediate_size")),
            routing=Routing(top_k=fields.int("num_experts_per_tok"), renormalise=fields.bool("norm_topk_prob")),
        )
