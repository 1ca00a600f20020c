"""The pre-norm decoder that many model families share. A model based on it has a config reader and a weight map.

The options are the differences between the built-in families. A model that needs more defines its own `Model` from the
other layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from nanoengine.api import (
    AttentionLayerSpec,
    BuildContext,
    ForwardBatch,
    HeadNorms,
    KVCacheView,
    Model,
    ModelConfig,
    ModelError,
    WeightMap,
)
from nanoengine.kernels.activation import Activation
from nanoengine.layers.hf_config import Fields, layer_windows
from nanoengine.layers.linear import added, normed
from nanoengine.layers.mlp import GatedMLP
from nanoengine.layers.norm import RMSNorm
from nanoengine.layers.rope import Angles, RopeConfig, RotaryEmbedding, apply_rope, read_rope
from nanoengine.layers.sharding import heads_per_rank

DECODER_WEIGHTS = WeightMap(
    fuse={
        "q_proj": ("qkv_proj", "q"),
        "k_proj": ("qkv_proj", "k"),
        "v_proj": ("qkv_proj", "v"),
        "gate_proj": ("gate_up_proj", "gate"),
        "up_proj": ("gate_up_proj", "up"),
    },
    rename={
        # files of a model without the output layer
        "layers.": "model.layers.",
        "embed_tokens.": "model.embed_tokens.",
        "norm.": "model.norm.",
        # files of a model with images: older files, those of transformers 5, and those without the output layer
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "model.language_model.": "model.",
        "language_model.": "model.",
    },
    # tables of the rotation in older files, with any prefix; the rotation is computed from config.json instead
    skip=("inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig(ModelConfig):
    """Sizes and options of a decoder.

    Attributes:
        num_layers, intermediate_size, num_heads, num_kv_heads, head_size, eps, rope: as usual.
        tied: the output layer shares the embedding's weight.
        attention_bias: a bias on q, k and v. output_bias: on o. mlp_bias: on gate, up and down.
        qk_norm: q and k are normalised per head before the rotation.
        windows: each layer's attention window; None: the layer attends to all positions. (): no layer has a window.
        local_rope: rotation in layers with a window, if it differs from `rope`.
        score_scale: factor of the attention scores; None: head_size ** -0.5.
        score_cap, logit_cap: soft caps on attention scores and on the logits.
        embedding_scale: factor of the embedded tokens; it is rounded to the model's dtype first.
        activation: the activation of the MLP's gate.
        unit_offset: checkpoints store norm weights minus one.
        post_norms: the results of attention and MLP are normalised before they are added to the residual stream.
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
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    local_rope: RopeConfig | None = None
    score_scale: float | None = None
    score_cap: float | None = None
    logit_cap: float | None = None
    embedding_scale: float = 1.0
    activation: Activation = "silu"
    unit_offset: bool = False
    post_norms: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"{self.num_heads} attention heads cannot be divided equally over {self.num_kv_heads} KV heads"
            )
        if self.windows and len(self.windows) != self.num_layers:
            raise ModelError(f"{len(self.windows)} attention windows for {self.num_layers} layers")

    def norm(self, size: int, ctx: BuildContext) -> RMSNorm:
        return RMSNorm(size, self.eps, place=ctx, unit_offset=self.unit_offset)


ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""Value of `hidden_act` -> name of the activation here."""

_LARGEST_MODEL = 2**44  # parameters


def read_decoder(fields: Fields, **traits: Any) -> DecoderConfig:
    """Reads a `DecoderConfig` from the fields of config.json that all families share.

    `traits`: attributes that the family sets itself; they override what is read. `fields` has the family's defaults.
    Raises `ModelError` that names the field.
    """
    hidden, heads = fields.int("hidden_size"), fields.int("num_attention_heads")
    if not fields.has("head_dim") and hidden % heads:
        raise ModelError(
            f"config.json: {fields.prefix}hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
        )
    shared: dict[str, Any] = {
        "vocab_size": fields.int("vocab_size"),
        "hidden_size": hidden,
        "max_model_len": fields.int("max_position_embeddings"),
        "num_layers": fields.int("num_hidden_layers"),
        "intermediate_size": fields.int("intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": fields.int("num_key_value_heads", heads),
        "head_size": fields.int("head_dim", hidden // heads),
        "eps": fields.float("rms_norm_eps"),
        "tied": fields.bool("tie_word_embeddings"),
    }
    if "activation" not in traits:
        shared["activation"] = ACTIVATIONS[fields.choice("hidden_act", tuple(ACTIVATIONS))]
    if "windows" not in traits:
        _refuse_windows(fields)
    if "rope" not in traits:
        shared["rope"] = read_rope(fields.data)
    config = DecoderConfig(**{**shared, **traits})
    _check_size(config)
    return config


def _refuse_windows(fields: Fields) -> None:
    """Rejects windows in config.json of a family without them. transformers' cache would apply them nevertheless."""
    if not fields.has("layer_types"):
        fields.refuse("sliding_window")
    layer_windows(fields, fields.int("num_hidden_layers"), None)
    fields.unused("sliding_window")


