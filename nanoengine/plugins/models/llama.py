"""Llama 2, 3, 3.1, 3.2 and models of their architecture (SmolLM2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanoengine.api import ModelError
from nanoengine.layers.decoder import DecoderConfig, DecoderLM
from nanoengine.layers.hf_config import Fields
from nanoengine.layers.rope import read_rope


class Llama(DecoderLM):
    @classmethod
    def read_config(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        fields = Fields(hf)
        fields.choice("hidden_act", ["silu"], "silu")
        fields.refuse("quantization_config")
        hidden, heads = fields.int("hidden_size"), fields.int("num_attention_heads")
        if hf.get("head_dim") is None and hidden % heads:
            raise ModelError(f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
        return DecoderConfig(
            vocab_size=fields.int("vocab_size"),
            hidden_size=hidden,
            max_model_len=fields.int("max_position_embeddings"),
            num_layers=fields.int("num_hidden_layers"),
            intermediate_size=fields.int("intermediate_size"),
            num_heads=heads,
            num_kv_heads=fields.int("num_key_value_heads", heads),
            head_size=fields.int("head_dim", hidden // heads),
            eps=fields.float("rms_norm_eps"),
            rope=read_rope(hf),
            tied=fields.bool("tie_word_embeddings", False),
            attention_bias=fields.bool("attention_bias", False),
            mlp_bias=fields.bool("mlp_bias", False),
        )
