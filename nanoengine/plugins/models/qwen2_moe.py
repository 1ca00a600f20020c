"""Qwen1.5-MoE and Qwen2-MoE: beside its experts, each token goes to a shared one, scaled by a sigmoid."""

from __future__ import annotations

from typing import Any

from nanoengine.layers.decoder import read_decoder
from nanoengine.layers.hf_config import ConfigJSON, Fields, layer_windows
from nanoengine.layers.moe import (
    MoEConfig,
    MoEDecoderLM,
    Routing,
    SharedExperts,
    read_experts_info,
    read_sparse_layers,
)
from nanoengine.plugins.models import qwen2

# The defaults of transformers' Qwen2MoeConfig for fields that are missing in the file.
DEFAULTS = {
    **qwen2.DEFAULTS,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "qkv_bias": True,
    "decoder_sparse_step": 1,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts_per_tok": 4,
    "num_experts": 60,
    "norm_topk_prob": False,
}


class Qwen2MoE(MoEDecoderLM):
    @classmethod
    def read_config(cls, hf: ConfigJSON) -> MoEConfig:
        fields = Fields(hf, model_type="qwen2_moe", defaults=DEFAULTS)
        width = fields.int("shared_expert_intermediate_size")
        return read_decoder(
            fields,
            into=MoEConfig,
            attention_bias=fields.bool("qkv_bias"),
            windows=read_windows(fields),
            shared=SharedExperts(width=width, name="shared_expert", gated=True),
            **read_experts(fields),
        )


def read_windows(fields: Fields) -> tuple[int | None, ...]:
    """The window of each layer: if it is enabled, every second of the first `max_window_layers` has it."""
    layers, last = fields.int("num_hidden_layers"), fields.int("max_window_layers", least=-(2**31))
    used = fields.bool("use_sliding_window")
    fields.unused("sliding_window")  # it has no effect if it is not enabled
    window = fields.int("sliding_window") if used else None
    return layer_windows(fields, layers, window, lambda layer: layer % 2 == 0 and layer < last)


def read_experts(fields: Fields) -> dict[str, Any]:
    """The experts, their routing, and which layers have them."""
    return {
        "experts": read_experts_info(fields, fields.int("moe_intermediate_size")),
        "routing": Routing(top_k=fields.int("num_experts_per_tok"), renormalise=fields.bool("norm_topk_prob")),
        "sparse": read_sparse_layers(fields),
    }
