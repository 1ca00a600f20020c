"""GPT-2: learned positions, LayerNorm, biases, an MLP without a gate. Its files hold transposed weights."""

from __future__ import annotations

from torch import Tensor, nn

from nanoengine.api import BuildContext, WeightMap, WeightRule
from nanoengine.layers.decoder import DecoderConfig, DecoderLM, NormNames, read_decoder
from nanoengine.layers.hf_config import ConfigJSON, Fields

# Defaults of transformers' GPT2Config.
DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
NAMES = {
    "max_position_embeddings": "n_positions",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "hidden_act": "activation_function",
    "rms_norm_eps": "layer_norm_epsilon",
}


class GPT2(DecoderLM):
    weights = WeightMap(
        rename={"": "model.", "transformer.": "model.", "lm_head.": "lm_head."},
        rules={
            "wte": "embed_tokens",
            "model.wpe": "embed_positions",
            "ln_f": "norm",
            "h.{}.ln_1": "layers.{}.ln_1",
            "h.{}.ln_2": "layers.{}.ln_2",
            "h.{}.attn.c_attn": WeightRule("layers.{}.self_attn.qkv_proj", ("q", "k", "v"), transpose=True),
            "h.{}.attn.c_proj": WeightRule("layers.{}.self_attn.o_proj", transpose=True),
            "h.{}.mlp.c_fc": WeightRule("layers.{}.mlp.up_proj", transpose=True),
            "h.{}.mlp.c_proj": WeightRule("layers.{}.mlp.down_proj", transpose=True),
        },
        skip=(".attn.bias", ".attn.masked_bias"),  # the causal mask, in older files
    )

    @classmethod
    def read_config(cls, hf: ConfigJSON) -> DecoderConfig:
        fields = Fields(hf, model_type="gpt2", defaults=DEFAULTS, names=NAMES)
        fields.refuse("scale_attn_by_inverse_layer_idx", False)
        fields.unused("reorder_and_upcast_attn", "n_ctx")
        return read_decoder(
            fields,
            num_kv_heads=fields.int("num_attention_heads"),
            intermediate_size=fields.int("n_inner", 4 * fields.int("n_embd")),
            score_scale=None if fields.bool("scale_attn_weights") else 1.0,
            rope=None,
            attention_bias=True,
            output_bias=True,
            mlp_bias=True,
            gated=False,
            norm="layer",
            norm_bias=True,
            norms=NormNames(before_attention="ln_1", before_mlp="ln_2"),
        )

    def __init__(self, config: DecoderConfig, ctx: BuildContext) -> None:
        super().__init__(config, ctx)
        sizes = config.max_model_len, config.hidden_size
        self.embed_positions = nn.Embedding(*sizes, device=ctx.device, dtype=ctx.dtype)

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        embedded: Tensor = super().embed(input_ids, positions) + self.embed_positions(positions)
        return embedded
