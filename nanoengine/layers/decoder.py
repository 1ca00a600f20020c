"""The decoder that most model families share, open at its joints.

A family with other options is a config mapping and a weight map. One with other parts overrides what makes them: the
`make_...` methods of `DecoderLM`.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from nanoengine.api import BuildContext, ForwardBatch, Model, Norm, WeightMap
from nanoengine.layers.attention import DecoderAttention
from nanoengine.layers.block import After, Sublayer, joined, read_stream
from nanoengine.layers.decoder_config import (
    ACTIVATIONS,
    PLAIN_ACTIVATIONS,
    POST_NORMS,
    PRE_NORMS,
    SANDWICH_NORMS,
    DecoderConfig,
    DecoderTraits,
    NormNames,
    read_decoder,
)
from nanoengine.layers.latent import LatentAttention
from nanoengine.layers.mlp import MLP, GatedMLP
from nanoengine.layers.norm import LayerNorm, RMSNorm, SharedRMSNorm
from nanoengine.layers.rope import Angles, Rope, RopeConfig, RotaryEmbedding

__all__ = [
    "ACTIVATIONS",
    "DECODER_WEIGHTS",
    "PLAIN_ACTIVATIONS",
    "POST_NORMS",
    "PRE_NORMS",
    "SANDWICH_NORMS",
    "Decoder",
    "DecoderAttention",
    "DecoderConfig",
    "DecoderLM",
    "DecoderLayer",
    "DecoderTraits",
    "NormNames",
    "read_decoder",
]

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
    rules={"self_attn.sinks": "self_attn.sinks.weight"},
    # tables of the rotation in older files, with any prefix; the rotation is computed from config.json instead
    skip=("inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached"),
)


class DecoderLayer(nn.Module):
    """Attention and MLP with their norms. Submodules have the names that checkpoints use.

    Args:
        name: dotted path in the model. index: of the layer. make: makes the parts.
    """

    def __init__(self, name: str, index: int, config: DecoderConfig, ctx: BuildContext, make: DecoderLM) -> None:
        super().__init__()
        self.names, self.parallel, self.scale = config.norms, config.parallel, config.residual_scale
        self.self_attn = make.make_attention(f"{name}.self_attn", index, config, ctx)
        self.mlp = make.make_mlp(f"{name}.mlp", index, config, ctx)
        names = config.norms
        for own in (names.before_attention, names.after_attention, names.before_mlp, names.after_mlp):
            if own is not None:
                self.add_module(own, make.make_norm(config.hidden_size, config, ctx))

    @property
    def tokenwise(self) -> bool:
        """Whether what follows its attention needs one token at a time. Experts do not: they are given which of all
        tokens are padding."""
        return not self.parallel and type(self.mlp) in (GatedMLP, MLP)

    def _norm(self, name: str | None) -> Norm | None:
        norm: Norm | None = None if name is None else getattr(self, name)
        return norm

    def name_next_norms(self, following: nn.Module | None) -> None:
        """Says what reads the stream after attention and MLP; `following`: the next layer."""
        ends = [(self.self_attn, self._norm(self.names.before_mlp))]
        if isinstance(following, DecoderLayer):
            ends.append((self.mlp, following._norm(following.names.before_attention)))
        for part, norm in ends:
            if isinstance(part, Sublayer) and norm is not None and not self.parallel:
                part.name_next_norm(norm)

    def forward(self, x: Tensor, residual: Tensor | None, angles: Angles) -> tuple[Tensor, Tensor | None]:
        """[T, hidden] -> [T, hidden]: (x, residual stream) -> (result, residual stream).

        x and the result still have to be added to the residual stream; if the stream is None, x is the stream.
        """
        names = self.names
        before = self._norm(names.before_attention)
        if self.parallel:
            hidden, residual = read_stream(before, x, residual)
            second = self._norm(names.before_mlp)
            out: Tensor = self.self_attn(hidden, angles) + self.mlp(hidden if second is None else second(residual))
            return (out if self.scale == 1.0 else out * self.scale), residual
        x, residual = joined(self.self_attn, before, x, residual, angles, after=self._after(names.after_attention))
        return joined(self.mlp, self._norm(names.before_mlp), x, residual, after=self._after(names.after_mlp))

    def _after(self, name: str | None) -> After | None:
        """What is done to a result before it is added to the residual stream."""
        norm, scale = self._norm(name), self.scale
        if scale == 1.0:
            return norm
        return lambda x: (x if norm is None else norm(x)) * scale


class Decoder(nn.Module):
    """Embedding, layers and final norm, under the names that checkpoints use."""

    def __init__(self, config: DecoderConfig, ctx: BuildContext, make: DecoderLM) -> None:
        super().__init__()
        self.embed_tokens = ctx.embedding("model.embed_tokens", config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            make.make_layer(f"model.layers.{i}", i, config, ctx) for i in range(config.num_layers)
        )
        for layer, following in pairwise([*self.layers, None]):
            if isinstance(layer, DecoderLayer):
                layer.name_next_norms(following)
        self.norm = make.make_norm(config.hidden_size, config, ctx)
        ropes = [make.layer_rope(i, config) for i in range(config.num_layers)]
        kinds = list(dict.fromkeys([config.rope, *ropes]))  # most models have one
        self.rope_of = [kinds.index(rope) for rope in ropes]
        self._names = [f"rotary_emb{i or ''}" for i in range(len(kinds))]
        for own, rope in zip(self._names, kinds, strict=True):
            made = Rope(frequencies=()) if rope is None else rope
            self.add_module(own, RotaryEmbedding(made, config.head_size, ctx.device, ctx.max_model_len))

    def forward(self, x: Tensor, positions: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Embedded tokens [T, hidden], positions int64 [T] -> hidden states [T, hidden]; or, if only some tokens are
        wanted, int [L], and the last layer can go on with them alone behind its attention, theirs: [L, hidden]."""
        angles: list[Angles] = [getattr(self, name)(positions) for name in self._names]
        residual: Tensor | None = None
        for layer, kind in zip(self.layers, self.rope_of, strict=True):
            if layer is self.layers[-1] and isinstance(layer, DecoderLayer) and layer.tokenwise:
                angles[kind].wanted = wanted  # no other layer sees it
            x, residual = layer(x, residual, angles[kind])
        out: Tensor = self.norm(x) if residual is None else self.norm(x, residual)[0]
        return out


