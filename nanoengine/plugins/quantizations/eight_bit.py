"""The method of layers whose weight has eight bits, FP8 or INT8: as a checkpoint has it, or made while loading."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from nanoengine.api import LinearMethod, ModelError, Norm, Shard, ShardSpec, WeightLayer
from nanoengine.kernels import eight_bit
from nanoengine.kernels.activation import Activation
from nanoengine.kernels.eight_bit import LEAST, EightBit, Inputs
from nanoengine.kernels.eight_bit_cpu import EightBitTiles
from nanoengine.kernels.gluon import is_hopper
from nanoengine.kernels.ops import CpuOps
from nanoengine.layers.quantised import divided, one_each, per_output

FP8, INT8 = torch.float8_e4m3fn, torch.int8
LIMITS = {FP8: 448.0, INT8: 127.0}
_STORED = {FP8: ("F8_E4M3",), INT8: ("I8",)}
_FIRST_FP8 = (8, 9)  # compute capability


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How weights of eight bits are stored, and how what they multiply is quantised.

    Attributes:
        dtype: `FP8` or `INT8`.
        scales: what of a weight has a scale: "tensor", "channel" (an output), or (outputs, inputs) of a block.
        inputs: as in `EightBit`; "tensor": static, by a scale of the checkpoint.
        online: the checkpoint is plain.
        scale_names, input_scale_names: in the checkpoint; if several, it has one of them.
        bound: with inputs "token", what a checkpoint's layers do not say themselves in `bound_name`: what is larger
            does not count for a scale.
    """

    dtype: torch.dtype
    scales: str | tuple[int, int]
    inputs: Inputs
    online: bool = False
    scale_names: tuple[str, ...] = ("weight_scale",)
    input_scale_names: tuple[str, ...] = ("input_scale",)
    bound: float | None = None
    bound_name: str = "input_scale_ub"

    def __str__(self) -> str:
        name = "fp8" if self.dtype == FP8 else "int8"
        what = self.scales if isinstance(self.scales, str) else f"block {self.scales[0]}x{self.scales[1]}"
        if isinstance(self.scales, tuple) and self.scales[0] == self.scales[1]:
            what = f"block {self.scales[0]}"
        inputs = {"plain": "weight only", "tensor": "static"}.get(self.inputs, "dynamic")
        return f"{name} {what}, {inputs}{', quantised while loading' if self.online else ''}"


