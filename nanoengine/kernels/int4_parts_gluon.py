"""What the kernels in Gluon for weights of four bits share: the rows of the weight, and what follows the sums."""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from nanoengine.kernels import int4_triton
from nanoengine.kernels.activation_triton import act_mul

act_and_mul = gluon.jit(act_mul.fn)
word_rows, word_at = gluon.jit(int4_triton.word_rows.fn), gluon.jit(int4_triton.word_at.fn)
group_at = gluon.jit(int4_triton.group_at.fn)


@gluon.jit
def do(asm: gl.constexpr):
    gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def rows_from(first, r, N: gl.constexpr, GATED: gl.constexpr):
    """As `pick_rows`: row of the weight for each row of a tile whose first output is given; one too many reads the
    first, and is not written."""
    n = first + r
    if GATED:
        n = first + r // 16 * 8 + r % 8
    source = n
    if GATED:
        source = n + r // 8 % 2 * N
    return gl.where(n < N, source, 0).to(gl.int64)


@gluon.jit
def weight_rows(r, N: gl.constexpr, BLOCK_N: gl.constexpr, GATED: gl.constexpr):
    """`rows_from` of this program's tile."""
    return rows_from(gl.program_id(0) * BLOCK_N, r, N, GATED)


@gluon.jit
def load_if(WANTED: gl.constexpr, ptrs, mask):
    if WANTED:
        return gl.load(ptrs, mask=mask, other=0.0).to(gl.float32)
    else:
        return 0.0


@gluon.constexpr_function
def output_layout(outputs, tokens, warps):
    """Of [outputs, tokens]: neighbouring outputs, which are neighbours in memory, are a thread's or its neighbours'."""
    own = max(1, min(8, outputs * tokens // (32 * warps)))
    across = min(32, outputs // own)
    return gl.BlockedLayout([own, 1], [across, 32 // across], [1, warps], [0, 1])


@gluon.jit
def finish_tile(
    y, bias_ptr, add_ptr, y_ptr, squares_ptr, next_ptr, scaled_ptr, sums_ptr, rows, y_stride, add_stride, eps,
    N: gl.constexpr, K: gl.constexpr, BLOCK_T: gl.constexpr, BLOCK_N: gl.constexpr, WARPS: gl.constexpr,
    GATED: gl.constexpr, ACTIVATION: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_ADD: gl.constexpr,
    SQUARES: gl.constexpr, PARTS: gl.constexpr, NEXT: gl.constexpr,
):  # fmt: skip
    """As `split_k_triton.finish_tile`, of sums [rows of the weight, BLOCK_T] in any layout."""
    lay: gl.constexpr = output_layout(BLOCK_N, BLOCK_T, WARPS)
    if GATED:
        y, up = gl.split(gl.permute(gl.reshape(y, [BLOCK_N // 8, 2, 8, BLOCK_T]), (0, 2, 3, 1)))
        up = gl.convert_layout(gl.reshape(up, [BLOCK_N, BLOCK_T]), lay)
        y = gl.convert_layout(gl.reshape(y, [BLOCK_N, BLOCK_T]), lay)
    else:
        y = gl.convert_layout(y, lay)
    n = gl.program_id(0) * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, lay))
    t = gl.program_id(2) * BLOCK_T + gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, lay))
    if SQUARES > 0:
        across: gl.constexpr = min(32, BLOCK_T)  # threads of a warp that have other tokens: few to add up
        of_parts: gl.constexpr = gl.BlockedLayout([1, 1], [32 // across, across], [WARPS, 1], [1, 0])
        part = gl.arange(0, PARTS, layout=gl.SliceLayout(1, of_parts))[:, None]
        token = gl.program_id(2) * BLOCK_T + gl.arange(0, BLOCK_T, layout=gl.SliceLayout(0, of_parts))[None, :]
        squares = gl.load(squares_ptr + part * rows + token, mask=(part < SQUARES) & (token < rows), other=0.0)
        norm = gl.convert_layout(gl.rsqrt(gl.sum(squares, 0) / K + eps), gl.SliceLayout(0, lay))
        y *= norm[None, :]
        if GATED:
            up *= norm[None, :]
    in_n, in_t = n < N, t < rows
    mask = in_n[:, None] & in_t[None, :]
    y += load_if(HAS_BIAS, bias_ptr + n[:, None], in_n[:, None])
    if GATED:
        up += load_if(HAS_BIAS, bias_ptr + N + n[:, None], in_n[:, None])
        y = act_and_mul(y, up, ACTIVATION)
    y += load_if(HAS_ADD, add_ptr + t.to(gl.int64)[None, :] * add_stride + n[:, None], mask)
    out = y.to(y_ptr.dtype.element_ty)
    to = t.to(gl.int64)[None, :] * y_stride + n[:, None]
    gl.store(y_ptr + to, out, mask=mask)
    if NEXT:
        wide = gl.where(mask, out.to(gl.float32), 0.0)
        next_weight = load_if(True, next_ptr + n, in_n)
        gl.store(scaled_ptr + to, (wide * next_weight[:, None]).to(out.dtype), mask=mask)
        gl.store(sums_ptr + gl.program_id(0) * rows + t, gl.sum(wide * wide, 0), mask=in_t)
