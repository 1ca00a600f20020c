"""Vocabulary-parallel embedding and output layer. Rank r holds ids [r * n, (r + 1) * n), n = ceil(V / ranks)."""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import Tensor
from torch.nn import Parameter

from nanoengine.api import Layer, LayerInfo, LinearMethod, ModelError, Shard, ShardSpec, WeightLayer
from nanoengine.api.layers import Placement
from nanoengine.api.parallel import padded_length
from nanoengine.kernels.embedding import rows_of_part
from nanoengine.layers.linear import Unquantised

__all__: list[str] = []  # a build context makes these layers


class VocabParallelEmbedding(Layer, WeightLayer):
    """int [T] -> [T, dim]. Each rank looks up its own ids; the rows are summed over ranks."""

    def __init__(
        self,
        num_embeddings: int,
        dim: int,
        *,
        place: Placement,
        method: LinearMethod | None = None,
        name: str = "",
        sources: tuple[str, ...] = (),
    ) -> None:
        WeightLayer.__init__(self, place, name)
        self.info = vocabulary_info(name, "embedding", dim, num_embeddings, sources)
        self.method = method or Unquantised()
        self.method.create(self, ShardSpec(shape=self.info.shape, split="padded"))
        self.rows = padded_length(num_embeddings, self.tp.size)

    def load_shard(self, name: str, shard: Shard, values: Tensor) -> None:
        self.method.load(self, name, shard, values)

    def finish(self) -> None:
        self.method.finish(self)

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.tp.size == 1:
            return self.method.rows(self, input_ids)
        first = self.tp.rank * self.rows
        if type(self.method) is Unquantised:
            weight = self.get_parameter("weight")
            out = self.tp.partial_sum(len(input_ids), weight.shape[1], weight.dtype) if input_ids.dim() == 1 else None
            return self.tp.all_reduce(self.ops.embedding(input_ids, weight, first=first, out=out))
        return self.tp.all_reduce(rows_of_part(partial(self.method.rows, self), input_ids, first, self.rows))


class ParallelLMHead(Layer, WeightLayer):
    """[R, dim] -> [R, ceil(V / ranks)], the logits of this rank's ids; columns after the vocabulary are -inf.

    With `tied`, the weight is that of an embedding: the same parameters with two names, and `method` is not used. A
    checkpoint with a weight of its own for the layer gives it its own parameter.
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
        self.info = vocabulary_info(name, "head", dim, vocab_size, sources)
        spec = ShardSpec(shape=self.info.shape, split="padded")
        self.method = method or Unquantised()
        self._tied: tuple[WeightLayer, ...] = ()  # in a tuple it is no module of this one
        self._shared: dict[str, Parameter] = {}
        if tied is None:
            self.method.create(self, spec)
        else:
            self._tie(tied)
        self.bias: Tensor | None
        if bias:
            self.add_weight("bias", ShardSpec(shape=(vocab_size,), split="padded"))
        else:
            self.register_parameter("bias", None)
        self.valid = spec.shards(self.tp.rank, self.tp.size)[0].size // dim
        self.padded = self.valid < padded_length(vocab_size, self.tp.size)

    def _tie(self, tied: WeightLayer) -> None:
        info: LayerInfo | None = getattr(tied, "info", None)
        shape = tied.specs["weight"].shape if info is None else info.shape
        if shape != self.info.shape:
            raise ModelError(f"cannot tie an output layer {self.info.shape} to an embedding {shape}")
        self.method = getattr(tied, "method", self.method)
        self._tied, self._shared = (tied,), dict(tied.named_parameters(recurse=False))
        for name, parameter in self._shared.items():
            self.specs[name] = tied.specs[name]
            self.register_parameter(name, parameter)

    def load_shard(self, name: str, shard: Shard, values: Tensor) -> None:
        if name == "bias":
            super().load_shard(name, shard, values)
        else:
            self.method.load(self, name, shard, values)

    def finish(self) -> None:
        if any(self.get_parameter(name) is not each for name, each in self._shared.items()):
            self._tied = ()  # the checkpoint has a weight of its own for the layer
        if not self._tied:
            self.method.finish(self)
        elif not isinstance(self.method, Unquantised):  # the embedding finishes its parameters, and may replace them
            for name in self._shared:
                delattr(self, name)
        self._shared = {}

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.method.apply(self._tied[0] if self._tied else self, hidden, self.bias)
        if self.padded:
            logits[:, self.valid :] = float("-inf")
        return logits


def vocabulary_info(
    name: str, kind: Literal["embedding", "head"], dim: int, vocab_size: int, sources: tuple[str, ...] = ()
) -> LayerInfo:
    """The `LayerInfo` of an embedding or output layer."""
    return LayerInfo(name=name, kind=kind, shape=(vocab_size, dim), parallel="vocabulary", sources=sources)
