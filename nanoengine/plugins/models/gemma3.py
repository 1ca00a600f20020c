"""Gemma 3, its text part. Five local layers to one global, with rotations of their own; queries and keys normalised.

A checkpoint with images nests the text model's fields and weights; the weights of the rest are passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nanoengine.layers.decoder import DECODER_WEIGHTS, DecoderConfig, DecoderLM, read_decoder
from nanoengine.layers.hf_config import Fields, layer_windows
from nanoengine.layers.rope import RopeConfig, read_rope
from nanoengine.plugins.models.gemma2 import family_traits

# What files may leave out, and those with images do.
_DEFAULTS = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
}
_THETA, _LOCAL_THETA = 1e6, 1e4
_OTHER_PARTS = ("vision_tower.", "multi_modal_projector.")  # below "model." in files of transformers 5
_PATTERN = 6  # the last of so many layers is global


class Gemma3(DecoderLM):
    @classmethod
    def read_config(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        return read_text_config(hf)


class Gemma3WithImages(DecoderLM):
    """Text in, text out."""

    weights = replace(
        DECODER_WEIGHTS,
        skip_prefixes=tuple(f"{above}{part}" for above in ("", "model.") for part in _OTHER_PARTS),
    )

    @classmethod
    def read_config(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        whole, text = Fields(hf), Fields(hf.get("text_config"), "text_config.")
        whole.refuse("quantization_config")
        tied = whole.bool("tie_word_embeddings", text.bool("tie_word_embeddings", True))
        return read_text_config({**text.data, "tie_word_embeddings": tied}, text.prefix)


def read_text_config(hf: Mapping[str, Any], prefix: str = "") -> DecoderConfig:
    fields = Fields({**_DEFAULTS, **hf}, prefix)
    fields.refuse("attn_logit_softcapping")  # null in every checkpoint, and ignored by transformers
    # the second name is that of files written by transformers 5
    pattern = fields.int("sliding_window_pattern", fields.int("_sliding_window_pattern", _PATTERN))
    windows = layer_windows(
        fields, fields.int("num_hidden_layers"), fields.int("sliding_window"), lambda layer: (layer + 1) % pattern != 0
    )
    rope, local_rope = _ropes(hf)
    return read_decoder(
        fields, **family_traits(fields), qk_norm=True, windows=windows, rope=rope, local_rope=local_rope
    )


def _ropes(hf: Mapping[str, Any]) -> tuple[RopeConfig, RopeConfig]:
    """Of global and of local layers: each its own parameters (transformers 5), or two thetas and one scaling."""
    kinds = hf.get("rope_parameters")
    if kinds is not None:
        each = Fields(kinds, "rope_parameters.")
        full, local = each.data.get("full_attention") or {}, each.data.get("sliding_attention") or {}
        return (
            read_rope({"rope_parameters": {"rope_theta": _THETA, **full}}),
            read_rope({"rope_parameters": {"rope_theta": _LOCAL_THETA, **local}}),
        )
    full = {"rope_theta": hf.get("rope_theta") or _THETA, "rope_scaling": hf.get("rope_scaling")}
    return read_rope(full), RopeConfig(theta=Fields(hf).float("rope_local_base_freq", _LOCAL_THETA))
