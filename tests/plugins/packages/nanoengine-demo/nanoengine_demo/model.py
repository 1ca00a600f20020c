"""A decoder with attention and no feed-forward part: the least that is a model."""

from dataclasses import dataclass

from torch import nn

from nanoengine.api import AttentionLayerSpec, Model, ModelConfig, ModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig(ModelConfig):
    num_layers: int
    num_heads: int


class DemoLayer(nn.Module):
    def __init__(self, config, ctx, index):
        super().__init__()
        width, heads = config.hidden_size, config.num_heads
        self.head_size = width // heads
        name = f"layers.{index}"
        self.norm = nn.LayerNorm(width, dtype=ctx.dtype, device=ctx.device)
        parts = [("q", width), ("k", width), ("v", width)]
        self.qkv = ctx.linear(f"{name}.qkv", width, 3 * width, parallel="column", parts=parts, head_size=self.head_size)
        self.out = ctx.linear(f"{name}.out", width, width, parallel="row")
        mine = heads // ctx.tp.size
        self.attention = ctx.attention(
            f"{name}.attention",
            AttentionLayerSpec(num_heads=mine, num_kv_heads=mine, head_size=self.head_size, scale=self.head_size**-0.5),
        )

    def forward(self, hidden):
        q, k, v = self.qkv(self.norm(hidden)).view(len(hidden), 3, -1, self.head_size).unbind(1)
        return hidden + self.out(self.attention(q, k, v).flatten(1))


class DemoModel(Model):
    @classmethod
    def read_config(cls, hf):
        for key in ("vocab_size", "hidden_size", "max_position_embeddings", "num_layers", "num_heads"):
            if key not in hf:
                raise ModelError(f"config.json: {key} is missing")
        return DemoConfig(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            max_model_len=hf["max_position_embeddings"],
            num_layers=hf["num_layers"],
            num_heads=hf["num_heads"],
        )

    def __init__(self, config, ctx):
        super().__init__(config, ctx)
        self.embed = ctx.embedding("embed", config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DemoLayer(config, ctx, index) for index in range(config.num_layers))
        self.head = ctx.lm_head("head", config.hidden_size, config.vocab_size)

    def forward(self, input_ids, positions, batch):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden

    def compute_logits(self, hidden):
        return self.head(hidden)
