"""Products of some hundred rows by tensor cores, with weights in shared memory before the kernel in front has ended;
see `matmul`. Compute capability 9.0 only.

Gluon says where everything lies, which Triton does not: all stages of a tile's weights are asked for before the wait,
those of x behind it, and what the end needs of other tensors before the products. Gluon has no interpreter, so this
kernel is tested on a GPU, and compiled everywhere; `matmul_triton` is the same without the order.

Where tiles are few, K is cut in parts. All programs run at the same time, so those of a tile wait for each other, and
each adds up, in order, and finishes its share of the tile's rows: nothing is left for a last one to do. Programs of a
tile follow each other, so that a GPU that runs fewer at a time would still come to an end.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nanoengine.kernels.inboxes_gluon import addresses, barrier, by_copies, next_turn, over_ranks
from nanoengine.kernels.inboxes_triton import Inboxes
from nanoengine.kernels.matmul import MatmulTile, Scaled
from nanoengine.kernels.matmul_triton import Launch

_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def _wait_for_inputs():
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _release_dependents():
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _ask_for_weights(weight_desc, weights, ready, stage, n, k, N: gl.constexpr, BLOCK_N: gl.constexpr,
                     GATED: gl.constexpr, BYTES: gl.constexpr):  # fmt: skip
    """Rows of the gate, and below them those of up. BYTES: of all that belongs to a stage, x too."""
    mbarrier.expect(ready.index(stage), BYTES)
    if GATED:
        gate, up = weights.index(stage).slice(0, BLOCK_N), weights.index(stage).slice(BLOCK_N, BLOCK_N)
        tma.async_copy_global_to_shared(weight_desc, [n, k], ready.index(stage), gate)
        tma.async_copy_global_to_shared(weight_desc, [N + n, k], ready.index(stage), up)
    else:
        tma.async_copy_global_to_shared(weight_desc, [n, k], ready.index(stage), weights.index(stage))


@gluon.jit
def _halves(acc):
    """[M, N] -> the left and the right half of the columns; each thread keeps what it has."""
    m: gl.constexpr = acc.shape[0]
    n: gl.constexpr = acc.shape[1]
    return gl.split(gl.permute(gl.reshape(acc, [m, 2, n // 2]), (0, 2, 1)))


@gluon.jit
def _squares(squares_ptr, rows, m0, BLOCK_M: gl.constexpr, PARTS: gl.constexpr, WARPS: gl.constexpr):
    """[parts, BLOCK_M], to be added up over parts, which are one thread's: they may arrive during the products."""
    at: gl.constexpr = gl.BlockedLayout([32, 1], [1, 32], [1, WARPS], [1, 0])
    p = gl.arange(0, 32, layout=gl.SliceLayout(1, at))[:, None]
    m = m0 + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, at))[None, :]
    square = gl.load(squares_ptr + p * rows + m, mask=(p < PARTS) & (m < rows), other=0.0)
    for first in gl.static_range(32, PARTS, 32):
        mask = (first + p < PARTS) & (m < rows)
        square += gl.load(squares_ptr + (first + p) * rows + m, mask=mask, other=0.0)
    return square