class EightBitLinear(LinearMethod):
    """A weight of codes [out, in], their scales, and the product with inputs that are quantised as the scheme says.

    Fused parts keep scales of their own. If they also have input scales of their own that differ, each is multiplied
    by itself.
    """

    def __init__(self, scheme: Scheme) -> None:
        self.scheme, self.label = scheme, str(scheme)
        self._weights: tuple[EightBit, ...] = ()
        self._kernels: ModuleType | EightBitTiles = eight_bit

    def create(self, layer: WeightLayer, weight: ShardSpec) -> None:
        scheme = self.scheme
        layer.add_weight("weight", stored_as(weight, scheme), scheme.dtype)
        for name in scheme.scale_names:
            for each, spec in self._scales(layer, weight, name):
                spec = replace(spec, made=scheme.online, optional=len(scheme.scale_names) > 1)
                add_scale(layer, each, spec, float("nan"))
        if scheme.inputs == "tensor":
            for name in scheme.input_scale_names:
                spec = ShardSpec(shape=(1,), optional=len(scheme.input_scale_names) > 1)
                for each, own in one_each(name, weight, spec).items():
                    add_scale(layer, each, own, float("nan"))
        if scheme.bound is not None:
            spec = ShardSpec(shape=(1,), optional=True)
            for each, own in one_each(scheme.bound_name, weight, spec).items():
                add_scale(layer, each, own, scheme.bound)

    def _scales(self, layer: WeightLayer, weight: ShardSpec, name: str) -> Iterator[tuple[str, ShardSpec]]:
        scales = self.scheme.scales
        if scales == "tensor":
            yield from one_each(name, weight, ShardSpec(shape=(1,))).items()
        elif isinstance(scales, tuple):
            found = blocks_of_parts(layer, name, weight, *scales)
            yield from found.items() or [(name, divided(layer, weight, outputs=scales[0], inputs=scales[1]))]
        else:
            outputs = per_output(weight)
            yield name, replace(outputs, shape=(*outputs.shape, 1))

    def load(self, layer: WeightLayer, name: str, shard: Shard, values: Tensor) -> None:
        if name != "weight" or values.dtype == self.scheme.dtype:
            WeightLayer.load_shard(layer, name, shard, values)
            return
        codes, scale = quantised_rows(values, self.scheme.dtype)  # online, or dummy weights
        WeightLayer.load_shard(layer, name, shard, codes)
        if self.scheme.online:
            layer.get_parameter(self.scheme.scale_names[0]).data[shard.target[0]] = scale

    def finish(self, layer: WeightLayer) -> None:
        weight = layer.get_parameter("weight").data
        shards = layer.specs["weight"].shards(layer.tp.rank, layer.tp.size)
        cuts = [shard.target[0] for shard in shards] if len(shards) > 1 else [slice(0, len(weight))]  # with padding
        parts = [shard.part for shard in shards]
        scale, rows, columns = self._merged(layer, weight, parts, cuts)
        # other GPUs than Hopper have less shared memory
        streamed = layer.ops.kernels.has("eight_bit_streamed") and (not weight.is_cuda or is_hopper(weight.device))
        whole = EightBit(weight, scale, rows, columns, self.scheme.inputs, streamed=streamed)
        given = [self._of_inputs(layer, part) for part in parts]
        if len({None if each is None else float(each) for each in given}) == 1:
            self._weights = (self._with(whole, given[0]),)
        else:
            self._weights = tuple(self._with(cut_rows(whole, at), each) for at, each in zip(cuts, given, strict=True))
        self._kernels = eight_bit
        if takes_triton(layer, weight):
            from nanoengine.kernels import eight_bit_triton

            self._kernels = eight_bit_triton
        if isinstance(layer.ops, CpuOps) and EightBitTiles.takes(self._weights[0]):
            self._pack(layer, EightBitTiles(layer.ops.library))

    def _pack(self, layer: WeightLayer, tiles: EightBitTiles) -> None:
        """For the kernels in C: in their order, instead of the codes."""
        self._weights = (tiles.packed(self._weights[0]),)
        layer.get_parameter("weight").data = self._weights[0].weight
        self._kernels = tiles
        self.label += ", inputs rounded to int8"

    def _of_inputs(self, layer: WeightLayer, part: str) -> Tensor | None:
        """The scale, or the bound, of a part's inputs."""
        if self.scheme.inputs == "tensor":
            return _given(layer, self.scheme.input_scale_names, part)
        return None if self.scheme.bound is None else _given(layer, (self.scheme.bound_name,), part)

    def _with(self, w: EightBit, of_inputs: Tensor | None) -> EightBit:
        return replace(w, input_scale=of_inputs) if self.scheme.inputs == "tensor" else replace(w, bound=of_inputs)

    def _merged(
        self, layer: WeightLayer, weight: Tensor, parts: list[str], cuts: list[slice]
    ) -> tuple[Tensor, int, int]:
        """(scales, outputs and inputs of one) of the fused weight."""
        names, inputs = self.scheme.scale_names, weight.shape[1]
        if self.scheme.scales == "tensor":
            each = [_given(layer, names, part).expand(at.stop - at.start) for part, at in zip(parts, cuts, strict=True)]
            return torch.cat(each).unsqueeze(1).contiguous(), 1, inputs
        if isinstance(self.scheme.scales, tuple) and f"{names[0]}:{parts[0]}" in layer.specs:
            each = [_given(layer, names, part) for part in parts]
            return of_outputs(each, self.scheme.scales[0], layer.specs["weight"]), 1, self.scheme.scales[1]
        scale = _given(layer, names)
        return (scale, *self.scheme.scales) if isinstance(self.scheme.scales, tuple) else (scale, 1, inputs)

    def apply(self, layer: WeightLayer, x: Tensor, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
        if len(self._weights) == 1:
            y: Tensor = self._kernels.product(self._weights[0], x, bias, out=out)
            return y
        first, pieces = 0, []
        for w in self._weights:
            last = first + len(w.weight)
            pieces.append(self._kernels.product(w, x, None if bias is None else bias[first:last]))
            first = last
        y = torch.cat(pieces, 1)
        return y if out is None else out.copy_(y)

    def apply_normed(
        self,
        layer: WeightLayer,
        norm: Norm,
        x: Tensor,
        residual: Tensor | None,
        bias: Tensor | None,
        gate: Activation | None,
    ) -> tuple[Tensor, Tensor]:
        if len(self._weights) > 1:
            return super().apply_normed(layer, norm, x, residual, bias, gate)
        w = self._weights[0]
        y: tuple[Tensor, Tensor] = self._kernels.norm_product(w, x, residual, norm.weight, norm.eps, bias, gate=gate)
        return y

    def apply_added(
        self, layer: WeightLayer, x: Tensor, bias: Tensor | None, residual: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        if len(self._weights) > 1:
            return super().apply_added(layer, x, bias, residual)
        y: tuple[Tensor, Tensor | None] = self._kernels.product_added(self._weights[0], x, bias, residual)
        return y


def blocks_of_parts(layer: WeightLayer, name: str, weight: ShardSpec, rows: int, columns: int) -> dict[str, ShardSpec]:
    """Scales of the blocks of each fused part, where parts are no whole blocks; {}: they are, or ranks would cut them.

    weight: [..., out, in]. rows, columns: outputs and inputs of a block.
    """
    if layer.tp.size > 1 or not any(size % rows for _, size in weight.parts[:-1]):
        return {}
    *stack, _, inputs = weight.shape
    return {
        f"{name}:{part}": ShardSpec(shape=(*stack, -(-size // rows), -(-inputs // columns)))
        for part, size in weight.parts
    }


def of_outputs(blocks: Sequence[Tensor], rows: int, weight: ShardSpec) -> Tensor:
    """[..., out, columns]: a scale for each output, of the scales of each part's blocks of `rows` outputs."""
    sizes = [size for _, size in weight.parts]
    each = (part.repeat_interleave(rows, -2)[..., :size, :] for part, size in zip(blocks, sizes, strict=True))
    return torch.cat(tuple(each), -2)


def quantised_rows(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[out, in] of any float dtype -> (codes, float32 scales [out, 1]): each row by its largest value."""
    rows = values.float()
    scale = rows.abs().amax(1, keepdim=True).clamp_min(LEAST) / LIMITS[dtype]
    codes = (rows / scale).clamp(-LIMITS[dtype], LIMITS[dtype])
    return (codes.round() if dtype == INT8 else codes).to(dtype), scale


def cut_rows(w: EightBit, at: slice) -> EightBit:
    """Outputs `at` of a weight."""
    if w.rows == 1:
        return replace(w, weight=w.weight[at], scale=w.scale[at])
    rows = torch.arange(at.start, at.stop, device=w.scale.device) // w.rows
    return replace(w, weight=w.weight[at], scale=w.scale[rows], rows=1)


def stored_as(weight: ShardSpec, scheme: Scheme) -> ShardSpec:
    """The weight's spec, with the dtype that a checkpoint has."""
    return weight if scheme.online else replace(weight, dtypes=_STORED[scheme.dtype])


def add_scale(layer: WeightLayer, name: str, spec: ShardSpec, value: float) -> None:
    """Registers a float32 parameter of this value. In dummy weights it is 1."""
    layer.add_weight(name, replace(spec, init="ones"), torch.float32)
    layer.get_parameter(name).data.fill_(value)


def _given(layer: WeightLayer, names: tuple[str, ...], part: str = "") -> Tensor:
    """The one parameter of these names that the checkpoint had. Raises `ModelError` if it had none."""
    own = layer.specs
    for name in names:
        full = f"{name}:{part}" if f"{name}:{part}" in own else name
        values = layer.get_parameter(full).data
        if len(names) == 1 or not values.isnan().all():
            return values
    raise ModelError(f"{layer.name}{f' ({part})' if part else ''}: the checkpoint has none of {', '.join(names)}")


def takes_triton(layer: WeightLayer, weight: Tensor) -> bool:
    """Whether layers use Triton and the GPU has the codes. Else plain torch widens some rows at a time."""
    if layer.ops.name != "triton":
        return False
    return not weight.is_cuda or weight.dtype != FP8 or torch.cuda.get_device_capability(weight.device) >= _FIRST_FP8
