"""The interface of quantisations: which layers store their weights in fewer bits, and by which method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from nanoengine.api.errors import ModelError
from nanoengine.api.experts import ExpertsMethod
from nanoengine.api.layers import LayerInfo, LinearMethod


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationContext:
    """What a quantisation is made for.

    Attributes:
        name: of its spec.
        config: `quantization_config` of config.json; {}: the checkpoint is plain, and its weights are quantised while
            they are loaded.
        dtype: the model's. device: "cpu" or "cuda". tp_size: number of ranks.
    """

    name: str
    config: Mapping[str, Any]
    dtype: torch.dtype
    device: str
    tp_size: int

    @property
    def online(self) -> bool:
        """Whether a plain checkpoint is quantised while it is loaded."""
        return not self.config


class Quantization(ABC):
    """Base class of quantisations. There is one instance per model and rank, made before the layers.

    Attributes:
        skip: ends of the names of tensors that the format's files may have and nothing here needs.
    """

    skip: tuple[str, ...] = ()

    @classmethod
    @abstractmethod
    def read(cls, ctx: QuantizationContext) -> Self:
        """Reads the config. Raises `ModelError` that names the key and the value that are not supported."""

    @abstractmethod
    def method(self, layer: LayerInfo) -> LinearMethod | ExpertsMethod | None:
        """How a linear layer, embedding, output layer or the experts of a layer store their weights; None: plainly.

        For an embedding, a method that has `rows`; an output layer that is tied to an embedding has the embedding's.
        Raises `ModelError` for a layer that the format quantises and this class does not support.
        """


def is_ignored(layer: LayerInfo, matches: Callable[[str], bool]) -> bool:
    """Whether a list of modules that stay plain has the layer. It goes by the checkpoint's names, one a fused part,
    then by the layer's own: some checkpoints have what is fused here as one tensor.

    Raises `ModelError` if it has some parts of a fused layer only: they share one weight.
    """
    names = layer.sources or (layer.name,)
    plain = [name for name in names if matches(name)]
    if plain and len(plain) < len(names):
        others = [name for name in names if name not in plain]
        raise ModelError(
            f"{layer.name}: the checkpoint leaves {', '.join(plain)} plain and quantises {', '.join(others)}, but they "
            "are fused into one layer here: that is not supported"
        )
    return bool(plain) or matches(layer.name)
