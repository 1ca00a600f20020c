"""DeepSeek-V3 and R1, Moonlight: V2 with sigmoid scores, which a parameter corrects for the choice of experts."""

from __future__ import annotations

from dataclasses import replace

from nanoengine.api import WeightMap
from nanoengine.layers.decoder import DecoderConfig
from nanoengine.layers.hf_config import ConfigJSON, Fields
from nanoengine.layers.moe import MoEConfig, MoEDecoderLM, Routing
from nanoengine.plugins.models import deepseek_v2

# The defaults of transformers' DeepseekV3Config for fields that are missing in the file.
DEFAULTS = {
    **deepseek_v2.LATENT,
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rope_interleave": True,
}


class DeepseekV3(MoEDecoderLM):
    @classmethod
    def read_config(cls, hf: ConfigJSON) -> MoEConfig:
        fields = Fields(hf, model_type="deepseek_v3", defaults=DEFAULTS, names=deepseek_v2.NAMES)
        fields.refuse("scoring_func", "sigmoid")
        fields.refuse("topk_method", "noaux_tc")
        fields.unused("num_nextn_predict_layers", "num_mtp_layers")
        routing = Routing(
            top_k=fields.int("num_experts_per_tok"),
            scoring="sigmoid",
            renormalise=fields.bool("norm_topk_prob", False),
            groups=fields.int("n_group"),
            top_groups=fields.int("topk_group"),
            group_best=2,
            scale=fields.float("routed_scaling_factor"),
        )
        return deepseek_v2.read(fields, routing, interleaved=fields.bool("rope_interleave", False), correction=True)

    @classmethod
    def weight_map(cls, config: DecoderConfig) -> WeightMap:
        """Files have one more layer, which predicts the token after the next."""
        more = f"layers.{config.num_layers}."
        return replace(super().weight_map(config), skip_prefixes=(more, f"model.{more}"))
