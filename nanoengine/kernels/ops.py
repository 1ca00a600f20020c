"""The operations that layers are made of, as one object a model is built with: plain torch, or Triton kernels.

A layer calls `self.ops.…` and knows no device. `fuse_kernels=false` builds every model with the torch ones.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanoengine.kernels import activation as pointwise
from nanoengine.kernels import experts as mixture
from nanoengine.kernels import rms_norm, rope
from nanoengine.kernels.activation import Activation as Activation
from nanoengine.kernels.cache_keys import make_keys
from nanoengine.kernels.choice import BY_DEFAULT
from nanoengine.kernels.choice import KernelChoice as KernelChoice
from nanoengine.kernels.cpu import Library, load
from nanoengine.kernels.embedding import embedding
from nanoengine.kernels.experts import RealTokens as RealTokens
from nanoengine.kernels.experts import Routing as Routing
from nanoengine.kernels.gluon import is_hopper
from nanoengine.kernels.linear import linear
from nanoengine.kernels.matmul import MAX_WEIGHTS, Ahead
from nanoengine.kernels.matvec import use_matvec

_log = logging.getLogger(__name__)
_BESIDE_LAYERS = ("sampling_triton", "step_inputs_triton")  # what runs by kernels where the layers do
_OF_MANY = (*_BESIDE_LAYERS, "sampling_scan_triton", "sampling_truncation_triton")  # their kernels call functions


class Ops:
    """Plain torch. Shapes and semantics of each operation stand beside its reference."""

    name = "torch"
    stores_kv = False
    """Whether `qk_norm_rope_store` beats norm, rotation and the backend's own store."""
    attends_qkv = False
    """Whether layers call the attention backend's `attend_qkv` first."""
    prepares_norms = False
    """Whether a product prepares the norm behind it (`matmul.Scaled`)."""
    kernels = BY_DEFAULT
    """Which of the kernels that can be turned on and off are on."""

    def embedding(self, ids: Tensor, weight: Tensor, *, first: int | None = None, out: Tensor | None = None) -> Tensor:
        """Rows of the weight: int [T], [V, D] -> [T, D]; `out`, contiguous: where they go.

        first: the weight is a part of the whole, from this id on, and rows of ids outside of it are 0."""
        return embedding(ids, weight, first=first, out=out)

    def add_rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return rms_norm.add_rms_norm(x, residual, weight, eps)

    def act_and_mul(self, gate_up: Tensor, activation: Activation = "silu") -> Tensor:
        return pointwise.act_and_mul(gate_up, activation)

    def soft_cap(self, logits: Tensor, cap: float) -> Tensor:
        """Cap logits. The caller gives them up: they may be changed in place."""
        return pointwise.soft_cap(logits, cap)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias; `out`, contiguous: where it goes."""
        y = linear(x, weight, bias)
        return y if out is None else out.copy_(y)

    def norm_linear(
        self,
        x: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        eps: float,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        gate: Activation | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`add_rms_norm`, the product, and `act_and_mul` if there is a gate -> (result, residual stream)."""
        normed, total = self.add_rms_norm(x, residual, norm_weight, eps)
        y = self.linear(normed, weight, bias)
        return (self.act_and_mul(y, gate) if gate else y), total

    def linear_add(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        *,
        next_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """The product, to be added to the residual stream: (product, residual), or (their sum, None).

        next_norm: the weight of the norm through which the sum is read next, if that is known; a hint. eps: its own.
        """
        return self.linear(x, weight, bias), residual

    def linear_over_ranks(
        self,
        x: Tensor,
        weight: Tensor,
        residual: Tensor,
        inboxes: Callable[[], Any],
        *,
        next_norm: Tensor | None = None,
    ) -> Tensor | None:
        """The product, summed over ranks, + residual; None: the caller does it. The same on all ranks, as it
        depends on what these have in common: sizes, types, how tensors lie in memory, and the kind of GPU.

        inboxes: as `TensorParallelGroup.inboxes` gives it. next_norm: as in `linear_add`."""
        return None

    def qk_norm_rope_store(
        self,
        qkv: Tensor,
        positions: Tensor,
        inv_freq: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        *,
        q_weight: Tensor | None = None,
        k_weight: Tensor | None = None,
        eps: float = 0.0,
        magnitude: float = 1.0,
        interleaved: bool = False,
    ) -> Tensor:
        return rope.qk_norm_rope_store(
            qkv, positions, inv_freq, k_cache, v_cache, slot_mapping,
            q_weight=q_weight, k_weight=k_weight, eps=eps, magnitude=magnitude, interleaved=interleaved,
        )  # fmt: skip

    def norm_router(
        self,
        x: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        eps: float,
        weight: Tensor,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`add_rms_norm`, and `router` of what it normalised -> (normalised, residual stream, float32 logits)."""
        normed, total = self.add_rms_norm(x, residual, norm_weight, eps)
        return normed, total, self.router(normed, weight, bias)

    def router(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias in float32, whatever their dtype: [T, H] -> [T, E]."""
        return mixture.router_logits(x, weight, bias)

    def route(
        self, logits: Tensor, routing: Routing, correction: Tensor | None = None, real: RealTokens | None = None
    ) -> tuple[Tensor, Tensor]:
        """Each token's experts int32 [T, k], the best first, and their weights float32 [T, k]: `experts.route`."""
        return mixture.route(logits, routing, correction, real)

    def experts(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        *,
        activation: Activation = "silu",
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        first: int = 0,
        add: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The weighted sum of each token's experts: `experts.experts`. `out`, contiguous: where it goes."""
        y = mixture.experts(
            x, ids, weights, gate_up, down, activation=activation,
            gate_up_bias=gate_up_bias, down_bias=down_bias, first=first, add=add,
        )  # fmt: skip
        return y if out is None else out.copy_(y)


class TritonOps(Ops):
    """Fused kernels on a GPU; products of up to some hundred rows by our own kernels, others by cuBLAS.

    products: whether those of more rows than the few of `matvec_triton` are.
    """

    name = "triton"
    stores_kv = True

    def __init__(self, *, attends_qkv: bool = True, products: bool = True, kernels: KernelChoice = BY_DEFAULT) -> None:
        from nanoengine.kernels import (
            activation_triton,
            embedding_triton,
            experts_triton,
            matmul_launch,
            matvec_triton,
            rms_norm_triton,
            rope_triton,
            route_triton,
        )
        from nanoengine.kernels.split_k_triton import tickets_on

        self._norm, self._pointwise, self._rope, self._matvec = (
            rms_norm_triton,
            activation_triton,
            rope_triton,
            matvec_triton,
        )
        self.attends_qkv, self.kernels = attends_qkv, kernels
        self._embedding = embedding_triton.embedding
        self._route, self._experts = route_triton, experts_triton
        self._make_tickets = tickets_on
        self._tickets: Tensor | None = None
        self._products = None
        if products:
            wide, in_parts = kernels.has("products_wide"), kernels.has("products_in_parts")
            self._products = matmul_launch.Products(wide=wide, in_parts=in_parts)
        self.prepares_norms = products
        self._ahead = Ahead()
        self._added_up: tuple[Tensor, Tensor, Tensor] | None = None  # the last sum, a norm's weight, the sum normalised
        self._streams = kernels.has("matvec_streamed")

    def embedding(self, ids: Tensor, weight: Tensor, *, first: int | None = None, out: Tensor | None = None) -> Tensor:
        made = self._embedding if ids.dim() == 1 else super().embedding
        return made(ids, weight, first=first, out=out)

    def add_rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if x.dim() == 2:
            return self._norm.add_rms_norm(x, residual, weight, eps)
        normed, _ = self._norm.add_rms_norm(x.reshape(-1, x.shape[-1]), None, weight, eps)
        return normed.view(x.shape), x

    def act_and_mul(self, gate_up: Tensor, activation: Activation = "silu") -> Tensor:
        return self._pointwise.act_and_mul(gate_up, activation)

    def soft_cap(self, logits: Tensor, cap: float) -> Tensor:
        return self._pointwise.soft_cap(logits, cap)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
        if self._products is not None and self._products.takes(x, weight, bias):
            return self._products(x, weight, out=out)[0]
        if self._few(x, weight):
            tickets = self._tickets_on(x.device)
            return self._matvec.matvec(x, weight, bias, out=out, tickets=tickets, streams=self._streams_on(x.device))
        if out is None:
            return F.linear(x, weight, bias)
        columns = weight.t()
        return torch.mm(x, columns, out=out) if bias is None else torch.addmm(bias, x, columns, out=out)

    def _few(self, x: Tensor, weight: Tensor) -> bool:
        return 0 < len(x) <= self._matvec.MAX_ROWS and use_matvec(len(x), len(weight), weight.shape[1], x.dtype)

    def _streams_on(self, device: torch.device) -> bool:
        """Others have less shared memory than Hopper GPUs. On a CPU: in Triton's interpreter."""
        return self._streams and (device.type == "cpu" or is_hopper(device))

    def _tickets_on(self, device: torch.device) -> Tensor:
        """A model's products follow each other in one stream, so they share these."""
        if self._tickets is None or self._tickets.device != device:
            self._tickets = self._make_tickets(device)
        return self._tickets

    def norm_linear(
        self,
        x: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        eps: float,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        gate: Activation | None = None,
    ) -> tuple[Tensor, Tensor]:
        scaled = self._ahead.taken(x, residual, norm_weight)
        known, self._added_up = self._added_up, None
        if known is not None and residual is None and known[0] is x and known[1] is norm_weight:
            return self._of_normed(known[2], weight, bias, gate), x
        if scaled is None and self._products is not None and self._products.gates(x, weight, bias, gate):
            normed, total = self.add_rms_norm(x, residual, norm_weight, eps)
            return self._products.gated(normed, weight), total
        if self._products is not None and self._products.takes(x, weight, bias, gate):
            if scaled is not None:
                return self._products(scaled, weight, eps=eps, gate=gate)[0], x
            if len(x) > self._matvec.MAX_ROWS or weight.numel() > MAX_WEIGHTS:
                normed, total = self.add_rms_norm(x, residual, norm_weight, eps)
                return self._products(normed, weight, gate=gate)[0], total
        if self._few(x, weight):
            tickets = self._tickets_on(x.device)
            return self._matvec.norm_matvec(
                x,
                residual,
                norm_weight,
                eps,
                weight,
                bias,
                gate=gate,
                tickets=tickets,
                streams=self._streams_on(x.device),
            )
        return super().norm_linear(x, residual, norm_weight, eps, weight, bias, gate=gate)

    def _of_normed(self, x: Tensor, weight: Tensor, bias: Tensor | None, gate: Activation | None) -> Tensor:
        if self._products is not None and self._products.gates(x, weight, bias, gate):
            return self._products.gated(x, weight)
        y = self.linear(x, weight, bias)
        return self.act_and_mul(y, gate) if gate else y

    def linear_over_ranks(
        self,
        x: Tensor,
        weight: Tensor,
        residual: Tensor,
        inboxes: Callable[[], Any],
        *,
        next_norm: Tensor | None = None,
    ) -> Tensor | None:
        self._ahead.drop()
        self._added_up = None
        if self._products is not None and self._products.takes_over_ranks(x, weight):
            return self._ahead.kept(*self._products.over_ranks(x, weight, inboxes, add=residual, next_norm=next_norm))
        if self._few(x, weight):
            streams = self._streams_on(x.device)
            return self._matvec.matvec_over_ranks(x, weight, residual, inboxes, streams=streams)
        return None

    def linear_add(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor,
        *,
        next_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        self._ahead.drop()
        self._added_up = None
        if self._products is not None and self._products.takes(x, weight, bias):
            return self._ahead.kept(*self._products(x, weight, add=residual, next_norm=next_norm)), None
        if self._few(x, weight):
            tickets = self._tickets_on(x.device)
            y = self._matvec.matvec(x, weight, bias, add=residual, tickets=tickets, streams=self._streams_on(x.device))
            return y, None
        if next_norm is not None and self._products is not None and self._products.has_parts(x, weight, bias):
            parts = self._products.parts(x, weight)
            normed, total = self._norm.sum_rms_norm(parts, residual, next_norm, eps)
            self._added_up = total, next_norm, normed
            return total, None
        return super().linear_add(x, weight, bias, residual)

    def qk_norm_rope_store(
        self,
        qkv: Tensor,
        positions: Tensor,
        inv_freq: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        slot_mapping: Tensor,
        *,
        q_weight: Tensor | None = None,
        k_weight: Tensor | None = None,
        eps: float = 0.0,
        magnitude: float = 1.0,
        interleaved: bool = False,
    ) -> Tensor:
        return self._rope.qk_norm_rope_store(
            qkv, positions, inv_freq, k_cache, v_cache, slot_mapping,
            q_weight=q_weight, k_weight=k_weight, eps=eps, magnitude=magnitude, interleaved=interleaved,
        )  # fmt: skip

    def norm_router(
        self,
        x: Tensor,
        residual: Tensor | None,
        norm_weight: Tensor,
        eps: float,
        weight: Tensor,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if 0 < len(x) <= self._route.MAX_NORM_ROWS:
            return self._route.norm_router(x, residual, norm_weight, eps, weight, bias)
        return super().norm_router(x, residual, norm_weight, eps, weight, bias)

    def router(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self._few(x, weight):
            out = torch.empty(len(x), len(weight), dtype=torch.float32, device=x.device)
            tickets = self._tickets_on(x.device)
            return self._matvec.matvec(x, weight, bias, out=out, tickets=tickets, streams=self._streams_on(x.device))
        if not x.is_cuda or x.dtype == torch.float32:
            return super().router(x, weight, bias)
        logits = torch.mm(x, weight.t(), out_dtype=torch.float32)
        return logits if bias is None else logits.add_(bias)

    def route(
        self, logits: Tensor, routing: Routing, correction: Tensor | None = None, real: RealTokens | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._route.route(logits, routing, correction, real)

    def experts(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        *,
        activation: Activation = "silu",
        gate_up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
        first: int = 0,
        add: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        return self._experts.experts(
            x, ids, weights, gate_up, down, activation=activation,
            gate_up_bias=gate_up_bias, down_bias=down_bias, first=first, add=add, out=out,
        )  # fmt: skip


class CpuOps(Ops):
    """Kernels in C for float32 that is contiguous; torch for anything else.

    Attributes:
        library: by which methods of quantised weights multiply.
    """

    name = "cpu"

    def __init__(self, library: Library, *, attends_qkv: bool = True) -> None:
        self.library, self.attends_qkv = library, attends_qkv

    def add_rms_norm(self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if _plain(x, weight) and (residual is None or _plain(residual)):
            return self.library.add_rms_norm(x, residual, weight, eps)
        return super().add_rms_norm(x, residual, weight, eps)

    def act_and_mul(self, gate_up: Tensor, activation: Activation = "silu") -> Tensor:
        if _plain(gate_up):
            return self.library.act_and_mul(gate_up, activation)
        return super().act_and_mul(gate_up, activation)


def _plain(x: Tensor, weight: Tensor | None = None) -> bool:
    """Whether kernels in C take these rows, and this weight of their width."""
    ours = x.dim() == 2 and x.dtype is torch.float32 and x.is_contiguous()
    return ours and (weight is None or (weight.dtype is torch.float32 and weight.shape == x.shape[1:]))


def ops_for(
    device: torch.device,
    *,
    fuse: bool = True,
    attends_qkv: bool = True,
    products: bool = True,
    kernels: KernelChoice = BY_DEFAULT,
    cache: Path | None = None,
) -> Ops:
    """Triton's where it is installed and the device is a GPU, those in C on a CPU, unless fusing is off.

    cache: the folder in which kernels in C are built; None: they are not used.

    An installation that is broken costs speed, which is said, and nothing else.
    """
    if fuse and device.type == "cpu" and cache is not None:
        return _on_cpu(cache, attends_qkv)
    if not fuse or device.type != "cuda":
        return Ops()
    try:
        if importlib.util.find_spec("triton") is None:
            return Ops()
        for name in _OF_MANY:
            make_keys(importlib.import_module(f"nanoengine.kernels.{name}"))
        return TritonOps(attends_qkv=attends_qkv, products=products, kernels=kernels)
    except Exception as error:  # noqa: BLE001 - a broken package raises what it likes
        _log.warning(
            "the fused kernels cannot be imported, layers and sampling run on plain torch: %s: %s; reinstall triton "
            "(pip install 'nanoengine[triton]'), or set engine.fuse_kernels=false",
            type(error).__name__, str(error),
        )  # fmt: skip
        return Ops()


def _on_cpu(cache: Path, attends_qkv: bool) -> Ops:
    found = load(cache)
    if isinstance(found, Library):
        return CpuOps(found, attends_qkv=attends_qkv)
    _log.warning(
        "the CPU kernels are not used, layers run on plain torch, which is slower: %s, or engine.fuse_kernels=false to "
        "do without", found,
    )  # fmt: skip
    return Ops()
