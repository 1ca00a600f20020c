"""The method of weights of four bits, whatever file they come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nanoengine.api import LinearMethod, ModelError, Norm, Shard, ShardSpec, WeightLayer, WeightsError
from nanoengine.kernels import int4, int4_cpu
from nanoengine.kernels.activation import Activation
from nanoengine.kernels.int4 import SYMMETRIC_ZERO, UNIT, Int4Weight, fits_tiles, in_tiles
from nanoengine.kernels.int4_cpu import int4_tiles
from nanoengine.kernels.matmul import Ahead, Scaled
from nanoengine.kernels.ops import CpuOps
from nanoengine.layers.quantised import divided, dummy_bits, one_each, per_output, transposed
from nanoengine.plugins.quantizations import int4_layouts as layouts
from nanoengine.plugins.quantizations.ahead import next_norm_of
from nanoengine.plugins.quantizations.gguf_stores import has_products
from nanoengine.plugins.quantizations.int4_layouts import Int4Format

_BIAS = "bias:"  # of each part, of layers that have none in the model


class Int4(LinearMethod):
    """Weights of four bits in groups of inputs.

    Args:
        format_: how the file has them.
        group: inputs that share a scale; -1: all of them.
        zeros: the file has zeros; without, all are 8.
        act_order: inputs of a group may be anywhere, and the file says which. Where they may not, and the file says it
            too, that is checked.
        ahead: shared by the layers of a model; None: products do not prepare the norms behind them.
    """

    def __init__(
        self,
        format_: Int4Format,
        group: int,
        *,
        zeros: bool = True,
        act_order: bool = False,
        ahead: Ahead | None = None,
    ) -> None:
        self._format, self._group, self._zeros, self._act_order = format_, group, zeros, act_order
        self._ahead = ahead or Ahead()
        about = "one group" if group == -1 else f"groups of {group}"
        self.label = f"int4 ({format_.name}), {about}{', act-order' if act_order else ''}"
        self._spec: ShardSpec | None = None
        self._dummy = False
        self._pieces: tuple[_Piece, ...] = ()

    def create(self, layer: WeightLayer, weight: ShardSpec) -> None:
        form, self._spec = self._format, weight
        if isinstance(layer.ops, CpuOps):
            self.label += ", inputs rounded to int8"
        turn = transposed if form.by_input else _same
        group = _checked_group(layer, weight, self._group, form.name)
        if self._act_order and self._group != -1 and weight.dim == 1 and layer.tp.size > 1:
            raise _scattered(layer)
        packed = {"outputs" if form.packs_outputs else "inputs": layouts.PER_WORD}
        scales = _per_output(weight) if self._group == -1 else divided(layer, weight, inputs=group)
        specs = {form.codes: replace(turn(divided(layer, weight, **packed)), dtypes=("I32",))}
        if self._zeros:
            zeros = divided(layer, scales, outputs=layouts.PER_WORD)
            specs[form.zeros] = replace(turn(zeros), dtypes=("I32",))
        if form.groups:
            groups = replace(_inputs(weight), dtypes=("I32", "I64"), optional=not self._act_order)
            specs |= one_each(form.groups, weight, groups)
        for name, spec in specs.items():
            layer.add_weight(name, spec, torch.int32)
        layer.add_weight(form.scales, turn(scales), torch.float32)
        if self._zeros:
            layer.get_parameter(form.zeros).data.fill_(0)
        for name in self._of_parts(layer, form.groups):
            layer.get_parameter(name).data.copy_(_neighbours(layer, name, self._in_file))
        for name, shape, dtypes in form.others:
            for each, spec in one_each(name, weight, ShardSpec(shape=shape, optional=True, dtypes=dtypes)).items():
                layer.add_weight(each, spec, torch.int64)
        for part, size in weight.parts or (("all", weight.shape[0]),) if form.stray_biases else ():
            bias = replace(per_output(weight), shape=(size,), parts=(), optional=True, init="zeros")
            layer.add_weight(f"{_BIAS}{part}", bias)

    def load(self, layer: WeightLayer, name: str, shard: Shard, values: Tensor) -> None:
        into = layer.get_parameter(name).data[shard.target]
        if name.startswith(_BIAS) and values.any():
            raise WeightsError(f"{layer.name}: the checkpoint has a bias that is not zero, and the model has none")
        if into.is_floating_point() or not values.is_floating_point():
            into.copy_(values)
        elif name in (self._format.codes, self._format.zeros):  # dummy weights: any bits will do; groups stay
            into.copy_(dummy_bits(values, torch.int32))
            self._dummy = True

    def finish(self, layer: WeightLayer) -> None:
        assert self._spec is not None
        weight, names = self._read(layer), self._of_parts(layer, self._format.groups)
        rows = [each.target[0] for each in per_output(self._spec).shards(layer.tp.rank, layer.tp.size)]
        orders = [_order(layer, name, self._in_file) for name in names] or [None]
        if all(_equal(each, orders[0]) for each in orders):  # so it is in a file made by GPTQ: parts see equal inputs
            rows, orders = [slice(0, weight.shape[0])], orders[:1]
        for name in [each for each in layer.specs if each != "bias"]:
            delattr(layer, name)
            del layer.specs[name]
        self._pieces = tuple(
            _piece(layer, i, part, weight.rows(part), order)
            for i, (part, order) in enumerate(zip(rows, orders, strict=True))
        )

    def _read(self, layer: WeightLayer) -> Int4Weight:
        """The parameters that were loaded, in the layout of `kernels.int4` and the file's order of inputs."""
        form, raw = self._format, layer.get_parameter
        codes, scales = form.read_codes(raw(form.codes).data), raw(form.scales).data
        scales = (scales.t() if form.by_input else scales).contiguous()
        scales = scales.half() if self._dummy else layouts.narrowest(scales)  # float16 is what files have
        zeros = form.read_zeros(raw(form.zeros).data) if self._zeros else None
        if zeros is not None and bool((zeros == SYMMETRIC_ZERO).all()):
            zeros = None
        return Int4Weight(codes, scales, zeros, 2 * codes.shape[1] // scales.shape[1])

    def apply(self, layer: WeightLayer, x: Tensor, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
        return self._product(x, bias, out=out)

    def apply_normed(
        self,
        layer: WeightLayer,
        norm: Norm,
        x: Tensor,
        residual: Tensor | None,
        bias: Tensor | None,
        gate: Activation | None,
    ) -> tuple[Tensor, Tensor]:
        one = len(self._pieces) == 1
        if one and layer.ops.name == "cpu" and self._pieces[0].order is None:
            total = x if residual is None else x + residual
            return self._product(total, bias, gate=gate, norm=norm.weight, eps=norm.eps), total
        scaled = self._ahead.taken(x, residual, norm.weight)
        if scaled is not None and one and self._pieces[0].order is None and self._pieces[0].takes(x):
            return self._product(scaled, bias, gate=gate, eps=norm.eps), x
        normed, total = norm.add(x, residual)
        if one:
            return self._product(normed, bias, gate=gate), total
        y = self._product(normed, bias)
        return (layer.ops.act_and_mul(y, gate) if gate else y), total

    def apply_added(
        self, layer: WeightLayer, x: Tensor, bias: Tensor | None, residual: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        if len(self._pieces) > 1:
            return self._product(x, bias), residual
        (piece,) = self._pieces
        next_norm = next_norm_of(layer, x)
        if next_norm is None or piece.prepared is None or not piece.takes(x):
            return self._product(x, bias, add=residual), None
        total, scaled = piece.prepared(piece.inputs(x), bias=bias, add=residual, next_norm=next_norm)
        return self._ahead.kept(total, scaled), None

    def _product(self, x: Tensor | Scaled, bias: Tensor | None, *, out: Tensor | None = None, **around: Any) -> Tensor:
        if len(self._pieces) == 1:
            (piece,) = self._pieces
            return piece.linear(x if isinstance(x, Scaled) else piece.inputs(x), bias=bias, out=out, **around)
        assert isinstance(x, Tensor)
        if out is None:
            out = torch.empty(len(x), self._pieces[-1].rows.stop, dtype=x.dtype, device=x.device)
        for piece in self._pieces:
            out[:, piece.rows] = piece.linear(piece.inputs(x), bias=None if bias is None else bias[piece.rows])
        return out

    @property
    def _in_file(self) -> int:
        """Inputs of a group, those of all ranks together."""
        assert self._spec is not None
        return self._spec.shape[1] if self._group == -1 else self._group

    def _of_parts(self, layer: WeightLayer, name: str) -> list[str]:
        """Names of the parameters `name` or, in order, `name:part`."""
        return [each for each in layer.specs if name and each.partition(":")[0] == name]


@dataclass(frozen=True, slots=True)
class _Piece:
    """Outputs whose inputs have one order.

    Attributes:
        order: int32 [in], where each input of the weight is in x; None: there.
        prepared: the product, and what `next_norm` needs of it. takes: whether it multiplies x, and x that the product
            before it prepared.
    """

    rows: slice
    order: Tensor | None
    linear: Callable[..., Tensor]
    prepared: Callable[..., tuple[Tensor, Scaled | None]] | None = None
    takes: Callable[[Tensor], bool] = lambda _: False

    def inputs(self, x: Tensor) -> Tensor:
        return x if self.order is None else x.index_select(1, self.order)


def _piece(layer: WeightLayer, number: int, rows: slice, weight: Int4Weight, order: Tensor | None) -> _Piece:
    """Keeps a weight as parameters of the layer, in the layout that its kernels read."""

    def kept(name: str, values: Tensor) -> Tensor:
        layer.register_parameter(f"{name}_{number}", nn.Parameter(values, requires_grad=False))
        return layer.get_parameter(f"{name}_{number}").data

    codes = weight.codes
    if order is not None:
        codes, order = int4.pack_codes(int4.unpack_codes(codes)[:, order]), kept("order", order)
    if isinstance(layer.ops, CpuOps):
        tiles = int4_tiles(layer.ops.library, replace(weight, codes=codes))
        return _Piece(
            rows, order, partial(int4_cpu.int4_linear, weight=replace(tiles, tiles=kept("tiles", tiles.tiles)))
        )
    weight = replace(weight, codes=codes)
    triton, kernels = layer.ops.name == "triton", layer.ops.kernels
    if triton and kernels.has("int4_gluon") and fits_tiles(weight) and has_products(codes.device):
        weight = in_tiles(weight)
    zeros = None if weight.zeros is None else kept("zeros", weight.zeros)
    weight = replace(weight, codes=kept("codes", weight.codes), scales=kept("scales", weight.scales), zeros=zeros)
    if not triton:
        return _Piece(rows, order, partial(int4.int4_linear, weight=weight))
    from nanoengine.kernels import int4_launch
    from nanoengine.kernels.split_k_triton import tickets_on

    given: dict[str, Any] = {"weight": weight, "gluon": kernels.has("int4_gluon")}
    takes = partial(int4_launch.takes, **given)
    given["tickets"] = tickets_on(codes.device)
    prepared = partial(int4_launch.product, **given)
    return _Piece(rows, order, partial(int4_launch.int4_linear, **given), prepared, takes)


def _same(spec: ShardSpec) -> ShardSpec:
    return spec


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _per_output(weight: ShardSpec) -> ShardSpec:
    """The spec of one value for each output, [out, 1]."""
    spec = per_output(weight)
    return replace(spec, shape=(*spec.shape, 1))


def _inputs(weight: ShardSpec) -> ShardSpec:
    """The spec of one value for each input, [in]."""
    spec = ShardSpec(shape=weight.shape[1:])
    return spec if weight.dim == 0 else replace(spec, split=weight.split, unit=weight.unit)


def _checked_group(layer: WeightLayer, weight: ShardSpec, group: int, name: str) -> int:
    """The size of a group on this rank. Raises `ModelError` with the numbers that do not fit."""
    outputs, inputs = weight.shape
    held = weight.local_shape(layer.tp.rank, layer.tp.size)[1]
    found = held if group == -1 else group
    if found % UNIT or inputs % found:
        share = f", {held} of them on each of {layer.tp.size} ranks" if held < inputs else ""
        raise ModelError(
            f"{layer.name}: {inputs} inputs{share} in groups of {found} are not supported ({name}): the group must be "
            f"a multiple of {UNIT} and divide the inputs"
        )
    odd = [f"{part} {size}".strip() for part, size in weight.parts or (("", outputs),) if size % layouts.PER_WORD]
    if odd:
        which, words = ", ".join(odd), layouts.PER_WORD
        raise ModelError(f"{layer.name}: {which} outputs are no multiple of {words}, which share a word of {name}")
    return found


def _neighbours(layer: WeightLayer, name: str, group: int) -> Tensor:
    """The group of each input of this rank where a group's inputs are neighbours: int64 [in]."""
    (shard,) = layer.specs[name].shards(layer.tp.rank, layer.tp.size)
    (where,) = shard.source
    return torch.arange(where.start, where.stop, device=layer.get_parameter(name).device) // group


def _order(layer: WeightLayer, name: str, group: int) -> Tensor | None:
    """Where the inputs of the groups are, in the order of the groups; None: they are neighbours.

    Raises `ModelError` if they are on other ranks, `WeightsError` if a group has another size.
    """
    groups, neighbours = layer.get_parameter(name).data, _neighbours(layer, name, group)
    if torch.equal(groups.long(), neighbours):
        return None
    if layer.specs[name].split != "whole" and layer.tp.size > 1:
        raise _scattered(layer)
    order = groups.argsort(stable=True)
    if not torch.equal(groups[order].long(), neighbours):
        raise WeightsError(f"{layer.name}: {name} of the checkpoint has groups that are not all of {group} inputs")
    return order.to(torch.int32)


def _scattered(layer: WeightLayer) -> ModelError:
    return ModelError(
        f"{layer.name}: its inputs are cut over tensor_parallel_size={layer.tp.size} ranks, but act-order (desc_act) "
        "put those of a group anywhere, also on other ranks: that is not supported; use tensor_parallel_size=1, or a "
        "checkpoint without act-order"
    )
