"""Experts with weights of eight bits: grouped products by tensor cores, as in `experts_grouped_triton`, of tokens that
are quantised in front (`quantise_triton`). Each expert's weights are read once for its few tokens, as eight bits.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanoengine.kernels.activation import Activation
from nanoengine.kernels.eight_bit import EightBit
from nanoengine.kernels.experts_grouped_triton import GroupedTile, GroupedTiles, _combine_kernel, by_expert
from nanoengine.kernels.matvec_parts_triton import finish, halves, load_if, pick_rows
from nanoengine.kernels.pdl_triton import pdl_options, release_dependents, wait_for_inputs
from nanoengine.kernels.quantise_triton import quantised


@triton.jit
def _grouped_kernel(
    x_ptr, x_scale_ptr, weight_ptr, scale_ptr, bias_ptr, out_ptr, pair_ptr, owner_ptr, x_stride,
    SHARE: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    SCALE_ROWS: tl.constexpr, SCALE_COLUMNS: tl.constexpr, PLAIN: tl.constexpr, BLOCKS: tl.constexpr,
    GROUPS: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Outputs of one expert for its pairs of one slot; SHARE pairs have one row of x. BLOCKS, GROUPS: as in
    `eight_bit_tile_triton`."""
    width: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    rows: tl.constexpr = 2 * N if GATED else N
    scale_rows: tl.constexpr = (rows + SCALE_ROWS - 1) // SCALE_ROWS
    release_dependents(PDL)
    wait_for_inputs(PDL)
    slot = tl.program_id(1)
    e = tl.load(owner_ptr + slot).to(tl.int64)
    if e < 0:
        return
    pair = tl.load(pair_ptr + slot * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    t_mask = (pair >= 0)[None, :]
    token = (tl.where(pair >= 0, pair, 0) // SHARE)[None, :]
    row, source = pick_rows(tl.program_id(0), N, BLOCK_N, GATED)
    w_mask, source = (row < N)[:, None], source[:, None]
    k = tl.arange(0, BLOCK_K)
    w_ptrs = weight_ptr + (e * rows + source) * K + k[None, :]
    w_scales = scale_ptr + (e * scale_rows + source // SCALE_ROWS) * SCALE_COLUMNS
    x_ptrs = x_ptr + token * x_stride + k[:, None]
    x_scales = x_scale_ptr + token * ((K + BLOCK_K - 1) // BLOCK_K if GROUPS else 1)
    acc = tl.zeros((width, BLOCK_T), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k_left = K - start
        x = tl.load(x_ptrs + start, mask=t_mask & (k[:, None] < k_left), other=0.0)
        w = tl.load(w_ptrs + start, mask=w_mask & (k[None, :] < k_left), other=0.0)
        if PLAIN:
            w = w.to(x.dtype)
        part = tl.dot(w, x, input_precision="ieee").to(tl.float32)  # else Hopper's tensor cores keep 14 bits of a sum
        if BLOCKS:
            part *= tl.load(w_scales + start // BLOCK_K, mask=w_mask, other=0.0)
        if GROUPS:
            part *= tl.load(x_scales + start // BLOCK_K, mask=t_mask, other=0.0)
        acc += part
    if not BLOCKS:
        acc *= tl.load(w_scales, mask=w_mask, other=0.0)
    if not (PLAIN or GROUPS):
        acc *= tl.load(x_scales, mask=t_mask, other=0.0)
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    y, up = halves(acc, BLOCK_N, BLOCK_T, GATED)
    bias = bias_ptr + e * rows + n
    finish(
        y, up, load_if(HAS_BIAS, bias, n < N), load_if(HAS_BIAS and GATED, bias + N, n < N), 0.0,
        out_ptr + pair[None, :] * N + n, (n < N) & t_mask, GATED, ACTIVATION,
    )  # fmt: skip


def tiles_for(pairs: int, experts: int, w: EightBit) -> GroupedTiles:
    """As `grouped_tiles`: while an expert has few pairs, its bytes are the time."""
    each, k = pairs / experts, w.weight.shape[-1]
    block_k = w.columns if w.columns < k or w.inputs == "group" else 128
    few = each <= 32
    tile = GroupedTile(64 if few else 128, block_k, warps=4 if few else 8, stages=4 if few else 3)
    return GroupedTiles((16 if each <= 8 else 32) if few else 128, tile, tile)


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
    """As `eight_bit.experts`; products are summed over a token's experts before they are rounded. Nothing waits."""
    (count, hidden, width), (rows, top_k) = down.weight.shape, ids.shape
    assert gate_up.weight.is_contiguous() and down.weight.is_contiguous() and ids.is_contiguous(), ids.stride()
    y = torch.empty(rows, hidden, dtype=x.dtype, device=x.device) if out is None else out
    if rows == 0:
        return y
    tiles = tiles_for(rows * top_k, count, gate_up)
    pair, owner = by_expert(ids, count, first, tiles.block_t)
    inner = torch.empty(rows * top_k, width, dtype=x.dtype, device=x.device)
    _product(x, gate_up, gate_up_bias, inner, pair, owner, tiles, share=top_k, gate=activation)
    parts = torch.empty(rows * top_k, hidden, dtype=torch.float32, device=x.device)
    _product(inner, down, down_bias, parts, pair, owner, tiles)
    block_n = min(1024, triton.next_power_of_2(hidden))
    _combine_kernel[(rows, triton.cdiv(hidden, block_n))](
        parts, ids, weights, x if add is None else add, y, 0 if add is None else add.stride(0), first,
        E=count, TOP_K=top_k, N=hidden, BLOCK_N=block_n, HAS_ADD=add is not None, num_warps=4, **pdl_options(x),
    )  # fmt: skip
    return y


def _product(
    x: Tensor,
    w: EightBit,
    bias: Tensor | None,
    out: Tensor,
    pair: Tensor,
    owner: Tensor,
    tiles: GroupedTiles,
    *,
    share: int = 1,
    gate: Activation | None = None,
) -> None:
    """out[pair] of every pair. share: pairs that have one row of x."""
    plain = w.inputs == "plain"
    codes, scale = (x, w.scale) if plain else quantised(x, w)[:2]
    outputs, k, tile = out.shape[1], w.weight.shape[2], tiles.gate_up if gate else tiles.down
    block_n, blocks = tile.width // 2 if gate else tile.width, w.columns < k or w.inputs == "group"
    _grouped_kernel[(triton.cdiv(outputs, block_n), len(owner))](
        codes, scale, w.weight, w.scale, x if bias is None else bias, out, pair, owner, codes.stride(0),
        SHARE=share, N=outputs, K=k, BLOCK_T=tiles.block_t, BLOCK_N=block_n,
        BLOCK_K=w.columns if blocks else tile.block_k, STAGES=tile.stages,
        SCALE_ROWS=w.rows, SCALE_COLUMNS=w.scale.shape[2], PLAIN=plain, BLOCKS=blocks, GROUPS=w.inputs == "group",
        GATED=gate is not None, ACTIVATION=gate, HAS_BIAS=bias is not None, num_warps=tile.warps, **pdl_options(x),
    )  # fmt: skip
