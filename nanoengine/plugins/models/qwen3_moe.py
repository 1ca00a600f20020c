"""Qwen3 with experts (Qwen3-30B-A3B, Qwen3-235B-A22B). Some layers may be dense."""

from __future__ import annotations

from nanoengine.layers.decoder import read_decoder
from nanoengine.layers.hf_config import ConfigJSON, Fields, used_window
from nanoengine.layers.moe import MoEConfig, MoEDecoderLM
from nanoengine.plugins.models import qwen2_moe

# The defaults of transformers' Qwen3MoeConfig for fields that are missing in the file.
DEFAULTS = {
    **qwen2_moe.DEFAULTS,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "attention_bias": False,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
    "num_experts": 128,
}


class Qwen3MoE(MoEDecoderLM):
    @classmethod
    def read_config(cls, hf: ConfigJSON) -> MoEConfig:
        fields = Fields(hf, model_type="qwen3_moe", defaults=DEFAULTS)
        fields.unused("max_window_layers")  # it is not transformers' for this family
        bias, window = fields.bool("attention_bias"), used_window(fields)
        return read_decoder(
            fields,
            into=MoEConfig,
            attention_bias=bias,
            output_bias=bias,
            qk_norm=True,
            windows=(window,) * fields.int("num_hidden_layers"),
            **qwen2_moe.read_experts(fields),
        )
