"""GPT-OSS (20b, 120b): experts with biases and clamped gates, sinks, a window in every second layer, YaRN."""

from __future__ import annotations

from nanoengine.layers.decoder import read_decoder
from nanoengine.layers.hf_config import ConfigJSON, Fields, layer_windows
from nanoengine.layers.moe import MoEConfig, MoEDecoderLM, Routing, moe_weights, read_experts_info
from nanoengine.plugins.models import mixtral

YARN = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
# The defaults of transformers' GptOssConfig for fields that are missing in the file.
DEFAULTS = {
    **mixtral.DEFAULTS,
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "head_dim": 64,
    "sliding_window": 128,
    "num_experts_per_tok": 4,
    "num_local_experts": 128,
    "attention_bias": True,
    "rope_theta": 150000.0,
    "rope_parameters": YARN,
}


class GptOss(MoEDecoderLM):
    weights = moe_weights(router="router", transposed=True, interleaved=True)

    @classmethod
    def read_config(cls, hf: ConfigJSON) -> MoEConfig:
        fields = Fields(hf, model_type="gpt_oss", defaults=DEFAULTS)
        fields.refuse("swiglu_alpha", 1.702)  # those of the activation
        fields.refuse("swiglu_limit", 7.0)
        fields.unused("experts_per_token", "initial_context_length")  # transformers reads other names
        bias, layers = fields.bool("attention_bias"), fields.int("num_hidden_layers")
        return read_decoder(
            fields,
            into=MoEConfig,
            windows=layer_windows(fields, layers, fields.int("sliding_window"), lambda layer: layer % 2 == 0),
            attention_bias=bias,
            output_bias=bias,
            sinks=True,
            experts=read_experts_info(fields, fields.int("intermediate_size"), activation="swiglu_clamped", bias=True),
            routing=Routing(top_k=fields.int("num_experts_per_tok"), scoring="softmax_of_top"),
            router_bias=True,
        )
