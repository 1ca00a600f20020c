"""Self-attention of decoders: a fused product for q, k and v, their norms, their rotation, and the output product."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanoengine.api import AttentionLayerSpec, BuildContext, HeadNorms, KVCacheView, Norm, ShardSpec, WeightLayer
from nanoengine.layers.block import After, Sublayer, finished
from nanoengine.layers.linear import name_next_norm, normed
from nanoengine.layers.norm import SharedRMSNorm, norm_shared
from nanoengine.layers.rope import Angles
from nanoengine.layers.sharding import heads_per_rank

if TYPE_CHECKING:
    from nanoengine.layers.decoder import DecoderConfig

__all__ = ["AttentionSinks", "DecoderAttention"]


class AttentionSinks(WeightLayer):
    """A score of each head that takes part in the softmax and has no value.

    weight: [heads of this rank]; checkpoints have it as `self_attn.sinks`.
    """

    weight: Tensor

    def __init__(self, num_heads: int, place: BuildContext, name: str = "") -> None:
        super().__init__(place, name)
        self.add_weight("weight", ShardSpec(shape=(num_heads,), split="even"))


class DecoderAttention(Sublayer):
    """Self-attention of a decoder. Heads are split over ranks.

    Args:
        name: dotted path in the model. window: the layer's attention window; None: it attends to all positions.
        norms: of q and of k, before the rotation: of [T, heads, head_size], or `SharedRMSNorm` of all heads together.
    """

    def __init__(
        self,
        name: str,
        config: DecoderConfig,
        ctx: BuildContext,
        window: int | None = None,
        *,
        norms: tuple[Norm, Norm] | None = None,
    ) -> None:
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
        self.sinks = AttentionSinks(config.num_heads, ctx, f"{name}.sinks") if config.sinks else None
        self.attn = ctx.attention(f"{name}.attn", self.attention_spec(config, window))
        self.qk_norm, self.ops = norms is not None, ctx.ops
        if norms is not None:
            self.q_norm, self.k_norm = norms

    def attention_spec(self, config: DecoderConfig, window: int | None) -> AttentionLayerSpec:
        """What the attention layer is asked to do; heads are those of this rank."""
        return AttentionLayerSpec(
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_size=self.head_size,
            scale=self.head_size**-0.5 if config.score_scale is None else config.score_scale,
            window=window,
            soft_cap=config.score_cap,
            sinks=None if self.sinks is None else self.sinks.weight,
        )

    def forward(self, hidden: Tensor, angles: Angles) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        return self.o_proj(self.mix(self.qkv_proj(hidden), angles))

    def joined(
        self, norm: Norm | None, x: Tensor, residual: Tensor | None, *rest: Any, after: After | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if norm is None:
            return super().joined(norm, x, residual, *rest, after=after)
        qkv, stream = normed(self.qkv_proj, norm, x, residual)
        mixed, wanted = self.mix(qkv, *rest), rest[0].wanted
        if wanted is not None:
            mixed, stream = mixed.index_select(0, wanted), stream.index_select(0, wanted)
        return finished(self.o_proj, mixed, stream, after)

    def name_next_norm(self, norm: Norm) -> None:
        name_next_norm(self.o_proj, norm)

    def mix(self, qkv: Tensor, angles: Angles) -> Tensor:
        """What tokens take from the tokens before them: [T, (heads + 2 kv_heads) * head_size] -> [T, heads * size]."""
        mixed = self._from_qkv(qkv, angles) if self.ops.attends_qkv else None
        if mixed is None:
            cache = self.attn.kv_cache() if self.ops.stores_kv else None
            mixed = self._plainly(qkv, angles) if cache is None else self._fused(qkv, angles, cache)
        return mixed.flatten(1)

    def _from_qkv(self, qkv: Tensor, angles: Angles) -> Tensor | None:
        """All in the backend's kernel. None: it does not do this step so, or the norms are not of single heads."""
        norms = None
        if self.qk_norm:
            if not self.q_norm.rms:
                return None
            norms = HeadNorms(q=self.q_norm.weight, k=self.k_norm.weight, eps=self.q_norm.eps)
        return self.attn.attend_qkv(qkv, angles.rotation, norms)

    def _fused(self, qkv: Tensor, angles: Angles, cache: KVCacheView) -> Tensor:
        """Norm, rotation and store in one kernel; then the backend only attends."""
        norms: dict[str, Any] = {}
        if self.qk_norm and self.q_norm.rms:
            norms = {"q_weight": self.q_norm.weight, "k_weight": self.k_norm.weight, "eps": self.q_norm.eps}
        elif self.qk_norm:
            q, k, v = self._heads(qkv)
            qkv = torch.cat((*self._normalised(q, k), v), dim=1).flatten(1)
        q = self.ops.qk_norm_rope_store(
            qkv,
            angles.positions,
            angles.inv_freq,
            cache.k,
            cache.v,
            cache.slot_mapping,
            magnitude=angles.rope.magnitude,
            interleaved=angles.rope.interleaved,
            **norms,
        )
        return self.attn.attend(q)

    def _plainly(self, qkv: Tensor, angles: Angles) -> Tensor:
        if self.qk_norm:
            q, k, v = self._heads(qkv)
            q, k = self._normalised(q, k)
            q, k = angles.rotate(q), angles.rotate(k)
        else:
            heads = qkv.view(len(qkv), -1, self.head_size)
            qk, v = heads.split_with_sizes((self.heads + self.kv_heads, self.kv_heads), dim=1)
            q, k = angles.rotate(qk).split_with_sizes((self.heads, self.kv_heads), dim=1)
        out: Tensor = self.attn(q, k, v)
        return out

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [T, heads, head_size], k and v [T, kv_heads, head_size]."""
        heads = qkv.view(len(qkv), -1, self.head_size)
        q, k, v = heads.split_with_sizes((self.heads, self.kv_heads, self.kv_heads), dim=1)
        return q, k, v

    def _normalised(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.q_norm, SharedRMSNorm) and isinstance(self.k_norm, SharedRMSNorm):
            flat = norm_shared([self.q_norm, self.k_norm], [q.flatten(1), k.flatten(1)])
            return flat[0].view(q.shape), flat[1].view(k.shape)
        return self.q_norm(q), self.k_norm(k)
