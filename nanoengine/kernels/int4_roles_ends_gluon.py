"""What stands around the products of `int4_roles_gluon`: norms, an exchange of sums, and what follows them."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from nanoengine.kernels.int4_parts_gluon import act_and_mul, do, load_if, output_layout
from nanoengine.kernels.int4_roles_copies_gluon import work
from nanoengine.kernels.paged_attention_copies_gluon import barrier


@gluon.jit
def prepare(
    norms, normed, squares_ptr, rows, eps,
    N: gl.constexpr, K: gl.constexpr, BLOCK_T: gl.constexpr, WIDTH: gl.constexpr, SPLITS: gl.constexpr,
    SQUARES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Two warps: what tokens are multiplied with, each half by itself, or the only half that is finished here."""
    if SQUARES > 0:
        layout: gl.constexpr = gl.BlockedLayout([1], [32], [2], [0])
        half: gl.constexpr = BLOCK_T // 2
        split, tile_t, _, _, _ = work(rows, N, BLOCK_T, WIDTH, SPLITS)
        if PDL:
            do("griddepcontrol.wait; // $0")
        for part in range(split, 2, SPLITS):
            t = tile_t * BLOCK_T + part * half + gl.arange(0, half, layout=layout)
            total = gl.zeros([half], gl.float32, layout=layout)
            for i in range(0, SQUARES, 8):
                for j in gl.static_range(min(8, SQUARES)):
                    mask = (t < rows) & (i + j < SQUARES)
                    total += gl.load(squares_ptr + (i + j) * rows + t, mask=mask, other=0.0)
            norms.index(part).store(gl.rsqrt(total / K + eps))
        barrier()
        mbarrier.arrive(normed.index(0))


@gluon.jit
def halves(acc):
    """[M, N] -> the left and the right half of the columns; each thread keeps what it has."""
    m: gl.constexpr = acc.shape[0]
    n: gl.constexpr = acc.shape[1]
    return gl.split(gl.permute(gl.reshape(acc, [m, 2, n // 2]), (0, 2, 1)))


@gluon.jit
def exchange(mine, other, part_ptr, flag_ptr, mark, split):
    """Leaves `other` [M, N] for the other program of a tile, and adds to `mine` what that leaves. Both run at the same
    time. flag_ptr: of both, which become `mark`, one more than they were."""
    m: gl.constexpr = mine.shape[0]
    n: gl.constexpr = mine.shape[1]
    r = gl.arange(0, m, layout=gl.SliceLayout(1, mine.type.layout))
    c = gl.arange(0, n, layout=gl.SliceLayout(0, mine.type.layout))
    at = r[:, None] * n + c[None, :]
    gl.store(part_ptr + split * (m * n) + at, other)
    barrier()  # every thread's part is written before one of them says so
    gl.atomic_xchg(flag_ptr + split, mark, sem="release", scope="gpu")
    while gl.atomic_add(flag_ptr + 1 - split, 0, sem="acquire", scope="gpu") != mark:
        pass
    barrier()
    return mine + gl.load(part_ptr + (1 - split) * (m * n) + at, cache_modifier=".cg")


@gluon.jit
def ask_around(
    n0, t0, add_ptr, next_ptr, rows, add_stride,
    N: gl.constexpr, BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr, WARPS: gl.constexpr, HAS_ADD: gl.constexpr,
    NEXT: gl.constexpr,
):  # fmt: skip
    """What `finish` needs of other tensors, to be on its way early: (what is added, the next norm's weight)."""
    lay: gl.constexpr = output_layout(BLOCK_N, BLOCK_T, WARPS)
    n = n0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, lay))
    t = t0 + gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, lay))
    add = 0.0
    next_weight = 0.0
    if HAS_ADD:
        mask = (n < N)[:, None] & (t < rows)[None, :]
        add = gl.load(add_ptr + t.to(gl.int64)[None, :] * add_stride + n[:, None], mask=mask, other=0.0)
    if NEXT:
        next_weight = gl.load(next_ptr + n, mask=n < N, other=0.0)
    return add, next_weight


@gluon.jit
def finish(
    y, n0, t0, tile, norms, add, next_weight, bias_ptr, y_ptr, scaled_ptr, sums_ptr, rows, y_stride,
    N: gl.constexpr, BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr, WARPS: gl.constexpr, GATED: gl.constexpr,
    ACTIVATION: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_ADD: gl.constexpr, SQUARES: gl.constexpr, NEXT: gl.constexpr,
):  # fmt: skip
    """As `finish_tile`, of the tile of outputs n0 and on and tokens t0 and on. norms: in shared memory, what tokens are
    multiplied with, if SQUARES. add, next_weight: of `ask_around`."""
    lay: gl.constexpr = output_layout(BLOCK_N, BLOCK_T, WARPS)
    n = n0 + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, lay))
    t = t0 + gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, lay))
    in_n, in_t = n < N, t < rows
    mask = in_n[:, None] & in_t[None, :]
    if GATED:
        y, up = gl.split(gl.permute(gl.reshape(y, [BLOCK_N // 8, 2, 8, BLOCK_T]), (0, 2, 3, 1)))
        up = gl.convert_layout(gl.reshape(up, [BLOCK_N, BLOCK_T]), lay)
        y = gl.convert_layout(gl.reshape(y, [BLOCK_N, BLOCK_T]), lay)
    else:
        y = gl.convert_layout(y, lay)
    if SQUARES > 0:
        norm = norms.load(gl.SliceLayout(0, lay))
        y *= norm[None, :]
        if GATED:
            up *= norm[None, :]
    y += load_if(HAS_BIAS, bias_ptr + n[:, None], in_n[:, None])
    if GATED:
        up += load_if(HAS_BIAS, bias_ptr + N + n[:, None], in_n[:, None])
        y = act_and_mul(y, up, ACTIVATION)
    if HAS_ADD:
        y += add.to(gl.float32)
    out = y.to(y_ptr.dtype.element_ty)
    to = t.to(gl.int64)[None, :] * y_stride + n[:, None]
    gl.store(y_ptr + to, out, mask=mask)
    if NEXT:
        wide = gl.where(mask, out.to(gl.float32), 0.0)
        gl.store(scaled_ptr + to, (wide * next_weight.to(gl.float32)[:, None]).to(out.dtype), mask=mask)
        gl.store(sums_ptr + tile * rows + t, gl.sum(wide * wide, 0), mask=in_t & (n0 < N))
