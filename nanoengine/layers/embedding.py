"""Vocabulary-parallel embedding and output layer. Rank r holds ids [r * n, (r + 1) * n), n = ceil(V / ranks)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from nanoengine.api import Layer, LayerInfo, LinearMethod, ModelError, Shard, ShardSpec, WeightLayer
from nanoengine.api.layers import Placement
from nanoengine.api.parallel import padded_length
from nanoengine.layers.linear import Unquantised

__all__: list[str] = []  # a build context makes these layers


class VocabParallelEmbedding(Layer, WeightLayer):
    """int [T] -> [T, dim]. Each rank looks up its own ids; the rows are summed over ranks."""

    def __init__(
        self, num_embeddings: int, dim: int, *, place: Placement, name: str = "", sources: tuple[str, ...] = ()
    ) -> None:
        WeightLayer.__init__(self, place, name)
        self.info = LayerInfo(
            name=name, kind="embedding", shape=(num_embeddings, dim), parallel="vocabulary", sources=sources
        )
        self.add_weight("weight", ShardSpec(shape=self.info.shape, split="padded"))
        self.rows = padded_length(num_embeddings, self.tp.size)

    def forward(self, input_ids: Tensor) -> Tensor:
        weight = self.get_parameter("weight")
        if self.tp.size == 1:
            return self.ops.embedding(input_ids, weight)
        local = input_ids - self.tp.rank * self.rows
        elsewhere = (local < 0) | (local >= self.rows)
        found = F.embedding(local.masked_fill(elsewhere, 0), weight).masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return self.tp.all_reduce(found)


class ParallelLMHead(Layer, WeightLayer):
    """[R, dim] -> [R, ceil(V / ranks)], the logits of this rank's ids; columns after the vocabulary are -inf.

    With `tied`, the weight is that of an embedding: one parameter with two names, and `method` is not used.
    """

    def __init__(
        self,
        dim: int,
        vocab_size: int,
        *,
        bias: bool,
        place: Placement,
        tied: WeightLayer | None = None,
        method: LinearMethod | None = None,
        name: str = "",
        sources: tuple[str, ...] = (),
    ) -> None:
        WeightLayer.__init__(self, place, name)
        self.info = head_info(name, dim, vocab_size, sources)
        spec = ShardSpec(shape=self.info.shape, split="padded")
        self.method = method or Unquantised()
        if tied is None:
            self.method.create(self, spec)
        elif tied.specs["weight"] != spec:
            raise ModelError(f"cannot tie an output layer {spec.shape} to an embedding {tied.specs['weight'].shape}")
        else:
            self.method = Unquantised()
            self.specs["weight"] = spec
            self.register_parameter("weight", tied.get_parameter("weight"))
        self.bias: Tensor | None
        if bias:
            self.add_weight("bias", ShardSpec(shape=(vocab_size,), split="padded"))
        else:
            self.register_parameter("bias", None)
        self.valid = spec.shards(self.tp.rank, self.tp.size)[0].size // dim
        self.padded = self.valid < padded_length(vocab_size, self.tp.size)

    def load_shard(self, name: str, shard: Shard, values: Tensor) -> None:
        if name == "bias":
            super().load_shard(name, shard, values)
        else:
            self.method.load(self, name, shard, values)

    def finish(self) -> None:
        self.method.finish(self)

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.method.apply(self, hidden, self.bias)
        if self.padded:
            logits[:, self.valid :] = float("-inf")
        return logits


def head_info(name: str, dim: int, vocab_size: int, sources: tuple[str, ...] = ()) -> LayerInfo:
    """The `LayerInfo` of an output layer."""
    return LayerInfo(name=name, kind="head", shape=(vocab_size, dim), parallel="vocabulary", sources=sources)
