"""The pre-norm decoder that many models are: a model on it is a config mapping and a weight map.

The switches are few on purpose; a model that needs more writes its own `Model` from the other layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from nanoengine.api import (
    AttentionLayerSpec,
    BuildContext,
    ForwardBatch,
    KVCacheView,
    Model,
    ModelConfig,
    ModelError,
    WeightMap,
)
from nanoengine.layers.linear import added, normed
from nanoengine.layers.mlp import GatedMLP
from nanoengine.layers.norm import RMSNorm
from nanoengine.layers.rope import Angles, RopeConfig, RotaryEmbedding, apply_rope
from nanoengine.layers.sharding import heads_per_rank

DECODER_WEIGHTS = WeightMap(
    fuse={
        "q_proj": ("qkv_proj", "q"),
        "k_proj": ("qkv_proj", "k"),
        "v_proj": ("qkv_proj", "v"),
        "gate_proj": ("gate_up_proj", "gate"),
        "up_proj": ("gate_up_proj", "up"),
    },
    skip=(".rotary_emb.inv_freq",),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig(ModelConfig):
    """Sizes of a decoder, and its switches.

    Attributes:
        num_layers, intermediate_size, num_heads, num_kv_heads, head_size, eps, rope: as usual.
        tied: the output layer shares the embedding's weight.
        attention_bias: on q, k, v and o. mlp_bias: on gate, up and down.
        qk_norm: q and k are normalised head by head before they are rotated.
    """

    num_layers: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    eps: float
    rope: RopeConfig
    tied: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelError(f"{self.num_heads} attention heads cannot share {self.num_kv_heads} KV heads evenly")


class DecoderAttention(nn.Module):
    """Self-attention with fused q, k, v; heads are split over ranks."""

    def __init__(self, name: str, config: DecoderConfig, ctx: BuildContext) -> None:
        super().__init__()
        size, bias = config.head_size, config.attention_bias
        q, kv = config.num_heads * size, config.num_kv_heads * size
        self.head_size = size
        self.heads = heads_per_rank(config.num_heads, ctx.tp.size)
        self.kv_heads = heads_per_rank(config.num_kv_heads, ctx.tp.size, replicate=True)
        self.qkv_proj = ctx.linear(
            f"{name}.qkv_proj",
            config.hidden_size,
            q + 2 * kv,
            bias=bias,
            parallel="column",
            parts=[("q", q), ("k", kv), ("v", kv)],
            head_size=size,
        )
        self.o_proj = ctx.linear(f"{name}.o_proj", q, config.hidden_size, bias=bias, parallel="row", head_size=size)
        spec = AttentionLayerSpec(num_heads=self.heads, num_kv_heads=self.kv_heads, head_size=size, scale=size**-0.5)
        self.attn = ctx.attention(f"{name}.attn", spec)
        if config.qk_norm:
            self.q_norm = RMSNorm(size, config.eps, place=ctx)
            self.k_norm = RMSNorm(size, config.eps, place=ctx)
        self.qk_norm, self.ops = config.qk_norm, ctx.ops

    def forward(
        self, norm: RMSNorm, x: Tensor, residual: Tensor | None, angles: Angles
    ) -> tuple[Tensor, Tensor | None]:
        """x and the residual stream it is to be added to (None: it is the stream), [T, hidden] -> the same again."""
        qkv, residual = normed(self.qkv_proj, norm, x, residual)  # [T, (heads + 2 kv_heads) * head_size]
        cache = self.attn.kv_cache() if self.ops.stores_kv else None
        mixed = self._plainly(qkv, angles) if cache is None else self._fused(qkv, angles, cache)
        return added(self.o_proj, mixed.flatten(1), residual)

    def _fused(self, qkv: Tensor, angles: Angles, cache: KVCacheView) -> Tensor:
        """Norm, rotation and store in one kernel; then the backend only attends."""
        q = self.ops.qk_norm_rope_store(
            qkv,
            angles.positions,
            angles.inv_freq,
            cache.k,
            cache.v,
            cache.slot_mapping,
            q_weight=self.q_norm.weight if self.qk_norm else None,
            k_weight=self.k_norm.weight if self.qk_norm else None,
            eps=self.q_norm.eps if self.qk_norm else 0.0,
        )
        return self.attn.attend(q)

    def _plainly(self, qkv: Tensor, angles: Angles) -> Tensor:
        cos, sin = angles.tables
        heads = qkv.view(len(qkv), -1, self.head_size)  # [T, heads + 2 kv_heads, head_size]
        qk, v = heads.split_with_sizes((self.heads + self.kv_heads, self.kv_heads), dim=1)
        if self.qk_norm:
            q, k = qk.split_with_sizes((self.heads, self.kv_heads), dim=1)
            q, k = apply_rope(self.q_norm(q), cos, sin), apply_rope(self.k_norm(k), cos, sin)
        else:
            q, k = apply_rope(qk, cos, sin).split_with_sizes((self.heads, self.kv_heads), dim=1)
        out: Tensor = self.attn(q, k, v)
        return out


class DecoderLayer(nn.Module):
    def __init__(self, name: str, config: DecoderConfig, ctx: BuildContext) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.eps, place=ctx)
        self.self_attn = DecoderAttention(f"{name}.self_attn", config, ctx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.eps, place=ctx)
        self.mlp = GatedMLP(f"{name}.mlp", config.hidden_size, config.intermediate_size, ctx, bias=config.mlp_bias)

    def forward(self, x: Tensor, residual: Tensor | None, angles: Angles) -> tuple[Tensor, Tensor | None]:
        """x and the residual stream it is to be added to (None: it is the stream), [T, hidden] -> the same again."""
        x, residual = self.self_attn(self.input_layernorm, x, residual, angles)
        out: tuple[Tensor, Tensor | None] = self.mlp(self.post_attention_layernorm, x, residual)
        return out


class Decoder(nn.Module):
    """Embedding, layers and final norm, under the names that checkpoints use."""

    def __init__(self, config: DecoderConfig, ctx: BuildContext) -> None:
        super().__init__()
        self.embed_tokens = ctx.embedding("model.embed_tokens", config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(f"model.layers.{i}", config, ctx) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.eps, place=ctx)
        self.rotary_emb = RotaryEmbedding(config.rope, config.head_size, ctx.device)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        angles = self.rotary_emb(positions)
        x, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            x, residual = layer(x, residual, angles)
        out: Tensor = self.norm(x) if residual is None else self.norm(x, residual)[0]
        return out


class DecoderLM(Model):
    """A decoder with its output layer. A subclass reads its config.json into a `DecoderConfig`."""

    weights = DECODER_WEIGHTS

    def __init__(self, config: DecoderConfig, ctx: BuildContext) -> None:
        super().__init__(config, ctx)
        self.model = Decoder(config, ctx)
        tied = self.model.embed_tokens if config.tied else None
        self.lm_head = ctx.lm_head("lm_head", config.hidden_size, config.vocab_size, tied=tied)

    @classmethod
    def weight_map(cls, config: DecoderConfig) -> WeightMap:
        if not config.tied:
            return cls.weights
        return replace(cls.weights, ties={"lm_head.weight": "model.embed_tokens.weight"})

    def forward(self, input_ids: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        out: Tensor = self.model(input_ids, positions)
        return out

    def compute_logits(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.lm_head(hidden)
        return out
