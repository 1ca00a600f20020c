"""The parameters of a model by name, and the number of heads of a rank. `nanoengine.api` says how they are split."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from nanoengine.api import ModelError, ShardSpec, WeightLayer
from nanoengine.api.sharding import even_share

__all__ = ["heads_per_rank"]


def heads_per_rank(heads: int, size: int, *, replicate: bool = False) -> int:
    """Number of heads on each rank. With `replicate`, fewer heads than ranks are replicated. Raises `ModelError`."""
    try:
        return even_share(heads, 1, 0, size, replicate=replicate)[1]
    except ModelError as error:
        kind = "KV" if replicate else "attention"
        raise ModelError(f"{heads} {kind} heads cannot be divided over tensor_parallel_size={size} ranks") from error


def weight_layers(model: nn.Module, *, shared: bool = False) -> Iterator[tuple[str, WeightLayer, str, ShardSpec]]:
    """(full name, layer, parameter's name in the layer, spec) of every parameter.

    A shared parameter is given once, or, with `shared`, under each of its names. The full name begins with the layer's
    name, not with its path, which is another one if the layer is wrapped. A parameter that is not in a `WeightLayer` (a
    plugin's plain `nn.LayerNorm`) is whole on every rank, and has its path as name.
    """
    seen = set[int]()
    for path, module in model.named_modules():
        layer = module if isinstance(module, WeightLayer) else None
        above = (layer.name if layer else "") or path
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen and not shared:
                continue
            seen.add(id(parameter))
            owner = layer if layer and name in layer.specs else _PlainWeights(name, parameter)
            yield f"{above}.{name}" if above else name, owner, name, owner.specs[name]


def finish_layers(model: nn.Module) -> None:
    """Calls `finish` of every layer, after all parameters are loaded."""
    for layer in model.modules():
        if isinstance(layer, WeightLayer):
            layer.finish()


class _PlainWeights(WeightLayer):
    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.register_parameter(name, parameter)
        self.specs = {name: ShardSpec(shape=tuple(parameter.shape))}
