"""DeepSeek-V2, V2.5 and V2-Lite: latent attention; experts, in groups or not, and some that all tokens share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nanoengine.layers.decoder import read_decoder
from nanoengine.layers.hf_config import ConfigJSON, Fields
from nanoengine.layers.latent import read_latent
from nanoengine.layers.moe import MoEConfig, MoEDecoderLM, Routing, SharedExperts, read_experts_info
from nanoengine.layers.rope import read_rope
from nanoengine.plugins.models import llama

# The defaults of transformers' DeepseekV2Config, the first ones also DeepseekV3Config's, for missing fields.
LATENT = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
DEFAULTS = {
    **llama.DEFAULTS,
    **LATENT,
    "vocab_size": 102400,
    "moe_intermediate_size": 1407,
    "first_k_dense_replace": 0,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
}
NAMES = {"num_experts": "n_routed_experts"}


class DeepseekV2(MoEDecoderLM):
    @classmethod
    def read_config(cls, hf: ConfigJSON) -> MoEConfig:
        fields = Fields(hf, model_type="deepseek_v2", defaults=DEFAULTS, names=NAMES)
        fields.refuse("scoring_func", "softmax")
        fields.refuse("norm_topk_prob", False)  # transformers ignores it, others do not
        return read(fields, read_routing(fields), mlp_bias=fields.bool("mlp_bias"))


def read_routing(fields: Fields) -> Routing:
    found = Routing(top_k=fields.int("num_experts_per_tok"), scale=fields.float("routed_scaling_factor"))
    if fields.choice("topk_method", ("greedy", "group_limited_greedy")) == "greedy":
        fields.unused("n_group", "topk_group")
        return found
    return replace(found, groups=fields.int("n_group"), top_groups=fields.int("topk_group"))


def read(fields: Fields, routing: Routing, *, interleaved: bool = True, **traits: Any) -> MoEConfig:
    """What all versions have."""
    fields.refuse("moe_layer_freq", 1)
    bias, latent, width = fields.bool("attention_bias"), read_latent(fields), fields.int("moe_intermediate_size")
    dense = fields.int("first_k_dense_replace", least=0)
    return read_decoder(
        fields,
        into=MoEConfig,
        rope=read_rope(fields, width=latent.rotated, interleaved=interleaved),
        latent=latent,
        attention_bias=bias,
        output_bias=bias,
        experts=read_experts_info(fields, width),
        routing=routing,
        sparse=tuple(layer >= dense for layer in range(fields.int("num_hidden_layers"))),
        shared=SharedExperts(width=width * fields.int("n_shared_experts"), bias=traits.get("mlp_bias", False)),
        **traits,
    )
