"""Products with weights of eight bits, FP8 (e4m3) or INT8, in plain torch: the reference of `eight_bit_triton`."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from nanoengine.kernels.activation import Activation, act_and_mul
from nanoengine.kernels.experts import sorted_pairs
from nanoengine.kernels.linear import linear
from nanoengine.kernels.rms_norm import add_rms_norm

Inputs = Literal["plain", "token", "group", "tensor"]

LEAST = 1e-12  # of what a scale is made from, so that a row of zeros has one
_CHUNK = 1 << 21  # values of a weight that are float32 at a time


@dataclass(frozen=True, slots=True)
class EightBit:
    """A weight of eight bits, and how what it is multiplied with is quantised.

    Attributes:
        weight: float8_e4m3fn or int8 [N, K], row-major; of experts [E, N, K].
        scale: float32 [ceil(N / rows), ceil(K / columns)]; a weight's value is its code times its block's scale. Of
            experts one more dimension, the first.
        rows, columns: outputs and inputs of a block. One scale an output is rows=1, columns=K.
        inputs: "plain": x is not quantised. Otherwise x is quantised to the weight's dtype, with a scale for each
            token, for each `columns` inputs of a token ("group"), or with `input_scale` ("tensor").
        input_scale: float32 [1]. bound: float32 [1]; with "token": what is larger does not count for the scale.
        streamed: on a GPU products of one row are those of `eight_bit_streamed_triton`, where it takes them.
    """

    weight: Tensor
    scale: Tensor
    rows: int
    columns: int
    inputs: Inputs
    input_scale: Tensor | None = None
    bound: Tensor | None = None
    streamed: bool = False

    @property
    def limit(self) -> float:
        """The largest code."""
        return 127.0 if self.weight.dtype == torch.int8 else 448.0

    @property
    def group(self) -> int:
        """Inputs that share a scale of x."""
        return self.columns if self.inputs == "group" else self.weight.shape[-1]

    @property
    def group_of_all(self) -> bool:
        """Whether an output has one scale, and x no groups."""
        return self.columns >= self.weight.shape[-1] and self.inputs != "group"


def quantised(x: Tensor, w: EightBit) -> tuple[Tensor, Tensor]:
    """x as codes of the weight's dtype [T, K], and their float32 scales [T, ceil(K / w.group)].

    Codes are rounded to nearest, ties to even, and limited to the largest one. A scale is NaN if what it scales is
    not finite.
    """
    count = -(-x.shape[1] // w.group)
    values = torch.nn.functional.pad(x.float(), (0, count * w.group - x.shape[1])).view(len(x), count, w.group)
    if w.inputs == "tensor":
        assert w.input_scale is not None
        scale = w.input_scale.expand(len(x), 1)
    else:
        most = values.abs().amax(2)
        most = most if w.bound is None else torch.where(most > w.bound, w.bound, most)
        scale = most.clamp_min(LEAST) / most.new_full((), w.limit)  # by a number it is a product on a GPU
    codes = (values / scale.unsqueeze(2)).clamp(-w.limit, w.limit)
    scale = scale + (values - values).sum(2)  # NaN, if one of them is not finite: a limited code no longer says so
    if w.weight.dtype == torch.int8:
        codes = codes.round().nan_to_num_(0.0)
    return codes.flatten(1)[:, : x.shape[1]].to(w.weight.dtype), scale.contiguous()


def seen(x: Tensor, w: EightBit) -> Tensor:
    """float32: x as the product sees it, quantised and dequantised."""
    if w.inputs == "plain":
        return x.float()
    codes, scale = quantised(x, w)
    return codes.float() * scale.repeat_interleave(w.group, 1)[:, : x.shape[1]]


def dequantised(w: EightBit, first: int = 0, last: int | None = None) -> Tensor:
    """float32: the values of outputs `first` to `last` [outputs, K]."""
    codes = w.weight[first:last]
    count, inputs = codes.shape
    scale = w.scale[first:last] if w.rows == 1 else w.scale[_rows(first, count, codes.device) // w.rows]
    values = _widened(codes)
    if inputs % w.columns:
        return values.mul_(scale.repeat_interleave(w.columns, 1)[:, :inputs])
    return values.view(count, -1, w.columns).mul_(scale.unsqueeze(2)).view(count, inputs)


def _rows(first: int, count: int, device: torch.device) -> Tensor:
    return torch.arange(first, first + count, device=device)


def _widened(codes: Tensor) -> Tensor:
    """The codes as float32. On a CPU torch takes forty times as long for those of FP8 as for other dtypes.

    The bits of FP8 (sign, 4 of the exponent, 3) are those of a float16 with a smaller bias, of 2^-8 of the value. Only
    NaN has no such one.
    """
    if codes.dtype == torch.int8 or codes.is_cuda or not codes.numel():
        return codes.float()
    signed = codes.view(torch.int8)
    if int(signed.amax()) == 127 or int(codes.view(torch.uint8).amax()) == 255:  # NaN
        return codes.float()
    halves = (signed.to(torch.int16) << 7).bitwise_and_(-16512)  # sign and the lowest 7 bits
    return halves.view(torch.float16).float().mul_(256.0)


@functools.cache
def whole_products() -> bool:
    """Whether torch multiplies INT8 matrices exactly on this CPU: where it has no VNNI, sums of pairs saturate."""
    a = torch.tensor([[127], [-127], [-128]], dtype=torch.int8).repeat(1, 256)
    exact = a.long() @ a.long().t()
    return all(torch.equal(torch._int_mm(a[:rows], a.t()).long(), exact[:rows]) for rows in (1, 3))


def _by_whole_numbers(w: EightBit, x: Tensor) -> bool:
    """Whether the product is one of whole numbers, with a scale for each row and output."""
    one_each = w.rows == 1 and w.columns == w.group == w.weight.shape[1]
    return one_each and w.inputs != "plain" and w.weight.dtype == torch.int8 and not x.is_cuda and whole_products()


def _times(w: EightBit, x: Tensor) -> Tensor:
    """float32 [T, N]: x, quantised as `w` says, times the weight."""
    if len(x) and _by_whole_numbers(w, x):
        codes, scale = quantised(x, w)
        return torch._int_mm(codes, w.weight.t()).float().mul_(scale).mul_(w.scale.t())
    values, step = seen(x, w), max(1, _CHUNK // max(1, w.weight.shape[1]))
    pieces = [linear(values, dequantised(w, at, at + step)) for at in range(0, len(w.weight), step)]
    return torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]


def product(
    w: EightBit,
    x: Tensor,
    bias: Tensor | None = None,
    *,
    gate: Activation | None = None,
    add: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x, quantised as `w` says, times the weight; then what usually follows: as `matvec.matvec`.

    Sums and what follows them are float32, rounded once to x's dtype, or to that of `out`, which receives the result.
    """
    y = _times(w, x)
    y = y if bias is None else y + bias.float()
    y = act_and_mul(y, gate) if gate else y
    y = y if add is None else y + add.float()
    return y.to(x.dtype) if out is None else out.copy_(y)


