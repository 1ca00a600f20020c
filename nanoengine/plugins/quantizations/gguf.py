"""Weights in the blocks of a GGUF file, as `model_sources/gguf_convert` writes them: uint8 [out, bytes of a row].

config.json names the type of each module's blocks. The parts of a fused layer may have different types, or none; then
each is a parameter of its own, and a product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nanoengine.api import (
    LayerInfo,
    LinearMethod,
    ModelError,
    Norm,
    Quantization,
    QuantizationContext,
    Shard,
    ShardSpec,
    WeightLayer,
)
from nanoengine.kernels.activation import Activation
from nanoengine.kernels.gguf import BLOCK_TYPES, dequantise, dummy_blocks
from nanoengine.kernels.matmul import Ahead
from nanoengine.layers.linear import Unquantised
from nanoengine.layers.quantised import DUMMY_DEVIATION, divided, dummy_bits
from nanoengine.plugins.quantizations.ahead import next_norm_of
from nanoengine.plugins.quantizations.gguf_stores import Store, store_for

_KEYS = frozenset({"quant_method", "types", "expanded"})


class Gguf(Quantization):
    """Matrices keep the types that they have in the file.

    Args:
        types: module of the checkpoint -> type of its blocks. expanded: module -> the type that it had before it became
            float32.
    """

    def __init__(self, types: Mapping[str, str], expanded: Mapping[str, str], dtype: torch.dtype) -> None:
        self._types, self._expanded, self._dtype, self._ahead = types, expanded, dtype, Ahead()

    @classmethod
    def read(cls, ctx: QuantizationContext) -> Gguf:
        if unknown := ctx.config.keys() - _KEYS:
            raise ModelError(
                f"quantization_config of gguf has {', '.join(sorted(unknown))}; known: {', '.join(sorted(_KEYS))}"
            )
        types, expanded = ctx.config.get("types", {}), ctx.config.get("expanded", {})
        for name, kinds in (("types", types), ("expanded", expanded)):
            if not isinstance(kinds, Mapping) or not all(isinstance(kind, str) for kind in kinds.values()):
                raise ModelError(f"quantization_config.{name} of gguf maps modules to types, it is not {kinds!r:.100}")
        for module, kind in types.items():
            if kind not in BLOCK_TYPES:
                raise ModelError(
                    f"quantization_config.types of gguf: {module} has blocks of {kind!r:.100}; valid: "
                    f"{', '.join(BLOCK_TYPES)}"
                )
        return cls(types, expanded, ctx.dtype)

    def method(self, layer: LayerInfo) -> LinearMethod | None:
        kinds = tuple(self._types.get(source, "") for source in layer.sources)
        if any(kinds):
            if layer.kind == "experts":
                raise ModelError(f"{layer.name}: experts in the blocks of a GGUF file are not supported")
            before = tuple(self._expanded.get(source, "") for source in layer.sources)
            return GgufMethod(kinds, self._dtype, self._ahead, before)
        expanded = sorted({self._expanded[source] for source in layer.sources if source in self._expanded})
        return Expanded(expanded) if expanded and layer.kind != "experts" else None


class Expanded(Unquantised):
    """A matrix of a type that has no kernels here: it was expanded when the file was converted."""

    def __init__(self, kinds: list[str]) -> None:
        self.label = f"gguf {' + '.join(kinds)}, expanded when the file was converted"


@dataclass(frozen=True, slots=True)
class _Piece:
    """A parameter, the type of its blocks ("": it is plain), and its outputs on this rank."""

    name: str
    kind: str
    start: int
    stop: int


class GgufMethod(LinearMethod):
    """A weight in blocks.

    Args:
        kinds: type of each part's blocks; "": the part is plain.
        dtype: the model's. ahead: shared by the layers of a model. expanded: the type that a plain part had before it
            became float32; "": it was plain.
    """

    def __init__(
        self, kinds: tuple[str, ...], dtype: torch.dtype, ahead: Ahead | None = None, expanded: tuple[str, ...] = ()
    ) -> None:
        self._kinds, self._dtype, self._ahead = kinds, dtype, ahead or Ahead()
        self._pieces: list[_Piece] = []
        self._stores: dict[str, Store] = {}  # by the parameter's name
        before = [f"{each} (expanded)" if each else "plain" for each in expanded or kinds]
        each = (kind or plain for kind, plain in zip(kinds, before, strict=True))
        self.label = f"gguf {' + '.join(dict.fromkeys(each))}"

    def create(self, layer: WeightLayer, weight: ShardSpec) -> None:
        alike = len(set(self._kinds)) == 1
        for name, kind, spec in [("weight", self._kinds[0], weight)] if alike else self._each(weight):
            stored = _in_blocks(layer, spec, kind) if kind else spec
            layer.add_weight(name, stored, dtype=torch.uint8 if kind else None)
            self._add(name, kind, len(layer.get_parameter(name)))

    def _each(self, weight: ShardSpec) -> Iterator[tuple[str, str, ShardSpec]]:
        for kind, (part, size) in zip(self._kinds, weight.parts, strict=True):
            yield f"weight:{part}", kind, replace(weight, shape=(size, weight.shape[1]), parts=())

    def _add(self, name: str, kind: str, outputs: int) -> None:
        start = self._pieces[-1].stop if self._pieces else 0
        self._pieces.append(_Piece(name, kind, start, start + outputs))

    def load(self, layer: WeightLayer, name: str, shard: Shard, values: Tensor) -> None:
        kind = next((piece.kind for piece in self._pieces if piece.name == name), "")
        if kind and values.is_floating_point():  # dummy weights
            values = dummy_blocks(dummy_bits(values, torch.uint8), kind, DUMMY_DEVIATION)
        WeightLayer.load_shard(layer, name, shard, values)

    def finish(self, layer: WeightLayer) -> None:
        self._join(layer)
        for piece in self._pieces:
            if not piece.kind:
                continue
            store = store_for(layer, layer.get_parameter(piece.name), piece.kind, self._dtype, self._ahead)
            if store is None:
                self._expand(layer)
                return
            self._stores[piece.name] = store
        self.label += next(iter(self._stores.values())).note

    def _join(self, layer: WeightLayer) -> None:
        """Neighbours of one type become one parameter, and one product."""
        pieces, self._pieces = self._pieces, []
        for piece in pieces:
            before = self._pieces[-1] if self._pieces else None
            if before is None or before.kind != piece.kind:
                self._pieces.append(piece)
                continue
            parameter = layer.get_parameter(before.name)
            parameter.data = torch.cat((parameter.data, layer.get_parameter(piece.name).data))
            delattr(layer, piece.name)
            self._pieces[-1] = replace(before, stop=piece.stop)

    def _expand(self, layer: WeightLayer) -> None:
        """One plain weight instead, of the model's dtype."""
        parts = [(layer.get_parameter(piece.name).data, piece.kind) for piece in self._pieces]
        values = torch.cat([dequantise(each, kind).to(self._dtype) if kind else each for each, kind in parts])
        for piece in self._pieces:
            delattr(layer, piece.name)
        layer.register_parameter("weight", nn.Parameter(values, requires_grad=False))
        self._pieces = []
        self._add("weight", "", len(values))
        self.label += ", expanded: the kernels in C are off or not built"

    def apply(self, layer: WeightLayer, x: Tensor, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
        if len(self._pieces) == 1:
            return self._linear(layer, self._pieces[0], x, bias, out)
        y = torch.empty(len(x), self._pieces[-1].stop, dtype=x.dtype, device=x.device) if out is None else out
        for piece in self._pieces:
            part = None if bias is None else bias[piece.start : piece.stop]
            columns = y[:, piece.start : piece.stop]
            if piece.kind:
                self._linear(layer, piece, x, part, columns)
            else:
                columns.copy_(self._linear(layer, piece, x, part, None))
        return y

    def apply_normed(
        self,
        layer: WeightLayer,
        norm: Norm,
        x: Tensor,
        residual: Tensor | None,
        bias: Tensor | None,
        gate: Activation | None,
    ) -> tuple[Tensor, Tensor]:
        if not self._stores or len(self._pieces) > 1:
            return super().apply_normed(layer, norm, x, residual, bias, gate)
        [piece] = self._pieces
        return self._stores[piece.name].norm_linear(x, residual, norm, bias, gate, layer.ops)

    def apply_added(
        self, layer: WeightLayer, x: Tensor, bias: Tensor | None, residual: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        if not self._stores or len(self._pieces) > 1:
            return super().apply_added(layer, x, bias, residual)
        [piece] = self._pieces
        return self._stores[piece.name].linear_add(x, residual, bias, next_norm_of(layer, x))

    def _linear(self, layer: WeightLayer, piece: _Piece, x: Tensor, bias: Tensor | None, out: Tensor | None) -> Tensor:
        if piece.name in self._stores:
            return self._stores[piece.name].linear(x, bias, out=out)
        return layer.ops.linear(x, layer.get_parameter(piece.name), bias, out=out)

    def rows(self, layer: WeightLayer, ids: Tensor) -> Tensor:
        [piece] = self._pieces
        if not self._stores:
            return layer.ops.embedding(ids, layer.get_parameter(piece.name))
        return self._stores[piece.name].rows(ids.reshape(-1), self._dtype).view(*ids.shape, -1)


def _in_blocks(layer: WeightLayer, weight: ShardSpec, kind: str) -> ShardSpec:
    """uint8 [out, bytes of a row], of a weight [out, in]. Raises `ModelError` where ranks would cut a block."""
    block, size = BLOCK_TYPES[kind].block, BLOCK_TYPES[kind].size
    if weight.shape[1] % block:
        raise ModelError(f"{layer.name}: rows of {weight.shape[1]} weights are no whole blocks of {kind}, of {block}")
    spec = divided(layer, weight, inputs=block)
    unit = spec.unit * size if spec.dim else spec.unit
    return replace(spec, shape=(spec.shape[0], spec.shape[1] * size), unit=unit, dtypes=("U8",))
