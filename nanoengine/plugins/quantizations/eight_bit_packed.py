"""The method of INT8 weights that a file has in words of 32 bits: compressed-tensors' format "pack-quantized"."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nanoengine.api import ModelError, Shard, ShardSpec, WeightLayer
from nanoengine.layers.quantised import divided, dummy_bits, one_each
from nanoengine.plugins.quantizations.eight_bit import EightBitLinear, Scheme, stored_as

_WORDS, _PER_WORD, _SHAPE = "weight_packed", 4, "weight_shape"


class PackedEightBit(EightBitLinear):
    """`EightBitLinear`, from `weight_packed`, int32 [out, in / 4]: codes plus 128, the first in the lowest bits."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__(scheme)
        self.label = f"{scheme} (pack-quantized)"
        self._spec: ShardSpec | None = None

    def create(self, layer: WeightLayer, weight: ShardSpec) -> None:
        inputs = weight.shape[1]
        if inputs % _PER_WORD:
            raise ModelError(f"{layer.name}: {inputs} inputs are no multiple of {_PER_WORD}, which share a word")
        super().create(layer, weight)
        self._spec = layer.specs.pop("weight")
        delattr(layer, "weight")
        words = replace(divided(layer, weight, inputs=_PER_WORD), dtypes=("I32",))
        layer.add_weight(_WORDS, words, torch.int32)
        for name, spec in one_each(_SHAPE, weight, ShardSpec(shape=(2,), optional=True, dtypes=("I64", "I32"))).items():
            layer.add_weight(name, spec, torch.int64)

    def load(self, layer: WeightLayer, name: str, shard: Shard, values: Tensor) -> None:
        words = dummy_bits(values, torch.int32) if name == _WORDS and values.is_floating_point() else values
        WeightLayer.load_shard(layer, name, shard, words)

    def finish(self, layer: WeightLayer) -> None:
        assert self._spec is not None
        words = layer.get_parameter(_WORDS).data
        codes = words.contiguous().view(torch.uint8).bitwise_xor(128).view(torch.int8)
        for name in [each for each in layer.specs if each == _WORDS or each.partition(":")[0] == _SHAPE]:
            delattr(layer, name)
            del layer.specs[name]
        layer.register_parameter("weight", torch.nn.Parameter(codes, requires_grad=False))
        layer.specs["weight"] = stored_as(self._spec, self.scheme)
        super().finish(layer)
