"""Matrix products of 33 to some hundred rows with what stands around them in a layer: the reference of
`matmul_triton` and `matmul_gluon`, and which of them makes a product, in which tiles.

A root-mean-square norm between two products takes no launch. The product before it knows its whole result, and of a
row's sum of squares its own part: it writes the result, the result times the norm's weight, and the parts (`Scaled`).
The product behind it reads what is multiplied already, and applies the scale of each row to its own sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.matvec import matvec

MIN_ROWS, MAX_ROWS, MAX_GATED_ROWS = 33, 256, 16384
_GLUON_ROWS = 192  # beyond, the same tiles by Triton's own pipeline are faster
_SHORT = 1024  # of outputs or of K, as in Qwen3-0.6B
_MAX_WEIGHTS = 8 << 20
MOST_SPLITS = 4
_SHARED_BYTES = 200 << 10  # of 227 KiB that a program may have


@dataclass(frozen=True, slots=True)
class MatmulTile:
    """Rows, outputs and K a tile, warps, pipeline stages. gluon: by `matmul_gluon`, else by `matmul_triton`. splits:
    parts of K, each a program of its own; only with gluon, and of x that no norm is to be applied to."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    gluon: bool = False
    splits: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Scaled:
    """What a norm needs of the result of the product before it.

    norm_weight: [N]. values: the result times it, [T, N], rounded. squares: float32 [parts, T]; the sum over parts is
    that of the squares of a row.
    """

    norm_weight: Tensor
    values: Tensor
    squares: Tensor


class Ahead:
    """The last sum that a product wrote down, and what the norm behind it needs of it."""

    def __init__(self) -> None:
        self._sum: tuple[Tensor, Scaled] | None = None

    def kept(self, total: Tensor, scaled: Scaled | None) -> Tensor:
        """Returns `total`."""
        self._sum = None if scaled is None else (total, scaled)
        return total

    def drop(self) -> None:
        self._sum = None

    def taken(self, x: Tensor, residual: Tensor | None, norm_weight: Tensor) -> Scaled | None:
        """Of x, for a norm with this weight; None: x is another tensor, or is to be added to. It is dropped."""
        found, self._sum = self._sum, None
        if found is None or residual is not None or found[0] is not x or found[1].norm_weight is not norm_weight:
            return None
        return found[1]


def matmul(
    x: Tensor | Scaled,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 0.0,
    gate: Activation | None = None,
    add: Tensor | None = None,
    next_norm: Tensor | None = None,
) -> tuple[Tensor, Scaled | None]:
    """As `matvec.matvec`, of x [T, K], or of x normalised (`Scaled`, with the norm's `eps`).

    next_norm: [outputs]; the weight of the norm that follows, for which `Scaled` is returned, else None.
    """
    if isinstance(x, Scaled):
        mean = x.squares.sum(0).unsqueeze(1) / x.values.shape[1]
        normed = x.values.float() * torch.rsqrt(mean + eps)
        dtype, operand = x.values.dtype, normed
    else:
        dtype, operand = x.dtype, x.float()
    rest = [None if t is None else t.float() for t in (bias, add)]
    y = matvec(operand, weight.float(), rest[0], gate=gate, add=rest[1]).to(dtype)
    if next_norm is None:
        return y, None
    wide = y.float()
    return y, Scaled(next_norm, (wide * next_norm.float()).to(dtype), wide.square().sum(1).unsqueeze(0))


def matmul_tile(
    rows: int, outputs: int, k: int, *, gated: bool, itemsize: int, normed: bool = False, multiprocessors: int = 132
) -> MatmulTile | None:
    """The tile of a product. normed: x is `Scaled`. None: cuBLAS, or the kernels for few rows, are as fast or faster,
    or it was not measured.

    From a chain of layers of Qwen3-0.6B (bf16, one H200, torch 2.11, Triton 3.6, 2026-11-29; 174 tiles, each by both
    kernels); larger models were not measured. Beyond 128 rows what counts is how much tiles read from L2 (about
    7.5 TB/s); beyond 256 rows cuBLAS, whose programs share what they read, is faster, even with norms as launches of
    their own; but not than a product with a gate, which needs no launch for it (448, 704, 1088, 2048 and 8192 rows).
    """
    weights, most = outputs * k * (2 if gated else 1), MAX_GATED_ROWS if gated else MAX_ROWS
    if itemsize != 2 or not MIN_ROWS <= rows <= most or weights > _MAX_WEIGHTS or min(outputs, k) > _SHORT:
        return None
    if k % 128 or outputs % 64:
        return None
    if rows > MAX_ROWS:
        wide = 576 < rows <= 832 and outputs % 128 == 0
        return MatmulTile(64, 128, 64, warps=4, stages=5) if wide else MatmulTile(128, 64, 64, warps=8, stages=3)
    if outputs <= _SHORT < k and not gated and not normed:
        # Few tiles, and long rows of x, of which small tiles would read too much: so parts of K. At 64, 128 and 256
        # rows the products of a layer take 18.6, 23.3 and 29.9 us with them, 22.1, 24.3 and 30.8 in tiles of 32.
        splits, tiles = MOST_SPLITS if rows <= 64 else 2, -(-rows // 64) * (outputs // 64)
        if k % (128 * splits) == 0 and tiles * splits <= multiprocessors:  # they wait for each other
            return _deepest(64, 64, 128, gluon=True, splits=splits)
    few = outputs <= _SHORT  # small tiles, so that there is a program for every other multiprocessor
    if rows > _GLUON_ROWS:
        return _deepest(128, 64, 64, gated=True) if gated else _deepest(64, 32 if few else 128, 128)
    block_n = 32 if few or (gated and rows <= 64) else 64
    return _deepest(64, block_n, 128, gated=gated, gluon=True)


def _deepest(
    block_m: int, block_n: int, block_k: int, *, gated: bool = False, gluon: bool = False, splits: int = 1
) -> MatmulTile:
    """With as many stages as shared memory holds, up to eight: bytes in flight count most."""
    stage = (block_m + block_n * (2 if gated else 1)) * block_k * 2
    return MatmulTile(block_m, block_n, block_k, 4, min(8, _SHARED_BYTES // stage), gluon, splits)