@gluon.jit
def _share_of_parts(acc, part_ptr, ticket_ptr, at, layout: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
                    SPLITS: gl.constexpr):  # fmt: skip
    """Leaves this program's sums [BLOCK_M, BLOCK_N], waits for those of the tile's other programs, and adds up the rows
    that are its own: [BLOCK_M / SPLITS, BLOCK_N]. `at`: their places in a tile.

    Each launch adds SPLITS, a power of two, to a tile's ticket, which may overflow: so nothing has to set it back."""
    size: gl.constexpr = BLOCK_M * BLOCK_N
    part = part_ptr + gl.program_id(1) * (SPLITS * size)
    ticket = ticket_ptr + gl.program_id(1)
    r = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, acc.type.layout))
    c = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, acc.type.layout))
    gl.store(part + gl.program_id(0) * size + r[:, None] * BLOCK_N + c[None, :], acc)
    barrier()  # every thread's part is written before one of them releases the ticket
    end = (gl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu") & -SPLITS) + SPLITS
    while gl.atomic_add(ticket, 0, sem="acquire", scope="gpu") - end < 0:
        pass
    barrier()
    y = gl.zeros([BLOCK_M // SPLITS, BLOCK_N], gl.float32, layout=layout)
    for split in gl.static_range(SPLITS):  # .cg: other programs wrote it; never from this multiprocessor's own L1
        y += gl.load(part + split * size + at, cache_modifier=".cg")
    return y


@gluon.jit(do_not_specialize=["rows"])
def _matmul_kernel(
    x_desc, weight_desc, squares_ptr, add_ptr, next_ptr, y_ptr, scaled_ptr, sums_ptr, part_ptr, ticket_ptr,
    data, signals, turns, rows, add_stride, capacity, eps,
    N: gl.constexpr, K: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr, SQUARES: gl.constexpr, GATED: gl.constexpr, HAS_ADD: gl.constexpr, NEXT: gl.constexpr,
    WARPS: gl.constexpr, SPLITS: gl.constexpr, STAGED: gl.constexpr, RANK: gl.constexpr, SIZE: gl.constexpr,
    PLACES: gl.constexpr, SHARE: gl.constexpr,
):  # fmt: skip
    tiles_m = gl.cdiv(rows, BLOCK_M)
    tile_n = gl.program_id(1) // tiles_m
    m0, n0 = (gl.program_id(1) % tiles_m) * BLOCK_M, tile_n * BLOCK_N
    steps: gl.constexpr = (K // SPLITS + BLOCK_K - 1) // BLOCK_K
    first = gl.program_id(0) * (steps * BLOCK_K)
    width: gl.constexpr = BLOCK_N * (2 if GATED else 1)
    size: gl.constexpr = (BLOCK_M + width) * BLOCK_K * 2
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    ws = gl.allocate_shared_memory(weight_desc.dtype, [STAGES, width, BLOCK_K], weight_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    _release_dependents()
    for i in gl.static_range(STAGES):
        if i < steps:
            _ask_for_weights(weight_desc, ws, ready, i, n0, first + i * BLOCK_K, N, BLOCK_N, GATED, size)
    if SIZE > 1:
        inboxes, flags = addresses(data, SIZE), addresses(signals, SIZE)
    _wait_for_inputs()
    for i in gl.static_range(STAGES):
        if i < steps:
            tma.async_copy_global_to_shared(x_desc, [m0, first + i * BLOCK_K], ready.index(i), xs.index(i))

    products: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, width, 16]
    )
    acc = gl.zeros([BLOCK_M, width], gl.float32, layout=products)
    if GATED:
        like, _ = _halves(acc)
    else:
        like = acc
    direct: gl.constexpr = like.type.layout
    # What a thread holds at the end: of a share of parts, or of whole lines, or what the products leave.
    lanes: gl.constexpr = 32 if BLOCK_N >= 256 else BLOCK_N // 8
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [32 // lanes, lanes], [WARPS, 1], [1, 0])
    shares: gl.constexpr = gl.BlockedLayout([1, 4], [128 // BLOCK_N, BLOCK_N // 4], [WARPS, 1], [1, 0])
    layout: gl.constexpr = shares if SPLITS > 1 else lines if STAGED else direct
    own: gl.constexpr = BLOCK_M // SPLITS
    o = gl.program_id(0) * own + gl.arange(0, own, layout=gl.SliceLayout(1, layout))
    c = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
    m, n = m0 + o, n0 + c
    row, mask = m.to(gl.int64)[:, None], (m < rows)[:, None] & (n < N)[None, :]
    # Read in front of the products, so that nothing is waited for behind them.
    if SQUARES > 0:
        square = _squares(squares_ptr, rows, m0, BLOCK_M, SQUARES, WARPS)
    if HAS_ADD:
        add = gl.load(add_ptr + row * add_stride + n[None, :], mask=mask, other=0.0)
    if SIZE > 1:
        place, turn = next_turn(turns)
    if NEXT:
        next_weight = gl.load(next_ptr + n, mask=n < N, other=0.0)

    for step in range(steps):
        stage = step % STAGES
        mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        acc = warpgroup_mma(xs.index(stage), ws.index(stage).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        later = step - 1 + STAGES
        if (step >= 1) & (later < steps):  # the product before this one is done with its stage
            free = (step - 1) % STAGES
            _ask_for_weights(weight_desc, ws, ready, free, n0, first + later * BLOCK_K, N, BLOCK_N, GATED, size)
            tma.async_copy_global_to_shared(x_desc, [m0, first + later * BLOCK_K], ready.index(free), xs.index(free))
    acc = warpgroup_mma_wait(0, deps=(acc,))

    if SPLITS > 1:  # without squares and gate
        at = o[:, None] * BLOCK_N + c[None, :]
        y = _share_of_parts(acc, part_ptr, ticket_ptr, at, layout, BLOCK_M, BLOCK_N, SPLITS)
    elif GATED:
        y, up = _halves(acc)
    else:
        y = acc
    if SQUARES > 0:
        scale = gl.rsqrt(gl.sum(square, 0) / K + eps)
        scale = gl.convert_layout(scale, gl.SliceLayout(1, direct))[:, None]
        y = y * scale
        if GATED:
            up = up * scale
    if GATED:
        y = y / (1.0 + gl.exp(-y)) * up
    y = gl.convert_layout(y, layout)
    if SIZE > 1:
        at = row * N + n[None, :]
        y = over_ranks(y, at, mask, y_ptr.dtype.element_ty, inboxes, flags, turns, place, turn, capacity,
                       RANK, SIZE, PLACES, SHARE, WARPS)  # fmt: skip
    if HAS_ADD:
        y += add.to(gl.float32)
    out = y.to(y_ptr.dtype.element_ty)
    gl.store(y_ptr + row * N + n[None, :], out, mask=mask)
    if NEXT:
        wide = gl.where(mask, out.to(gl.float32), 0.0)
        scaled = wide * next_weight.to(gl.float32)[None, :]
        gl.store(scaled_ptr + row * N + n[None, :], scaled.to(out.dtype), mask=mask)
        gl.store(sums_ptr + tile_n * rows + m, gl.sum(wide * wide, 1), mask=m < rows)


def shared_layout(rows: int, k: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a tile lies in shared memory."""
    return gl.NVMMASharedLayout.get_default_for([rows, k], _TYPES[dtype])


def _described(x: Tensor, rows: int, k: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(x, [rows, k], shared_layout(rows, k, x.dtype))


def matmul(
    x: Tensor | Scaled,
    weight: Tensor,
    *,
    tile: MatmulTile,
    eps: float = 0.0,
    silu: bool = False,
    add: Tensor | None = None,
    next_norm: Tensor | None = None,
    out: Tensor | None = None,
    tickets: Tensor | None = None,
    inboxes: Callable[[], Inboxes] | None = None,
) -> tuple[Tensor, Scaled | None]:
    """As `matmul.matmul` without a bias; the only gate is silu.

    out: contiguous; where the result goes. tickets: int32, one a tile, at first 0; for launches with as many parts of K
    as this one, which follow each other in one stream. inboxes: the product is summed over ranks; called when all
    memory is there.
    """
    given = Launch(x, weight, tile=tile, gate="silu" if silu else None, add=add, next_norm=next_norm, out=out)
    k, part = weight.shape[1], given.y
    stages = min(tile.stages, triton.cdiv(k // tile.splits, tile.block_k))
    if tile.splits > 1:
        assert tickets is not None
        assert given.squares is None and not silu and given.grid[0] <= len(tickets), tile
        size = given.grid[0] * tile.splits * tile.block_m * tile.block_n
        part = torch.empty(size, dtype=torch.float32, device=part.device)
    _matmul_kernel[(tile.splits, *given.grid)](
        _described(given.source, tile.block_m, tile.block_k),
        _described(weight, tile.block_n, tile.block_k),
        *given.pointers(), part, given.y if tickets is None else tickets,
        rows=given.rows, add_stride=0 if add is None else add.stride(0), eps=eps,
        **by_copies(inboxes, given.y, tile.splits * given.grid[0]),
        K=k, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        STAGES=stages, **given.constants, SPLITS=tile.splits, STAGED=tile.staged,
        WARPS=tile.warps, num_warps=tile.warps, launch_pdl=True,
    )  # fmt: skip
    return given.y, given.scaled