def _check_size(config: DecoderConfig) -> None:
    """Raises `ModelError` if sizes that are valid separately make a model that is too large."""
    attention = 2 * config.head_size * (config.num_heads + config.num_kv_heads)
    layer = config.hidden_size * (attention + 3 * config.intermediate_size)
    total = config.num_layers * layer + 2 * config.vocab_size * config.hidden_size
    if total > _LARGEST_MODEL:
        raise ModelError(
            f"config.json: hidden_size {config.hidden_size}, intermediate_size {config.intermediate_size}, "
            f"num_hidden_layers {config.num_layers} and the others make {total:.2g} parameters; at most "
            f"{_LARGEST_MODEL:.2g} are possible"
        )


class DecoderAttention(nn.Module):
    """Self-attention with a fused product for q, k and v. Heads are split over ranks."""

    def __init__(self, name: str, config: DecoderConfig, ctx: BuildContext, window: int | None = None) -> None:
        super().__init__()
        size = config.head_size
        q, kv = config.num_heads * size, config.num_kv_heads * size
        self.head_size = size
        self.heads = heads_per_rank(config.num_heads, ctx.tp.size)
        self.kv_heads = heads_per_rank(config.num_kv_heads, ctx.tp.size, replicate=True)
        self.qkv_proj = ctx.linear(
            f"{name}.qkv_proj",
            config.hidden_size,
            q + 2 * kv,
            bias=config.attention_bias,
            parallel="column",
            parts=[("q", q), ("k", kv), ("v", kv)],
            head_size=size,
        )
        self.o_proj = ctx.linear(
            f"{name}.o_proj", q, config.hidden_size, bias=config.output_bias, parallel="row", head_size=size
        )
        spec = AttentionLayerSpec(
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_size=size,
            scale=size**-0.5 if config.score_scale is None else config.score_scale,
            window=window,
            soft_cap=config.score_cap,
        )
        self.attn = ctx.attention(f"{name}.attn", spec)
        if config.qk_norm:
            self.q_norm, self.k_norm = config.norm(size, ctx), config.norm(size, ctx)
        self.qk_norm, self.ops = config.qk_norm, ctx.ops

    def forward(
        self, norm: RMSNorm, x: Tensor, residual: Tensor | None, angles: Angles, post_norm: RMSNorm | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[T, hidden] -> [T, hidden]: (x, residual stream) -> (result, residual stream).

        x and the result still have to be added to the residual stream; if the stream is None, x is the stream.
        `post_norm` normalises the result before it is added.
        """
        qkv, residual = normed(self.qkv_proj, norm, x, residual)  # [T, (heads + 2 kv_heads) * head_size]
        mixed = None
        if self.ops.attends_qkv:
            mixed = self.attn.attend_qkv(qkv, angles.rotation, self._norms())
        if mixed is None:
            cache = self.attn.kv_cache() if self.ops.stores_kv else None
            mixed = self._plainly(qkv, angles) if cache is None else self._fused(qkv, angles, cache)
        return added(self.o_proj, mixed.flatten(1), residual, post_norm)

    def _norms(self) -> HeadNorms | None:
        if not self.qk_norm:
            return None
        return HeadNorms(q=self.q_norm.weight, k=self.k_norm.weight, eps=self.q_norm.eps)

    def _fused(self, qkv: Tensor, angles: Angles, cache: KVCacheView) -> Tensor:
        """Normalises, rotates and stores in one kernel. The backend then only computes the attention."""
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
    """Attention and MLP, each after a norm. Submodules have the names that checkpoints use."""

    def __init__(self, name: str, config: DecoderConfig, ctx: BuildContext, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.input_layernorm = config.norm(config.hidden_size, ctx)
        self.self_attn = DecoderAttention(f"{name}.self_attn", config, ctx, window)
        self.post_attention_layernorm = config.norm(config.hidden_size, ctx)
        self.mlp = GatedMLP(
            f"{name}.mlp",
            config.hidden_size,
            config.intermediate_size,
            ctx,
            bias=config.mlp_bias,
            activation=config.activation,
        )

    def forward(self, x: Tensor, residual: Tensor | None, angles: Angles) -> tuple[Tensor, Tensor | None]:
        """[T, hidden] -> [T, hidden]: (x, residual stream) -> (result, residual stream). The stream may be None."""
        x, residual = self.self_attn(self.input_layernorm, x, residual, angles)
        out: tuple[Tensor, Tensor | None] = self.mlp(self.post_attention_layernorm, x, residual)
        return out


class PostNormDecoderLayer(DecoderLayer):
    """Attention and MLP, each between two norms. Here `post_attention_layernorm` is the norm after attention."""

    def __init__(self, name: str, config: DecoderConfig, ctx: BuildContext, window: int | None = None) -> None:
        super().__init__(name, config, ctx, window)
        self.pre_feedforward_layernorm = config.norm(config.hidden_size, ctx)
        self.post_feedforward_layernorm = config.norm(config.hidden_size, ctx)

    def forward(self, x: Tensor, residual: Tensor | None, angles: Angles) -> tuple[Tensor, Tensor | None]:
        x, residual = self.self_attn(self.input_layernorm, x, residual, angles, self.post_attention_layernorm)
        out: tuple[Tensor, Tensor | None] = self.mlp(
            self.pre_feedforward_layernorm, x, residual, self.post_feedforward_layernorm
        )
        return out


class Decoder(nn.Module):
    """Embedding, layers and final norm, with the names that checkpoints use."""

    def __init__(self, config: DecoderConfig, ctx: BuildContext) -> None:
        super().__init__()
        self.embed_tokens = ctx.embedding("model.embed_tokens", config.vocab_size, config.hidden_size)
        make = PostNormDecoderLayer if config.post_norms else DecoderLayer
        windows = config.windows or (None,) * config.num_layers
        self.layers = nn.ModuleList(make(f"model.layers.{i}", config, ctx, window) for i, window in enumerate(windows))
        self.norm = config.norm(config.hidden_size, ctx)
        self.rotary_emb = RotaryEmbedding(config.rope, config.head_size, ctx.device)
        self.local_rotary_emb: RotaryEmbedding | None = None
        if config.local_rope is not None:
            self.local_rotary_emb = RotaryEmbedding(config.local_rope, config.head_size, ctx.device)
        self.scale = torch.tensor(config.embedding_scale, dtype=ctx.dtype).item()

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        angles = local_angles = self.rotary_emb(positions)
        if self.local_rotary_emb is not None:
            local_angles = self.local_rotary_emb(positions)
        x, residual = self.embed_tokens(input_ids), None
        if self.scale != 1.0:
            x = x * self.scale
        for layer in self.layers:
            x, residual = layer(x, residual, angles if layer.window is None else local_angles)
        out: Tensor = self.norm(x) if residual is None else self.norm(x, residual)[0]
        return out


class DecoderLM(Model):
    """A decoder with its output layer. A subclass reads config.json into a `DecoderConfig`."""

    weights = DECODER_WEIGHTS

    def __init__(self, config: DecoderConfig, ctx: BuildContext) -> None:
        super().__init__(config, ctx)
        self.model = Decoder(config, ctx)
        tied = self.model.embed_tokens if config.tied else None
        self.lm_head = ctx.lm_head("lm_head", config.hidden_size, config.vocab_size, tied=tied)
        self.logit_cap, self.ops = config.logit_cap, ctx.ops

    @classmethod
    def weight_map(cls, config: DecoderConfig) -> WeightMap:
        if not config.tied:
            return cls.weights
        return replace(cls.weights, ties={"lm_head.weight": "model.embed_tokens.weight"})

    def forward(self, input_ids: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        out: Tensor = self.model(input_ids, positions)
        return out

    def compute_logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(hidden)
        return logits if self.logit_cap is None else self.ops.soft_cap(logits, self.logit_cap)
