"""INT8 weights of a plain checkpoint, quantised while it is loaded; what they multiply stays as it is."""

from __future__ import annotations

from typing import Self

from nanoengine.api import ExpertsMethod, LayerInfo, LinearMethod, Quantization, QuantizationContext
from nanoengine.plugins.quantizations.eight_bit import INT8, Scheme
from nanoengine.plugins.quantizations.reading import online_method

_SCHEME = Scheme(dtype=INT8, scales="channel", inputs="plain", online=True)


class Int8(Quantization):
    """A scale an output, symmetric, for all linear layers; embeddings and output layers stay plain."""

    @classmethod
    def read(cls, ctx: QuantizationContext) -> Self:
        return cls()

    def method(self, layer: LayerInfo) -> LinearMethod | ExpertsMethod | None:
        return online_method(layer, _SCHEME)
