"""How blocks of a GGUF file are kept at run time, and by which kernels they are multiplied."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from nanoengine.api import Norm, WeightLayer
from nanoengine.kernels import gguf, gguf_fragments
from nanoengine.kernels.activation import Activation
from nanoengine.kernels.matmul import Ahead
from nanoengine.kernels.ops import CpuOps, Ops


class Store(ABC):
    """A weight [out, in] of blocks in one of the ways to keep it, and its products.

    Attributes:
        note: what the start report says of the products, behind the types.
        weight: the layer's parameter. kind: the type of its blocks.
    """

    note: ClassVar[str] = ""

    def __init__(self, weight: Tensor, kind: str) -> None:
        """weight: uint8 [out, bytes of a row], as in the file; its data is replaced by what is kept."""
        weight.data = self.kept(weight.data, kind)
        self.weight, self.kind = weight, kind

    @abstractmethod
    def kept(self, blocks: Tensor, kind: str) -> Tensor:
        """The bytes of the file's blocks in the order in which they are kept."""

    @abstractmethod
    def linear(self, x: Tensor, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
        """[T, in] -> [T, out]. `out`: where the result goes; it may be columns of a wider tensor."""

    def norm_linear(
        self, x: Tensor, residual: Tensor | None, norm: Norm, bias: Tensor | None, gate: Activation | None, ops: Ops
    ) -> tuple[Tensor, Tensor]:
        """`linear` behind a norm that is `rms`, and the gate: `LinearMethod.apply_normed`."""
        normed, total = norm.add(x, residual)
        y = self.linear(normed, bias)
        return (ops.act_and_mul(y, gate) if gate else y), total

    def linear_add(
        self, x: Tensor, residual: Tensor, bias: Tensor | None, next_norm: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """`linear`, to be added to the residual stream: `LinearMethod.apply_added`. next_norm: the weight of the norm
        behind the sum, if this product may prepare it."""
        return self.linear(x, bias), residual

    @abstractmethod
    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """int [T] -> rows of the weight, [T, in] of `dtype`."""


class Blocks(Store):
    """As in the file; plain torch decodes some rows at a time."""

    def kept(self, blocks: Tensor, kind: str) -> Tensor:
        return blocks

    def linear(self, x: Tensor, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
        return gguf.gguf_linear(x, self.weight, self.kind, bias, out=out)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return gguf.gguf_rows(ids, self.weight, self.kind, dtype)


class Planes(Store):
    """The same bytes in another order, for Triton kernels, which decode them in registers."""

    def __init__(self, weight: Tensor, kind: str) -> None:
        from nanoengine.kernels import gguf_decode_triton, gguf_triton

        self._kernels, self._planar = gguf_triton, gguf_decode_triton.planar
        super().__init__(weight, kind)

    def kept(self, blocks: Tensor, kind: str) -> Tensor:
        return self._planar(blocks, kind)

    def linear(self, x: Tensor, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
        return self._kernels.gguf_linear(x, self.weight, self.kind, bias, out=out)

    def norm_linear(
        self, x: Tensor, residual: Tensor | None, norm: Norm, bias: Tensor | None, gate: Activation | None, ops: Ops
    ) -> tuple[Tensor, Tensor]:
        weight, eps = norm.weight, norm.eps
        return self._kernels.gguf_norm_linear(x, residual, weight, eps, self.weight, self.kind, bias, gate=gate)

    def rows(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        return self._kernels.gguf_rows(ids.contiguous(), self.weight, self.kind, dtype)


def store_for(layer: WeightLayer, weight: Tensor, kind: str, dtype: torch.dtype, ahead: Ahead) -> Store | None:
    """The store of a part on the layer's device; None: the weight is to be expanded, as on a CPU plain torch is far too
    slow.

    weight: a parameter of the layer, uint8 [out, bytes of a row]. dtype: the model's.
    """
    from nanoengine.plugins.quantizations.gguf_fragments import Fragments
    from nanoengine.plugins.quantizations.gguf_tiles import Tiles

    if layer.ops.name == "triton":  # tensor cores round float32
        exact = dtype != torch.float32 or not weight.is_cuda
        whole = exact and has_products(weight.device) and gguf_fragments.fits(weight, kind)
        return Fragments(weight, kind, ahead) if whole and layer.ops.prepares_norms else Planes(weight, kind)
    if isinstance(layer.ops, CpuOps):
        return Tiles(weight, kind, layer.ops.library)
    return None if weight.device.type == "cpu" else Blocks(weight, kind)


def has_products(device: torch.device) -> bool:
    """Whether the assembly of `gguf_fragments_triton` runs there: NVIDIA GPUs of compute capability 8.0 and later."""
    if device.type != "cuda":  # the interpreter
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