class DecoderLM(Model):
    """A decoder with its output layer. A subclass reads its config.json into a `DecoderConfig`.

    A subclass that needs other parts overrides the methods that make them. `name` is the dotted path of what is made,
    `index` the number of its layer.
    """

    weights = DECODER_WEIGHTS

    def __init__(self, config: DecoderConfig, ctx: BuildContext) -> None:
        super().__init__(config, ctx)
        self.config, self.ctx = config, ctx
        self.embedding_scale = torch.tensor(config.embedding_scale, dtype=ctx.dtype).item()
        self.logit_scale, self.logit_cap, self.ops = config.logit_scale, config.logit_cap, ctx.ops
        self.model = Decoder(config, ctx, self)
        tied = self.model.embed_tokens if config.tied else None
        sizes = config.hidden_size, config.vocab_size
        self.lm_head = ctx.lm_head("lm_head", *sizes, bias=config.head_bias, tied=tied)

    @classmethod
    def weight_map(cls, config: DecoderConfig) -> WeightMap:
        weights = cls.weights
        if config.latent is not None:  # its queries are not fused with keys and values
            weights = replace(weights, rules={"self_attn.q_proj": "self_attn.q_proj", **weights.rules})
        if not config.tied:
            return weights
        return replace(weights, ties={"lm_head.weight": "model.embed_tokens.weight"})

    def make_layer(self, name: str, index: int, config: Any, ctx: BuildContext) -> nn.Module:
        """A layer: called as `DecoderLayer` is."""
        return DecoderLayer(name, index, config, ctx, self)

    def make_attention(self, name: str, index: int, config: Any, ctx: BuildContext) -> nn.Module:
        """Attention: called with hidden states [T, hidden] and `Angles`, returns [T, hidden]."""
        window = config.windows[index] if config.windows else None
        if config.latent is not None:
            return LatentAttention(name, config, ctx, window)
        return DecoderAttention(name, config, ctx, window, norms=self.make_qk_norms(config, ctx))

    def make_mlp(self, name: str, index: int, config: Any, ctx: BuildContext) -> nn.Module:
        """The MLP: called with hidden states [T, hidden], returns [T, hidden]."""
        kind = GatedMLP if config.gated else MLP
        sizes = config.hidden_size, config.intermediate_size
        return kind(name, *sizes, ctx, bias=config.mlp_bias, activation=config.activation)

    def make_norm(self, size: int, config: Any, ctx: BuildContext) -> Norm:
        """A norm over hidden states, and over heads (`make_qk_norms`)."""
        if config.norm == "layer":
            return LayerNorm(size, config.eps, place=ctx, bias=config.norm_bias)
        return RMSNorm(size, config.eps, place=ctx, unit_offset=config.unit_offset)

    def make_qk_norms(self, config: Any, ctx: BuildContext) -> tuple[Norm, Norm] | None:
        """The norms of q and of k before the rotation; None: there are none. See `DecoderAttention`."""
        if not config.qk_norm:
            return None
        return self._qk_norm(config.num_heads, config, ctx), self._qk_norm(config.num_kv_heads, config, ctx)

    def _qk_norm(self, heads: int, config: Any, ctx: BuildContext) -> Norm:
        size = config.head_size
        if config.qk_norm_over == "all_heads":
            return SharedRMSNorm(heads * size, config.eps, unit=size, place=ctx)
        if config.qk_norm_over == "each_head":
            return LayerNorm((heads, size), config.eps, place=ctx)
        return self.make_norm(size, config, ctx)

    def layer_rope(self, index: int, config: Any) -> RopeConfig | Rope | None:
        """The rotation of a layer; None: there is none."""
        if config.rotated and not config.rotated[index]:
            return None
        local = config.local_rope is not None and bool(config.windows) and config.windows[index] is not None
        rope: RopeConfig | Rope | None = config.local_rope if local else config.rope
        return rope

    def embed(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """int [T], int64 [T] -> [T, hidden]: what the first layer gets."""
        x: Tensor = self.model.embed_tokens(input_ids)
        return x if self.embedding_scale == 1.0 else x * self.embedding_scale

    def forward(self, input_ids: Tensor, positions: Tensor, batch: ForwardBatch) -> Tensor:
        out: Tensor = self.model(self.embed(input_ids, positions), positions, batch.wanted)
        return out

    def compute_logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(hidden)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        return logits if self.logit_cap is None else self.ops.soft_cap(logits, self.logit_cap)
