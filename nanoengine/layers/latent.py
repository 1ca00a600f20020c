"""Multi-head latent attention (DeepSeek-AI, 2024): queries, keys and values from vectors of a low rank.

The cache holds the keys and values of each head, which are computed from the latent vector once, when a token comes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanoengine.api import AttentionLayerSpec, BuildContext, Norm
from nanoengine.layers.block import After, Sublayer, finished, read_stream
from nanoengine.layers.hf_config import Fields
from nanoengine.layers.linear import normed
from nanoengine.layers.norm import RMSNorm
from nanoengine.layers.rope import Angles, RopeConfig
from nanoengine.layers.sharding import heads_per_rank

if TYPE_CHECKING:
    from nanoengine.layers.decoder import DecoderConfig

__all__ = ["LatentAttention", "LatentSizes", "read_latent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSizes:
    """The widths of latent attention.

    Attributes:
        query_rank: of the vector that queries are made of; None: they are made of the hidden state.
        kv_rank: of the vector that keys and values are made of.
        plain, rotated: of a query or key: the elements that are not rotated, and those behind them that are. All heads
            share the rotated ones of the key.
        value: of a value.
        eps: of the norms of the two vectors.
    """

    query_rank: int | None
    kv_rank: int
    plain: int
    rotated: int
    value: int
    eps: float = 1e-6

    @property
    def head_size(self) -> int:
        """Width of a query and of a key."""
        return self.plain + self.rotated


def read_latent(fields: Fields, value: int | None = None) -> LatentSizes:
    """`LatentSizes` from config.json. transformers computes `head_dim` and `qk_head_dim` from the others.

    value: if the file has no `v_head_dim`.
    """
    fields.unused("head_dim", "qk_head_dim")
    return LatentSizes(
        query_rank=fields.int("q_lora_rank") if fields.has("q_lora_rank") else None,
        kv_rank=fields.int("kv_lora_rank"),
        plain=fields.int("qk_nope_head_dim"),
        rotated=fields.int("qk_rope_head_dim"),
        value=value if value and not fields.has("v_head_dim") else fields.int("v_head_dim"),
    )


class LatentAttention(Sublayer):
    """Attention of a decoder with `config.latent`. Heads are split over ranks; the latent vectors are whole on each.

    Args:
        name: dotted path in the model. window: the layer's attention window; None: it attends to all positions.
    """

    def __init__(self, name: str, config: DecoderConfig, ctx: BuildContext, window: int | None = None) -> None:
        super().__init__()
        assert config.latent is not None
        self.sizes = sizes = config.latent
        hidden, heads, bias = config.hidden_size, config.num_heads, config.attention_bias
        self.heads = heads_per_rank(heads, ctx.tp.size)

        def of_heads(own: str, inputs: int, size: int) -> Any:
            return ctx.linear(f"{name}.{own}", inputs, heads * size, parallel="column", head_size=size)

        if sizes.query_rank is None:
            self.q_proj = of_heads("q_proj", hidden, sizes.head_size)
        else:
            self.q_a_proj = ctx.linear(f"{name}.q_a_proj", hidden, sizes.query_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(sizes.query_rank, sizes.eps, place=ctx)
            self.q_b_proj = of_heads("q_b_proj", sizes.query_rank, sizes.head_size)
        width = sizes.kv_rank + sizes.rotated
        self.kv_a_proj_with_mqa = ctx.linear(f"{name}.kv_a_proj_with_mqa", hidden, width, bias=bias)
        self.kv_a_layernorm = RMSNorm(sizes.kv_rank, sizes.eps, place=ctx)
        self.kv_b_proj = of_heads("kv_b_proj", sizes.kv_rank, sizes.plain + sizes.value)
        self.attn = ctx.attention(f"{name}.attn", self.attention_spec(config, window))
        self.o_proj = ctx.linear(
            f"{name}.o_proj", heads * sizes.value, hidden,
            bias=config.output_bias, parallel="row", head_size=sizes.value,
        )  # fmt: skip

    def attention_spec(self, config: DecoderConfig, window: int | None) -> AttentionLayerSpec:
        """What the attention layer is asked to do; heads are those of this rank."""
        scale = config.score_scale
        if scale is None:
            factor = config.rope.score_factor if isinstance(config.rope, RopeConfig) else 1.0
            scale = self.sizes.head_size**-0.5 * factor
        return AttentionLayerSpec(
            num_heads=self.heads,
            num_kv_heads=self.heads,
            head_size=self.sizes.head_size,
            value_size=self.sizes.value,
            scale=scale,
            window=window,
            soft_cap=config.score_cap,
        )

    def forward(self, hidden: Tensor, angles: Angles) -> Tensor:
        """[T, hidden] -> [T, hidden]."""
        out: Tensor = self.o_proj(self.mix(hidden, angles))
        return out

    def joined(
        self, norm: Norm | None, x: Tensor, residual: Tensor | None, *rest: Any, after: After | None = None
    ) -> tuple[Tensor, Tensor | None]:
        hidden, stream = read_stream(norm, x, residual)
        return finished(self.o_proj, self.mix(hidden, *rest), stream, after)

    def mix(self, hidden: Tensor, angles: Angles) -> Tensor:
        """What tokens take from the tokens before them: [T, hidden] -> [T, heads * value]."""
        sizes, rows = self.sizes, len(hidden)
        if sizes.query_rank is None:
            queries = self.q_proj(hidden)
        else:
            queries, _ = normed(self.q_b_proj, self.q_a_layernorm, self.q_a_proj(hidden), None)
        q, turned = queries.view(rows, self.heads, -1).split_with_sizes((sizes.plain, sizes.rotated), dim=-1)
        latent, shared = self.kv_a_proj_with_mqa(hidden).split_with_sizes((sizes.kv_rank, sizes.rotated), dim=-1)
        kv, _ = normed(self.kv_b_proj, self.kv_a_layernorm, latent, None)
        k, v = kv.view(rows, self.heads, -1).split_with_sizes((sizes.plain, sizes.value), dim=-1)
        of_all = angles.rotate(shared.unsqueeze(1)).expand(-1, self.heads, -1)
        q, k = torch.cat((q, angles.rotate(turned)), dim=-1), torch.cat((k, of_all), dim=-1)
        out: Tensor = self.attn(q, k, v)
        return out.flatten(1)
