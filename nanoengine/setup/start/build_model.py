"""Builds a model, with the `BuildContext` that makes its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nanoengine.api.attention import AttentionLayerSpec, KVSpec
from nanoengine.api.checks import check_attention, check_config, check_weight_map
from nanoengine.api.errors import ModelError
from nanoengine.api.model import Attention, Model, ModelConfig, Parallel
from nanoengine.api.parallel import TensorParallelGroup
from nanoengine.api.plugin_calls import name_of, place_and_fix, plugin_call
from nanoengine.kernels.ops import Ops
from nanoengine.layers.embedding import ParallelLMHead, VocabParallelEmbedding
from nanoengine.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from nanoengine.layers.sharding import WeightLayer


class Builder:
    """The `BuildContext` that makes plain layers. It records attention layers in the order in which they are made."""

    def __init__(
        self, tp: TensorParallelGroup, dtype: torch.dtype, device: torch.device, ops: Ops | None = None
    ) -> None:
        self.tp = tp
        self.ops = ops or Ops()
        self.dtype = dtype
        self.device = device
        self.attention_layers: list[Attention] = []

    def linear(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        parallel: Parallel = "replicated",
        parts: Sequence[tuple[str, int]] | None = None,
        head_size: int | None = None,
    ) -> nn.Module:
        try:
            if parallel == "column":
                return ColumnParallelLinear(
                    name, in_features, out_features, bias=bias, parts=parts or (), head_size=head_size, place=self
                )
            if parallel == "row":
                return RowParallelLinear(name, in_features, out_features, bias=bias, head_size=head_size, place=self)
            return ReplicatedLinear(name, in_features, out_features, bias=bias, parts=parts or (), place=self)
        except ModelError as error:
            raise ModelError(f"{name}: {error}") from error

    def embedding(self, name: str, num_embeddings: int, dim: int) -> nn.Module:
        return VocabParallelEmbedding(num_embeddings, dim, place=self)

    def lm_head(
        self, name: str, dim: int, vocab_size: int, *, bias: bool = False, tied: nn.Module | None = None
    ) -> nn.Module:
        if tied is not None and not isinstance(tied, WeightLayer):
            raise ModelError(f"{name}: can be tied to an embedding made by this context, not to {type(tied).__name__}")
        return ParallelLMHead(dim, vocab_size, bias=bias, tied=tied, place=self)

    def attention(self, name: str, spec: AttentionLayerSpec) -> Attention:
        check_attention(name, spec)
        layer = Attention(spec, self.dtype)
        self.attention_layers.append(layer)
        return layer


@dataclass(frozen=True, slots=True)
class BuiltModel:
    """A model whose weights are not loaded yet, its config, and its attention layers in order."""

    model: Model
    config: ModelConfig
    attention_layers: tuple[Attention, ...]


def build_model(
    model_cls: type[Model],
    hf_config: Mapping[str, Any],
    *,
    tp: TensorParallelGroup,
    dtype: torch.dtype,
    device: torch.device | str,
    ops: Ops | None = None,
) -> BuiltModel:
    """Reads the config and makes the layers. `device="meta"` gives shapes and attention needs without memory.

    Raises `ModelError` for a config that is not supported, for heads that cannot be divided over the ranks, and for any
    other error in the model's `read_config`, `weight_map` or `__init__`; the last names the class.
    """
    name = name_of(model_cls)
    with plugin_call(f"{name}.read_config failed", model_cls, ModelError):
        config = model_cls.read_config(hf_config)
        check_config(config, model_cls)
    with plugin_call(f"{name}.weight_map failed", model_cls, ModelError):
        check_weight_map(model_cls.weight_map(config), model_cls)
    builder = Builder(tp, dtype, torch.device(device), ops)
    try:
        with plugin_call(f"{name}.__init__ failed", model_cls, ModelError):
            model = model_cls(config, builder).eval()
    except ModelError as error:  # of a layer that cannot be made as the model requires
        if name in str(error):
            raise
        raise ModelError(f"{error} (in {name}{place_and_fix(error, model_cls)})") from error
    if not builder.attention_layers:
        raise ModelError(
            f"{name} made no attention layer; a model must make them by ctx.attention(name, spec), which have the KV "
            f"cache{place_and_fix(None, model_cls.__init__)}"
        )
    return BuiltModel(model, config, tuple(builder.attention_layers))


def parameter_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def weight_bytes(
    model_cls: type[Model], hf_config: Mapping[str, Any], tp: TensorParallelGroup, dtype: torch.dtype
) -> int:
    """Bytes of a rank's parameters, computed without allocating them."""
    return parameter_bytes(build_model(model_cls, hf_config, tp=tp, dtype=dtype, device="meta").model)


def kv_groups(attention_layers: Sequence[Attention]) -> tuple[tuple[KVSpec, tuple[Attention, ...]], ...]:
    """The KV groups: layers with equal `KVSpec`. Groups and layers are in the order in which the layers were made."""
    groups: dict[KVSpec, list[Attention]] = {}
    for layer in attention_layers:
        groups.setdefault(layer.kv_spec, []).append(layer)
    return tuple((spec, tuple(layers)) for spec, layers in groups.items())
