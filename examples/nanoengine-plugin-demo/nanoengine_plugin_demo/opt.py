"""OPT (Zhang et al., 2022): LayerNorm, learned positions, ReLU. Its tensor names are those of transformers.

Layers that may be large are made by `ctx`, which splits them over tensor-parallel ranks. Norms and positions are plain
modules, which are whole on every rank.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from nanoengine.api import AttentionLayerSpec, Model, ModelConfig, WeightMap
from nanoengine.layers.hf_config import Fields

POSITION_OFFSET = 2  # the first rows of the position table are never used


@dataclass(frozen=True, slots=True, kw_only=True)
class OPTConfig(ModelConfig):
    num_layers: int
    num_heads: int
    intermediate_size: int
    tied: bool


class OPTAttention(nn.Module):
    def __init__(self, name, config, ctx):
        super().__init__()
        width, self.head_size = config.hidden_size, config.hidden_size // config.num_heads
        parts = [("q", width), ("k", width), ("v", width)]
        self.qkv_proj = ctx.linear(
            f"{name}.qkv_proj", width, 3 * width, bias=True, parallel="column", parts=parts, head_size=self.head_size
        )
        self.out_proj = ctx.linear(f"{name}.out_proj", width, width, bias=True, parallel="row")
        heads = config.num_heads // ctx.tp.size  # of this rank
        spec = AttentionLayerSpec(
            num_heads=heads, num_kv_heads=heads, head_size=self.head_size, scale=self.head_size**-0.5
        )
        self.attn = ctx.attention(f"{name}.attn", spec)

    def forward(self, x):
        q, k, v = self.qkv_proj(x).view(len(x), 3, -1, self.head_size).unbind(1)  # [T, heads, head_size] each
        return self.out_proj(self.attn(q, k, v).flatten(1))


class OPTLayer(nn.Module):
    def __init__(self, name, config, ctx):
        super().__init__()
        width, middle, place = config.hidden_size, config.intermediate_size, {"device": ctx.device, "dtype": ctx.dtype}
        self.self_attn_layer_norm = nn.LayerNorm(width, **place)
        self.self_attn = OPTAttention(f"{name}.self_attn", config, ctx)
        self.final_layer_norm = nn.LayerNorm(width, **place)
        self.fc1 = ctx.linear(f"{name}.fc1", width, middle, bias=True, parallel="column")
        self.fc2 = ctx.linear(f"{name}.fc2", middle, width, bias=True, parallel="row")

    def forward(self, x):
        x = x + self.self_attn(self.self_attn_layer_norm(x))
        return x + self.fc2(F.relu(self.fc1(self.final_layer_norm(x))))


class OPTDecoder(nn.Module):
    def __init__(self, config, ctx):
        super().__init__()
        name, width, place = "model.decoder", config.hidden_size, {"device": ctx.device, "dtype": ctx.dtype}
        self.embed_tokens = ctx.embedding(f"{name}.embed_tokens", config.vocab_size, width)
        self.embed_positions = nn.Embedding(config.max_model_len + POSITION_OFFSET, width, **place)
        self.layers = nn.ModuleList(OPTLayer(f"{name}.layers.{i}", config, ctx) for i in range(config.num_layers))
        self.final_layer_norm = nn.LayerNorm(width, **place)

    def forward(self, input_ids, positions):
        x = self.embed_tokens(input_ids) + self.embed_positions(positions + POSITION_OFFSET)  # [T, width]
        for layer in self.layers:
            x = layer(x)
        return self.final_layer_norm(x)


class OPT(Model):
    @classmethod
    def read_config(cls, hf):
        fields = Fields(hf)
        hidden, heads = fields.int("hidden_size"), fields.int("num_attention_heads")
        if hidden % heads:
            raise fields.wrong("hidden_size", hidden, f"a multiple of num_attention_heads, {heads}")
        # Options of OPT-350m and Galactica, which this model does not support.
        fields.refuse("word_embed_proj_dim", hidden)
        fields.refuse("do_layer_norm_before", True)
        fields.refuse("enable_bias", True)
        fields.refuse("layer_norm_elementwise_affine", True)
        fields.refuse("_remove_final_layer_norm", False)
        fields.refuse("activation_function", "relu")
        return OPTConfig(
            vocab_size=fields.int("vocab_size"),
            hidden_size=hidden,
            max_model_len=fields.int("max_position_embeddings"),
            num_layers=fields.int("num_hidden_layers"),
            num_heads=heads,
            intermediate_size=fields.int("ffn_dim"),
            tied=fields.bool("tie_word_embeddings", True),
        )

    @classmethod
    def weight_map(cls, config):
        ties = {"lm_head.weight": "model.decoder.embed_tokens.weight"} if config.tied else {}
        return WeightMap(fuse={f"{part}_proj": ("qkv_proj", part) for part in "qkv"}, ties=ties)

    def __init__(self, config, ctx):
        super().__init__(config, ctx)
        decoder = OPTDecoder(config, ctx)
        self.model = nn.ModuleDict({"decoder": decoder})  # as it is nested in the checkpoint
        tied = decoder.embed_tokens if config.tied else None
        self.lm_head = ctx.lm_head("lm_head", config.hidden_size, config.vocab_size, tied=tied)

    def forward(self, input_ids, positions, batch):
        return self.model["decoder"](input_ids, positions)

    def compute_logits(self, hidden):
        return self.lm_head(hidden)
