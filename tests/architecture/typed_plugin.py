"""What a type checker knows of a model plugin: `mypy` checks this file. Each ignored error must be one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_type

from torch import Tensor

from nanoengine.api import BuildContext, Experts, ExpertsInfo, Layer, Linear
from nanoengine.layers.decoder import DecoderConfig, read_decoder
from nanoengine.layers.hf_config import Fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Config(DecoderConfig):
    experts: int


def build(ctx: BuildContext, input_ids: Tensor) -> None:
    layer = ctx.linear("up", 4, 8, parallel="column", parts=[("a", 4), ("b", 4)])
    assert_type(layer, Linear)
    assert_type(layer(input_ids), Tensor)
    assert_type(layer.info.sources, tuple[str, ...])
    assert_type(ctx.embedding("embed", 9, 4), Layer)
    assert_type(ctx.lm_head("head", 4, 9)(input_ids), Tensor)
    assert_type(ctx.max_model_len, int)
    assert_type(ctx.experts("experts", ExpertsInfo(num_experts=4, hidden_size=8, intermediate_size=4)), Experts)
    ctx.experts("experts", 4)  # type: ignore[arg-type]
    layer([1, 2])  # type: ignore[arg-type]
    ctx.linear("up", 4, 8, parallel="rows")  # type: ignore[arg-type]
    ctx.linear("up", 4, 8, reduces=False)  # type: ignore[call-arg]


def read(fields: Fields) -> None:
    assert_type(read_decoder(fields, qk_norm=True), DecoderConfig)
    assert_type(read_decoder(fields, into=Config, experts=4), Config)
    read_decoder(fields, qk_nrom=True)  # type: ignore[call-overload]
    read_decoder(fields, eps="1e-6")  # type: ignore[call-overload]
    read_decoder(fields, into=Fields)  # type: ignore[type-var]
