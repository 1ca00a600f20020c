"""Gemma 2. Norms before and behind attention and MLP, soft caps on scores and logits, every other layer local."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanoengine.layers.decoder import DecoderConfig, DecoderLM, read_decoder
from nanoengine.layers.hf_config import Fields, layer_windows

# What files may leave out; null in a file means no cap.
_DEFAULTS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096}


class Gemma2(DecoderLM):
    @classmethod
    def read_config(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        fields = Fields({**_DEFAULTS, **hf})
        layers = fields.int("num_hidden_layers")
        return read_decoder(
            fields,
            **family_traits(fields),
            windows=layer_windows(fields, layers, fields.int("sliding_window"), lambda layer: layer % 2 == 0),
            score_cap=fields.optional_float("attn_logit_softcapping"),
        )


def family_traits(fields: Fields) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common."""
    fields.choice("hidden_activation", ["gelu_pytorch_tanh"], "gelu_pytorch_tanh")
    fields.refuse("use_bidirectional_attention", False)
    bias = fields.bool("attention_bias", False)
    return {
        "head_size": fields.int("head_dim", 256),
        "tied": fields.bool("tie_word_embeddings", True),
        "attention_bias": bias,
        "output_bias": bias,
        "score_scale": fields.float("query_pre_attn_scalar", 256) ** -0.5,
        "logit_cap": fields.optional_float("final_logit_softcapping"),
        "embedding_scale": fields.int("hidden_size") ** 0.5,
        "activation": "gelu_tanh",
        "unit_offset": True,
        "post_norms": True,
    }
