"""Command-R: attention and MLP side by side after one LayerNorm without bias, neighbours rotated, logits scaled."""

from __future__ import annotations

from nanoengine.layers.decoder import DecoderConfig, DecoderLM, NormNames, read_decoder
from nanoengine.layers.hf_config import ConfigJSON, Fields
from nanoengine.layers.rope import read_rope

# Defaults of transformers' CohereConfig.
DEFAULTS = {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "logit_scale": 0.0625,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "use_qk_norm": False,
}
_THETA = 500000.0


class Cohere(DecoderLM):
    @classmethod
    def read_config(cls, hf: ConfigJSON) -> DecoderConfig:
        fields = Fields(hf, model_type="cohere", defaults=DEFAULTS, names={"rms_norm_eps": "layer_norm_eps"})
        bias = fields.bool("attention_bias")
        return read_decoder(
            fields,
            rope=read_rope(fields, _THETA, interleaved=True),
            attention_bias=bias,
            output_bias=bias,
            qk_norm=fields.bool("use_qk_norm"),
            qk_norm_over="each_head",
            norm="layer",
            norms=NormNames(before_attention="input_layernorm"),
            parallel=True,
            logit_scale=fields.float("logit_scale"),
        )
