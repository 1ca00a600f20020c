"""Granite 3 and later, dense: Llama with factors of the embedding, the scores, the residual stream and the logits."""

from __future__ import annotations

from nanoengine.layers.decoder import DecoderConfig, DecoderLM, read_decoder
from nanoengine.layers.hf_config import ConfigJSON, Fields
from nanoengine.plugins.models import llama

# Defaults of transformers' GraniteConfig: Llama's, and the factors.
DEFAULTS = {
    **llama.DEFAULTS,
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}


class Granite(DecoderLM):
    @classmethod
    def read_config(cls, hf: ConfigJSON) -> DecoderConfig:
        fields = Fields(hf, model_type="granite", defaults=DEFAULTS)
        return read_decoder(
            fields,
            attention_bias=fields.bool("attention_bias"),
            output_bias=fields.bool("attention_bias"),
            mlp_bias=fields.bool("mlp_bias"),
            embedding_scale=fields.float("embedding_multiplier"),
            score_scale=fields.float("attention_multiplier"),
            residual_scale=fields.float("residual_multiplier"),
            logit_scale=1 / fields.float("logits_scaling"),
        )
