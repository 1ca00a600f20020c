"""Products with a gate of some hundred rows by large weights, by three warpgroups, on GPUs of compute capability 9.0.

Each multiplies 64 rows of weights, eight of the gate and eight of up in turn, by up to 256 rows of x. So a thread has
both halves of what it gates, and the tiles of Qwen3-8B's weights, 96 outputs each, are one wave: 128 for 132
multiprocessors. Tiles of powers of two would be one and a half. No warp is there for copies alone, as the sums need its
registers: the first warpgroup asks for them, of the first weights before the kernel in front has ended.

One H200, 256 rows of Qwen3-8B: 70.1 us (736 TFLOP/s), with three stages asked for ahead; 72.8 with two; cuBLAS and a
launch for the gate 75.8, and 81.8 in a step of the engine. 192 rows took 67.3. Gluon has no interpreter: this kernel is
tested on a GPU, and compiled everywhere; `activation.act_and_mul` of the product is its reference. `matmul.takes_wide`
says what it takes.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nanoengine.kernels.paged_attention_copies_gluon import barrier
from nanoengine.kernels.pdl_triton import release_dependents, wait_for_inputs

ROWS, GROUPS, OUTPUTS, K, STAGES = 256, 3, 32, 64, 4
_ROWS, _GROUPS, _OUTPUTS, _K, _STAGES = (gl.constexpr(n) for n in (ROWS, GROUPS, OUTPUTS, K, STAGES))
_M = gl.constexpr(2 * OUTPUTS)
_BYTES = gl.constexpr((ROWS + GROUPS * 2 * OUTPUTS) * K * 2)  # of a stage
TILES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)  # of x and of weights
BOXES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)  # [eights, gate and up, 8, K]
LINES = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)  # of results
_TILES, _BOXES, _LINES = gl.constexpr(TILES), gl.constexpr(BOXES), gl.constexpr(LINES)
_SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))


@gluon.jit
def _ask_for_weights(w_desc, boxes, ready, stage, step):
    mbarrier.expect(ready.index(stage), _BYTES)
    n = gl.program_id(0) * (_GROUPS * _OUTPUTS // 8)  # in eights of outputs
    for i in gl.static_range(_GROUPS):
        at = [n + i * (_OUTPUTS // 8), 0, 0, step * _K]
        tma.async_copy_global_to_shared(w_desc, at, ready.index(stage), boxes.index(stage * _GROUPS + i))


@gluon.jit
def _ask_for_x(x_desc, xs, ready, stage, step):
    at = [gl.program_id(1) * _ROWS, step * _K]
    tma.async_copy_global_to_shared(x_desc, at, ready.index(stage), xs.index(stage))


@gluon.jit
def _multiply(
    x_desc, w_desc, y_desc, xs, boxes, ready, free, done, number: gl.constexpr,
    STEPS: gl.constexpr,
):  # fmt: skip
    """A warpgroup. The first one also has tiles copied, when all are done with what lies in their place."""
    if number == 0:
        release_dependents(True)
        for step in gl.static_range(_STAGES):
            _ask_for_weights(w_desc, boxes, ready, step, step)
        wait_for_inputs(True)
        for step in gl.static_range(_STAGES):
            _ask_for_x(x_desc, xs, ready, step, step)
    ws = boxes._reinterpret(xs.dtype, [_STAGES * _GROUPS, _M, _K], _TILES)
    acc = gl.zeros([_M, _ROWS], gl.float32, layout=_SUMS)
    for step in range(STEPS):
        stage = step % _STAGES
        mbarrier.wait(ready.index(stage), step // _STAGES & 1)
        acc = warpgroup_mma(ws.index(stage * _GROUPS + number), xs.index(stage).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        if step >= 1:
            barrier()
            mbarrier.arrive(free.index((step - 1) % _STAGES))
        if number == 0:
            later = step + _STAGES - 1  # asked for later, it comes too late
            if (step >= 1) & (later < STEPS):
                place = later % _STAGES
                mbarrier.wait(free.index(place), (later // _STAGES & 1) ^ 1)
                _ask_for_weights(w_desc, boxes, ready, place, later)
                _ask_for_x(x_desc, xs, ready, place, later)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    barrier()
    mbarrier.arrive(done.index(0))
    mbarrier.wait(done.index(0), 0)  # nothing is read from the stages any more
    halves = gl.permute(gl.reshape(acc, [_OUTPUTS // 8, 2, 8, _ROWS]), (0, 2, 3, 1))
    gate, up = gl.split(halves)
    gate = gl.reshape(gate, [_OUTPUTS, _ROWS])
    up = gl.reshape(up, [_OUTPUTS, _ROWS])
    y = gate / (1.0 + gl.exp(-gate)) * up
    lines = xs.index(number)._reinterpret(xs.dtype, [_ROWS, _OUTPUTS], _LINES)
    lines.permute((1, 0)).store(y.to(xs.dtype))
    fence_async_shared()
    barrier()
    n = (gl.program_id(0) * _GROUPS + number) * _OUTPUTS
    tma.async_copy_shared_to_global(y_desc, [gl.program_id(1) * _ROWS, n], lines)
    tma.store_wait(0)


@gluon.jit
def _gated_kernel(x_desc, w_desc, y_desc, STEPS: gl.constexpr):
    dtype: gl.constexpr = x_desc.dtype
    xs = gl.allocate_shared_memory(dtype, [_STAGES, _ROWS, _K], _TILES)
    boxes = gl.allocate_shared_memory(dtype, [_STAGES * _GROUPS, _OUTPUTS // 8, 2, 8, _K], _BOXES)
    ready = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(done.index(0), count=_GROUPS)
    for i in gl.static_range(_STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=_GROUPS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_multiply, (x_desc, w_desc, y_desc, xs, boxes, ready, free, done, 0, STEPS)),
            (_multiply, (x_desc, w_desc, y_desc, xs, boxes, ready, free, done, 1, STEPS)),
            (_multiply, (x_desc, w_desc, y_desc, xs, boxes, ready, free, done, 2, STEPS)),
        ], [4, 4], [168, 168],
    )  # fmt: skip


def gated(x: Tensor, weight: Tensor) -> Tensor:
    """silu(x gate^T) * (x up^T), [T, N]. x: [T, K] with a contiguous last dimension. weight: [2 N, K], the gate's rows
    first; N a multiple of 96, K of 64."""
    rows, k = x.shape
    outputs = len(weight) // 2
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    eights = TensorDescriptor(
        weight, [outputs // 8, 2, 8, k], [8 * k, outputs * k, k, 1], [OUTPUTS // 8, 2, 8, K], BOXES
    )
    _gated_kernel[(outputs // (GROUPS * OUTPUTS), -(-rows // ROWS))](
        TensorDescriptor(x, [rows, k], [x.stride(0), 1], [ROWS, K], TILES), eights,
        TensorDescriptor(y, [rows, outputs], [outputs, 1], [ROWS, OUTPUTS], LINES),
        STEPS=k // K, num_warps=4, launch_pdl=True,
    )  # fmt: skip
    return y
