"""Matrix products of 33 to some hundred rows with what stands around them in a layer: the reference of
`matmul_triton` and `matmul_gluon`, and which of them makes a product, in which tiles.

A root-mean-square norm between two products takes no launch. The product before it knows its whole result, and of a
row's sum of squares its own part: it writes the result, the result times the norm's weight, and the parts (`Scaled`).
The product behind it reads what is multiplied already, and applies the scale of each row to its own sums.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.matvec import matvec

MIN_ROWS, MAX_GATED_ROWS = 33, 16384
FEW_ROWS = 64  # up to which products with large weights are ours
_WAVE_ROWS = 512  # tiles of up to so many rows are one wave of programs
_SHORT = 1024  # of outputs or of K, as in Qwen3-0.6B
MAX_WEIGHTS = 8 << 20  # as in Qwen3-0.6B
MOST_SPLITS = 4
PARTS = 2  # of K, that the norm behind a product adds up
WIDE_ROWS, WIDE_OUTPUTS = 256, 96  # of `matmul_wide_gluon`
_SHARED_BYTES = 200 << 10  # of 227 KiB that a program may have


@dataclass(frozen=True, slots=True)
class MatmulTile:
    """Rows, outputs and K a tile, warps, pipeline stages. gluon: by `matmul_gluon`, else by `matmul_triton`, which has
    nothing of what follows. splits: parts of K, each a program of its own; only of x that no norm is to be applied to.
    staged: results pass through shared memory, so that threads read and write whole lines."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    gluon: bool = False
    splits: int = 1
    staged: bool = False


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

    From chains of layers of Qwen3-0.6B (bf16, one H200, torch 2.11, Triton 3.6, 2026-11-30; some 60 tiles a product at
    128, 256, 448, 704 and 1088 rows; 64 rows a day before). Of Qwen3-8B, cuBLAS is faster. Beyond 128 rows what counts
    is how much tiles read from L2 (about 7.5 TB/s).
    """
    weights = outputs * k * (2 if gated else 1)
    if itemsize != 2 or not MIN_ROWS <= rows <= MAX_GATED_ROWS or k % 128 or outputs % 64:
        return None
    if weights > MAX_WEIGHTS:
        return _tile_of_large(rows, outputs, k, gated=gated) if min(outputs, k) > _SHORT else None
    if min(outputs, k) > _SHORT:
        return None
    if rows > 256:
        return _tile_of_many(rows, outputs, k, gated=gated)
    if outputs <= _SHORT < k and not gated and not normed and (rows <= 64 or k > 2 * _SHORT):
        # Few tiles, and long rows of x, of which small tiles would read too much: so parts of K.
        splits, tiles = MOST_SPLITS if rows <= 64 else 2, -(-rows // 64) * (outputs // 64)
        if k % (128 * splits) == 0 and tiles * splits <= multiprocessors:  # they wait for each other
            return _deepest(64, 64, 128, splits=splits)
    if gated and rows > 64:
        return _deepest(64 if rows <= 192 else 128, 64, 64, gated=True)
    if gated or outputs <= _SHORT:  # small tiles, so that there is a program for every other multiprocessor
        return _deepest(64, 32, 128, gated=gated)
    return _deepest(64, 64, 128) if rows <= 192 else MatmulTile(64, 128, 128, warps=4, stages=4)


def _tile_of_many(rows: int, outputs: int, k: int, *, gated: bool) -> MatmulTile | None:
    """More than 256 rows. Where tiles are more than one wave of programs cuBLAS, whose programs share what they read,
    is faster, even with norms as launches of their own; but not than a product with a gate, which needs no launch for
    it, nor, some rows further, than one that adds up many values."""
    if gated:
        if 576 < rows <= 832 and outputs % 128 == 0:
            return MatmulTile(64, 128, 64, warps=4, stages=5)
        return MatmulTile(128, 64, 64, warps=8, stages=3, gluon=True, staged=rows > 832)
    if outputs > _SHORT:
        one_wave = rows <= _WAVE_ROWS and outputs <= 4 * _SHORT
        return MatmulTile(64, 128, 64, warps=4, stages=4, gluon=True, staged=True) if one_wave else None
    if rows <= _WAVE_ROWS:
        return _deepest(64, 64, 128 if k > 2 * _SHORT else 64)
    return MatmulTile(128, 64, 64, warps=8, stages=8, gluon=True) if 576 < rows <= 832 and k > 2 * _SHORT else None


def _tile_of_large(rows: int, outputs: int, k: int, *, gated: bool) -> MatmulTile | None:
    """Of one of two ranks of Qwen3-8B, or near it. Microseconds a layer of products and norms (one H200, 2026-11-30; 8
    to 16 tiles a product): 64 rows, by cuBLAS for gate and up and the kernels for few rows for the others, 71.8; by
    these, and cuBLAS for o, 64.2. 256 rows, by cuBLAS, 96.4; by these for down 95.0."""
    if not 2048 <= k <= 8192 or not 3072 <= outputs <= (8192 if gated else 4096):
        return None
    if rows <= FEW_ROWS:
        if gated:
            return _deepest(64, 32, 64, gated=True, room=_SHARED_BYTES // 2)
        return _deepest(64, 32, 128) if outputs == 3072 or k > 4096 else None
    return _deepest(128, 64, 64) if 192 < rows <= 256 and not gated and k > 4096 else None


def takes_parts(rows: int, outputs: int, k: int, itemsize: int, multiprocessors: int) -> bool:
    """Whether a product is left in `PARTS` parts of K, which the norm behind it adds up: where they are one wave of
    cuBLAS's tiles of 128 x 128, of as many rows and such long sums as were measured.

    Down of Qwen3-8B, 256 rows, microseconds (one H200, 2026-11-30): 38.1, and by cuBLAS, which adds up two parts in a
    kernel of its own, 42.4.
    """
    if itemsize != 2 or k % (64 * PARTS) or k < 2 * outputs:
        return False
    tiles = -(-outputs // 128) * -(-rows // 128) * PARTS
    return 192 < rows <= 256 and 0.9 * multiprocessors <= tiles <= multiprocessors


def takes_wide(rows: int, outputs: int, k: int, itemsize: int, multiprocessors: int) -> bool:
    """Whether `matmul_wide_gluon` makes a product with a gate: where its tiles are one wave that leaves few
    multiprocessors without work, of as many rows as were measured.

    Microseconds of gate and up (one H200, 2026-11-30). Of Qwen3-8B, 256 rows: 70.1, and by cuBLAS and a launch for the
    gate 75.8. Of Qwen3-0.6B, and by the kernels above:

        rows                512    640    768   1024   1280   1792
        this               18.4   19.4   19.7   20.9   37.5   40.1
        others             13.8   17.8   24.5   22.6   26.1   37.9
    """
    if itemsize != 2 or outputs % WIDE_OUTPUTS or k % 64 or k < 256:
        return False
    tiles = outputs // WIDE_OUTPUTS * -(-rows // WIDE_ROWS)
    if min(outputs, k) <= _SHORT:
        return 704 < rows <= 4 * WIDE_ROWS and 0.7 * multiprocessors <= tiles <= multiprocessors
    return 192 < rows <= WIDE_ROWS and 0.9 * multiprocessors <= tiles <= multiprocessors


def _deepest(
    block_m: int, block_n: int, block_k: int, *, gated: bool = False, splits: int = 1, room: int = _SHARED_BYTES
) -> MatmulTile:
    """By Gluon, with as many stages as `room` holds, up to eight: bytes in flight count most."""
    stage = (block_m + block_n * (2 if gated else 1)) * block_k * 2
    return MatmulTile(block_m, block_n, block_k, 4, min(8, room // stage), gluon=True, splits=splits)


def tile_over_ranks(rows: int, outputs: int, k: int, *, itemsize: int) -> MatmulTile | None:
    """The tile of a product that ends with its sum over ranks. None: as in `matmul_tile`.

    Not of 2 to 32 rows: for them tiles of 64 rows cost more than a sum that is read (two H200s, 2026-11-30).
    Of 256 rows of Qwen3-8B's halves of o and down it is as fast as cuBLAS (one H200, 2026-11-30)."""
    if itemsize != 2 or not MIN_ROWS <= rows <= 256 or not 2 * _SHORT <= outputs <= 4 * _SHORT:
        return None
    if k % 128 or outputs % 64 or k < _SHORT:
        return None
    tile = (64, 32, 128) if rows <= FEW_ROWS else (64, 64, 128) if rows <= 128 else (128, 64, 64)
    return replace(_deepest(*tile), staged=True)  # whole lines go to the other ranks