def product_added(w: EightBit, x: Tensor, bias: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor | None]:
    """`product`, to be added to the residual stream: (product, residual), or (their sum, None)."""
    return product(w, x, bias, add=residual), None


def norm_product(
    w: EightBit,
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    bias: Tensor | None = None,
    *,
    gate: Activation | None = None,
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm`, then `product` of what it normalised. Returns (product, residual stream [T, K])."""
    normed, total = add_rms_norm(x, residual, norm_weight, eps)
    return product(w, normed, bias, gate=gate), total


def experts(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: EightBit,
    down: EightBit,
    *,
    activation: Activation = "silu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    first: int = 0,
    add: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As `kernels.experts.experts`, expert by expert; `out` receives the result. It waits for a GPU.

    What stands between both products is rounded to x's dtype, and quantised again as `down` says.
    """
    count = len(down.weight)
    local = ids.long() - first
    local = torch.where((local >= 0) & (local < count), local, count)
    order, counts = sorted_pairs(local, count)
    parts = x.new_zeros(local.numel(), down.weight.shape[1])
    for e, pairs in enumerate(torch.split(order, counts.tolist())[:count]):
        if len(pairs):
            bias, last = (None if each is None else each[e] for each in (gate_up_bias, down_bias))
            inner = product(of_expert(gate_up, e), x[pairs // ids.shape[1]], bias, gate=activation)
            parts[pairs] = product(of_expert(down, e), inner, last)
    shares = weights.masked_fill(local == count, 0.0).unsqueeze(-1)
    y = (parts.view(*local.shape, -1).float() * shares).sum(1)
    y = (y if add is None else y + add.float()).to(x.dtype)
    return y if out is None else out.copy_(y)


def of_expert(w: EightBit, expert: int) -> EightBit:
    """One of a stack."""
    return replace(w, weight=w.weight[expert], scale=w.scale[expert])
