"""Qwen3, dense. Queries and keys are normalised head by head; the head size stands by itself in the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanoengine.api import ModelError
from nanoengine.layers.decoder import DecoderConfig, DecoderLM
from nanoengine.layers.hf_config import Fields
from nanoengine.layers.rope import read_rope


class Qwen3(DecoderLM):
    @classmethod
    def read_config(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        fields = Fields(hf)
        fields.choice("hidden_act", ["silu"], "silu")
        fields.refuse("quantization_config")
        fields.refuse("use_sliding_window", False)
        if set(hf.get("layer_types") or ()) - {"full_attention"}:
            raise ModelError("config.json: layer_types other than full_attention are not served by this model")
        heads = fields.int("num_attention_heads")
        return DecoderConfig(
            vocab_size=fields.int("vocab_size"),
            hidden_size=fields.int("hidden_size"),
            max_model_len=fields.int("max_position_embeddings"),
            num_layers=fields.int("num_hidden_layers"),
            intermediate_size=fields.int("intermediate_size"),
            num_heads=heads,
            num_kv_heads=fields.int("num_key_value_heads", heads),
            head_size=fields.int("head_dim"),
            eps=fields.float("rms_norm_eps"),
            rope=read_rope(hf),
            tied=fields.bool("tie_word_embeddings", False),
            attention_bias=fields.bool("attention_bias", False),
            qk_norm=True,
        )
