"""Compiles kernels for compute capability 9.0 on any machine, for sizes of Qwen3-30B-A3B in bfloat16 (attention for
those of Qwen3-0.6B too), and prints what came out as JSON: registers, spilled bytes, shared memory, and instructions by
name. Triton must not be interpreting. --all: every number of rows, heads and stages; without it, half of those of a
kernel, in which each of its tiles, products and branches is."""

from __future__ import annotations

import json
import sys
from itertools import product
from typing import Any

import disassembly
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from nanoengine.kernels import (
    eight_bit_gemv_triton,
    eight_bit_streamed_triton,
    eight_bit_tile_triton,
    gguf_triton,
    int4_roles_gluon,
    int4_triton,
    matmul_gluon,
    matmul_triton,
    matmul_wide_gluon,
    matvec_streamed_triton,
    paged_attention_code_slices_gluon,
    paged_attention_codes_gluon,
    paged_attention_decode_triton,
    paged_attention_prefill_gluon,
    paged_attention_slices_gluon,
    route_triton,
)
from nanoengine.kernels import experts_few_triton as few
from nanoengine.kernels import experts_grouped_triton as grouped
from nanoengine.kernels import int4_roles_copies_gluon as copies
from nanoengine.kernels import paged_attention_several_triton as several
from nanoengine.kernels.gguf import BLOCK_TYPES
from nanoengine.kernels.inboxes_triton import PLACES
from nanoengine.kernels.kv_quant import KV_DTYPES, LARGEST
from nanoengine.kernels.matmul import matmul_tile, tile_over_ranks
from nanoengine.kernels.paged_attention_plan import beside_products, fused_config, several_config
from nanoengine.kernels.paged_attention_slices import WARPS, SlicesConfig, code_slices_keys, slices_config

EXPERTS, TOP_K, HIDDEN, INNER = 128, 8, 2048, 768


def kinds(**pointers: str) -> dict[str, str]:
    """dtype -> names of pointers to it, without `_ptr`."""
    return {f"{name}_ptr": f"*{dtype}" for dtype, names in pointers.items() for name in names.split()}


def compiled(
    kernel: Any, given: dict[str, str], constants: dict[str, Any], warps: int = 4, registers: int = 0
) -> dict[str, Any]:
    """given: kinds of the arguments by name; integers of kind "stride" are multiples of 16."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else given[name].replace("stride", "i32") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if name in given and (given[name].startswith("*") or given[name] == "stride")
    }
    places = {(names.index(name),): value for name, value in constants.items()}
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    source = kind(fn=kernel, signature=signature, constexprs=places, attrs=aligned)
    options = {"num_warps": warps, "launch_pdl": True, **({"maxnreg": registers} if registers else {})}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    in_front = made.asm["ttgir"].partition("scf.for")[0]
    early = {"copies": in_front.count("ttg.async_copy_global"), "waits": in_front.count("griddepcontrol.wait")}
    cubin = made.asm["cubin"]
    return {"shared": made.metadata.shared, "cubin": cubin, "in_front": early, **disassembly.resources(cubin)}


def route() -> dict[str, Any]:
    given = kinds(fp32="logits correction weights", i64="places", i32="ids")
    constants = {
        "E": EXPERTS, "GROUPS": 1, "BLOCK_G": 1, "BLOCK_S": EXPERTS, "TOP_GROUPS": 1, "GROUP_BEST": 1, "TOP_K": TOP_K,
        "SCORING": "softmax", "RENORMALISE": True, "HAS_CORRECTION": False, "HAS_PLACES": True,
        "PDL": True,
    }  # fmt: skip
    return compiled(route_triton._route_kernel, {**given, "first_place": "stride", "scale": "fp32"}, constants, warps=1)


def norm_router() -> dict[str, Any]:
    given = kinds(bf16="x residual norm_weight weight bias normed total", fp32="logits")
    constants = {
        "E": EXPERTS, "K": HIDDEN, "BLOCK_N": 4, "BLOCK_K": HIDDEN, "HAS_RESIDUAL": True, "HAS_BIAS": False, "PDL": True
    }  # fmt: skip
    given |= {"x_stride": "stride", "residual_stride": "stride", "eps": "fp32"}
    return compiled(route_triton._norm_router_kernel, given, constants)


def few_gate_up() -> dict[str, Any]:
    tile = few.gate_up_tile(HIDDEN, 2)
    given = {**kinds(bf16="x weight bias inner", i32="ids"), "x_stride": "stride", "first": "stride"}
    constants = {
        "E": EXPERTS, "TOP_K": TOP_K, "N": INNER, "K": HIDDEN, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "ACTIVATION": "silu", "HAS_BIAS": False, "PDL": True,
    }  # fmt: skip
    return compiled(few._gate_up_kernel, given, constants, tile.warps)


def few_down() -> dict[str, Any]:
    tile = few.down_tile(INNER, TOP_K, 2)
    given = kinds(bf16="inner weight bias add out", i32="ids", fp32="router")
    constants = {
        "E": EXPERTS, "TOP_K": TOP_K, "N": HIDDEN, "K": INNER, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "HAS_BIAS": False, "HAS_ADD": True, "PDL": True,
    }  # fmt: skip
    return compiled(few._down_kernel, {**given, "add_stride": "stride", "first": "stride"}, constants, tile.warps)


def sort(block: int, warps: int) -> dict[str, Any]:
    given = {**kinds(i32="ids pair owner"), "pairs": "i32", "slots": "i32", "first": "i32"}
    constants = {"E": EXPERTS, "BLOCK": block, "BLOCK_T": 16, "PDL": True}
    return compiled(grouped._sort_kernel, given, constants, warps)


def grouped_product(rows: int, *, gated: bool) -> dict[str, Any]:
    tiles = grouped.grouped_tiles(rows * TOP_K, EXPERTS, 2)
    tile = tiles.gate_up if gated else tiles.down
    n, k = (INNER, HIDDEN) if gated else (HIDDEN, INNER)
    given = {**kinds(bf16="x weight bias", i32="pair owner"), "x_stride": "stride"}
    given["out_ptr"] = "*bf16" if gated else "*fp32"
    constants = {
        "SHARE": TOP_K if gated else 1, "N": n, "K": k, "BLOCK_T": tiles.block_t,
        "BLOCK_N": tile.width // 2 if gated else tile.width, "BLOCK_K": tile.block_k, "STAGES": tile.stages,
        "GATED": gated, "ACTIVATION": "silu" if gated else None, "HAS_BIAS": False, "PDL": True,
    }  # fmt: skip
    return compiled(grouped._grouped_kernel, given, constants, tile.warps)


def drafts(rows: int, queries: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """Attention of rows with drafts, head size 128."""
    group, config = heads // kv_heads, several_config(rows, queries, heads // kv_heads, kv_heads, 128, 4096, 2, 132)
    given = {f"{name}": "*bf16" for name in ["q", "k_cache", "v_cache", "out", "sinks"]}
    given |= {f"{name}": "*i32" for name in ["block_tables", "seq_lens", "starts", "tickets"]}
    given |= dict.fromkeys(["part", "lse", "k_scales", "v_scales"], "*fp32") | {
        "q_stride": "stride",
        "table_stride": "stride",
    }
    keys = config.keys
    constants = {
        "KV_HEADS": kv_heads, "GROUP": group, "D": 128, "D_PAD": 128, "BLOCK_SIZE": 16, "BLOCK_M": config.block_m,
        "BLOCK_Q": config.block_m // group, "TILE": keys.tile, "SPLITS": keys.splits,
        "SCALE": 0.1, "WINDOW": 0, "SOFT_CAP": 0.0, "STAGES": keys.stages, "AHEAD": keys.ahead, "PDL": True,
        "SINKS": False, "SCALED": False,
    }  # fmt: skip
    given |= {"queries": "i32", "pad_tokens": "i32", "min_tiles": "i32"}
    return compiled(several._decode_several, given, constants, keys.warps, config.registers)


def from_qkv(longest: int) -> dict[str, Any]:
    """Attention of one row of Qwen3-8B that takes qkv."""
    config = beside_products(fused_config(1, 8, 128, longest, 2, 132), longest)
    types = {
        "*bf16": ("q", "k_cache", "v_cache", "out", "sinks", "q_weight", "k_weight"), "*i64": ("slots",),
        "*i32": ("block_tables", "seq_lens", "tickets"), "stride": ("q_stride", "table_stride"),
        "*fp32": ("part", "lse", "k_scales", "v_scales", "inv_freq"), "fp32": ("eps",), "i32": ("min_tiles",),
    }  # fmt: skip
    constants = {
        "FUSED": True, "NORM": True, "HELD": config.held, "KV_HEADS": 8, "GROUP": 4, "GROUP_PAD": 16, "GROUP_P2": 4,
        "D": 128, "D_PAD": 128, "BLOCK_SIZE": 16, "TILE": config.tile, "SPLITS": config.splits, "SCALE": 0.1,
        "WINDOW": 0, "SOFT_CAP": 0.0, "STAGES": config.stages, "AHEAD": config.ahead, "PDL": True, "SINKS": False,
        "SCALED": False, "ASM": True, "BESIDE": False,
    }  # fmt: skip
    given = {name: type_ for type_, names in types.items() for name in names}
    return compiled(paged_attention_decode_triton._decode, given, constants, config.warps)


def codes(kind: str, group: int) -> dict[str, Any]:
    """Attention over K and V in eight bits, 256 rows."""
    by_gluon, stored = paged_attention_codes_gluon, KV_DTYPES[kind]
    types = {
        "*bf16": ("q", "out"), "*i16": ("k_words", "v_words"), "*fp32": ("k_scales", "v_scales", "part", "lse"),
        "*i32": ("block_tables", "seq_lens", "tickets"), "stride": ("q_stride", "table_stride"),
        "i32": ("columns", "min_tiles"),
    }  # fmt: skip
    constants = {
        "CODE": by_gluon.TYPES[stored], "PARTS": 2, "KV_HEADS": 8, "GROUP": group, "N": 8, "BLOCK": 16,
        "TILE": by_gluon._TILE, "STAGES": by_gluon._STAGES, "SPLITS": 1, "SCALE": 0.1, "BESIDE": False,
    }  # fmt: skip
    given = {name: type_ for type_, names in types.items() for name in names}
    return compiled(by_gluon._decode_codes_kernel, given, constants)


def slices(config: SlicesConfig, group: int, *, fused: bool = True) -> dict[str, Any]:
    """Attention of one query a row, from qkv."""
    types = {
        "*bf16": ("qkv", "k_cache", "v_cache", "out", "q_weight", "k_weight"), "*i64": ("slots", "part"),
        "*i32": ("block_tables", "seq_lens"), "*fp32": ("inv_freq",), "fp32": ("eps",),
        "stride": ("qkv_stride", "table_stride"),
    }  # fmt: skip
    constants = {
        "FUSED": fused, "NORM": fused, "KV_HEADS": 8, "GROUP": group, "N": 8, "BLOCK": 16, "KEYS": config.keys,
        "SPLITS": config.splits, "LEAST": config.least, "SCALE": 0.1,
    }  # fmt: skip
    given = {name: type_ for type_, names in types.items() for name in names}
    return compiled(paged_attention_slices_gluon._decode_slices_kernel, given, constants, WARPS)


def code_slices(kind: str, group: int, keys: int) -> dict[str, Any]:
    """Attention of one query a row, from qkv, over K and V in eight bits."""
    by_gluon, stored = paged_attention_code_slices_gluon, KV_DTYPES[kind]
    types = {
        "*bf16": ("qkv", "out", "q_weight", "k_weight"), "*i16": ("k_words", "v_words"), "*i64": ("slots",),
        "*fp32": ("k_scales", "v_scales", "inv_freq"), "*i32": ("block_tables", "seq_lens"), "fp32": ("eps",),
        "stride": ("qkv_stride", "table_stride"), "i32": ("columns",),
    }  # fmt: skip
    constants = {
        "CODE": by_gluon.TYPES[stored], "LARGEST": LARGEST[kind], "NORM": True, "KV_HEADS": 8, "GROUP": group,
        "N": max(8, 2 * group), "LIVE": 2 * group, "BLOCK": 16, "KEYS": keys, "SCALE": 0.1,
    }  # fmt: skip
    given = {name: type_ for type_, names in types.items() for name in names}
    return compiled(by_gluon._decode_code_slices_kernel, given, constants, WARPS)


def prompts(tokens: int) -> dict[str, Any]:
    """Attention of prompts of Qwen3-0.6B by warps with roles."""
    by_gluon = paged_attention_prefill_gluon
    config = by_gluon.warps_config(tokens, 2, 8, 132)
    assert config is not None
    boxes = {"q": ([32, 2, 64], by_gluon._QUERIES.value), "k": ([16, 64], by_gluon._TILES.value)}
    given = {f"{name}_desc": f"tensordesc<bf16{box},{lies!r}>" for name, (box, lies) in boxes.items()}
    given |= {"v_desc": given["k_desc"], "out": "*bf16"}
    given |= dict.fromkeys(("tables", "seq_lens", "starts", "counter"), "*i32")
    given |= dict.fromkeys(("num_rows", "num_tokens", "table_stride"), "i32")
    constants = {
        "KV_HEADS": 8, "GROUP": 2, "BLOCK": 16, "TILE": config.tile, "STAGES": config.stages,
        "CONSUMERS": config.consumers, "SCALE": 0.1,
    }  # fmt: skip
    return compiled(by_gluon._prefill_kernel, given, constants, registers=config.registers)


def layer_product(
    rows: int, outputs: int, k: int, *, gated: bool, hidden: int = HIDDEN // 2, ranks: int = 1
) -> dict[str, Any]:
    """In bfloat16: behind a norm, or added to the stream in front of one. ranks: over which it is summed."""
    tile = matmul_tile(rows, outputs, k, gated=gated, itemsize=2)
    if ranks > 1:
        tile = tile_over_ranks(rows, outputs, k, itemsize=2)
    assert tile is not None
    module, reads = (matmul_gluon if tile.gluon else matmul_triton), outputs != hidden or gated
    others = {"AHEAD": 256, "HAS_BIAS": False, "ACTIVATION": "silu", "PDL": True}
    own = {
        "WARPS": tile.warps,
        "SPLITS": tile.splits,
        "STAGED": tile.staged,
        "RANK": 0,
        "SIZE": ranks,
        "PLACES": PLACES,
    }
    own |= {"SHARE": 8}
    constants = {
        "N": outputs, "K": k, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "STAGES": tile.stages, "SQUARES": hidden // 32 if reads else 0, "GATED": gated, "HAS_ADD": not reads,
        "NEXT": not reads, **(own if tile.gluon else others),
    }  # fmt: skip
    given = {**kinds(bf16="weight bias add next y scaled", fp32="squares sums part", i32="ticket"), "rows": "i32"}
    given |= {"add_stride": "stride", "eps": "fp32", "capacity": "stride", "turns": "*i32"}
    given |= dict.fromkeys(("data", "signals"), "*i64")
    for name, block in (("x", tile.block_m), ("weight", tile.block_n)):
        lies = f",{matmul_gluon.shared_layout(block, tile.block_k, torch.bfloat16)!r}" if tile.gluon else ""
        given[f"{name}_desc"] = f"tensordesc<bf16[{block}, {tile.block_k}]{lies}>"
    return compiled(module._matmul_kernel, given, constants, tile.warps)


def wide_product() -> dict[str, Any]:
    """Qwen3-8B's gate and up, of 256 rows."""
    wide = matmul_wide_gluon
    given = {
        "x_desc": f"tensordesc<bf16[{wide.ROWS}, {wide.K}],{wide.TILES!r}>",
        "w_desc": f"tensordesc<bf16[{wide.OUTPUTS // 8}, 2, 8, {wide.K}],{wide.BOXES!r}>",
        "y_desc": f"tensordesc<bf16[{wide.ROWS}, {wide.OUTPUTS}],{wide.LINES!r}>",
    }
    return compiled(wide._gated_kernel, given, {"STEPS": 4096 // wide.K})


_CODES = {"fp8": "fp8e4nv", "int8": "i8"}


def eight_bit_gemv(inputs: str, *, gated: bool) -> dict[str, Any]:
    """One row of Qwen3-8B's norm, gate and up, or of attention's output with a sum."""
    n, k = (12288, 4096) if gated else (4096, 4096)
    block_k = triton.next_power_of_2(k)
    groups = block_k // 128 if inputs == "group" else 1
    given = kinds(bf16="x residual norm_weight bias add y total", fp32="input_scale bound scale", fp8e4nv="weight")
    given |= {"x_stride": "stride", "residual_stride": "stride", "add_stride": "stride", "eps": "fp32"}
    tile = eight_bit_gemv_triton.gemv_tile(block_k, gated=gated)
    constants = {
        "T": 1, "N": n, "K": k, "BLOCK_N": tile.block_n, "GROUPS": groups,
        "GROUP": block_k // groups, "SCALE_ROWS": 128 if inputs == "group" else 1,
        "SCALE_COLUMNS": k // 128 if inputs == "group" else 1, "INPUTS": inputs, "INT8": False, "HAS_BOUND": False,
        "GATED": gated, "ACTIVATION": "silu" if gated else None, "NORM": gated, "HAS_RESIDUAL": gated,
        "HAS_BIAS": False, "HAS_ADD": not gated, "PDL": True,
    }  # fmt: skip
    return compiled(eight_bit_gemv_triton._gemv_kernel, given, constants, tile.warps)


def eight_bit_streamed(n: int, k: int, *, gated: bool, norm: bool) -> dict[str, Any]:
    """One row of Qwen3-8B's products with FP8 weights."""
    tile = eight_bit_streamed_triton.tile_of(n, k, gated=gated)
    given = kinds(bf16="x norm_weight bias add y", fp32="input_scale bound scale", fp8e4nv="weight")
    constants = {
        **eight_bit_streamed_triton.constants(tile, n, k, gated=gated), "SCALE_ROWS": 1, "INPUTS": "token",
        "HAS_BOUND": False, "CAST": True, "GATED": gated, "ACTIVATION": "silu" if gated else None, "NORM": norm,
        "HAS_BIAS": False, "HAS_ADD": not norm, "ASM": eight_bit_streamed_triton.assembly(), "PDL": True,
    }  # fmt: skip
    kernel = eight_bit_streamed_triton._streamed_kernel
    found = compiled(kernel, {**given, "eps": "fp32"}, constants, tile.warps, tile.registers)
    copy = constants["ROWS"] * constants["PIECE"]
    return {**found, "threads": 32 * tile.warps, "ring": found["in_front"]["copies"] * copy}


def streamed(n: int, k: int, *, gated: bool, norm: bool, ranks: int = 1) -> dict[str, Any]:
    """One row of Qwen3-8B's products in bfloat16. ranks: over which it is summed."""
    tile = matvec_streamed_triton.tile_of(1, n, k, gated=gated, itemsize=2)
    assert tile is not None
    given = {**kinds(bf16="x norm_weight weight bias add y"), "data": "*i64", "turns": "*i32", "capacity": "stride"}
    given |= {"eps": "fp32"}
    constants = {
        **matvec_streamed_triton.constants(tile, n, k), "GATED": gated, "ACTIVATION": "silu" if gated else None,
        "NORM": norm, "HAS_BIAS": False, "HAS_ADD": not norm,
        "RANK": 0, "SIZE": ranks, "PLACES": PLACES, "SHARE": 4, "ASM": True, "PDL": True,
    }  # fmt: skip
    found = compiled(matvec_streamed_triton._streamed_kernel, given, constants, tile.warps)
    copy = constants["ROWS"] * constants["PIECE"] * 2
    return {**found, "threads": 32 * tile.warps, "ring": found["in_front"]["copies"] * copy}


def eight_bit_tile(rows: int, dtype: str, inputs: str) -> dict[str, Any]:
    """Qwen3-8B's gate and up, of rows that were quantised in front."""
    n, k, blocks, plain = 12288, 4096, inputs == "group", inputs == "plain"
    tile = eight_bit_tile_triton.tile_for(
        rows, n, k, gated=True, itemsize=2 if plain else 1, block=128 if blocks else 0
    )
    given = {**kinds(bf16="bias add y", fp32="x_scale scale partial"), "weight_ptr": f"*{_CODES[dtype]}"}
    given |= {"x_ptr": "*bf16" if plain else f"*{_CODES[dtype]}"}
    given |= {"rows": "i32", "x_stride": "stride", "add_stride": "stride"}
    constants = {
        "N": n, "K": k, "BLOCK_T": tile.block_t, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "SCALE_ROWS": 128 if blocks else 1, "SCALE_COLUMNS": k // 128 if blocks else 1, "BAND": 8,
        "SPLITS": 1, "SPAN": k, "AHEAD": 1024, "STAGES": tile.stages, "PLAIN": plain, "BLOCKS": blocks,
        "GROUPS": blocks, "GATED": True, "ACTIVATION": "silu", "HAS_BIAS": False, "HAS_ADD": False, "PDL": True,
    }  # fmt: skip
    return compiled(eight_bit_tile_triton._tile_kernel, given, constants, tile.warps)


def gguf_one(kind: str, *, gated: bool) -> dict[str, Any]:
    """One row of a model of Qwen3-8B's sizes, in the blocks of a GGUF file."""
    n, k = (12288, 4096) if gated else (4096, 4096)
    tile, type_ = gguf_triton.one_tile(k // 32, gated=gated), BLOCK_TYPES[kind]
    given = {**kinds(bf16="x residual norm_weight bias y total", u8="blocks"), "eps": "fp32"}
    constants = {
        "KIND": kind, "N": n, "ROW_BYTES": type_.row_bytes(k), "UNITS": k // 32, "BLOCK_N": tile.block_n,
        "BLOCK_U": tile.block_u, "GATED": gated, "ACTIVATION": "silu" if gated else None, "NORM": gated,
        "HAS_RESIDUAL": gated, "HAS_BIAS": False, "PDL": True,
    }  # fmt: skip
    return compiled(gguf_triton._one_kernel, given, constants, tile.warps)


def gguf_tiled(kind: str, rows: int) -> dict[str, Any]:
    n, k = 12288, 4096
    tile, type_ = gguf_triton.dot_tile(rows, n), BLOCK_TYPES[kind]
    given = {**kinds(bf16="x bias y", u8="blocks"), "tokens": "i32", "x_stride": "stride", "y_stride": "stride"}
    constants = {
        "KIND": kind, "N": n, "ROW_BYTES": type_.row_bytes(k), "UNITS": k // 32, "BLOCK_N": tile.block_n,
        "BLOCK_T": tile.block_t, "BLOCK_U": tile.block_u, "HAS_BIAS": False, "AHEAD": 1024, "PDL": True,
    }  # fmt: skip
    return compiled(gguf_triton._tiled_kernel, given, constants, tile.warps)


def int4(rows: int, n: int, k: int) -> dict[str, Any]:
    """A product with weights of four bits with zeros, in groups of 128, between two norms."""
    tile = int4_triton.tile_for(rows, n, k, gated=False, itemsize=2)
    span = -(-k // tile.splits // 128) * 128
    given = {**kinds(bf16="x bias add y next scaled", i16="codes", u8="zeros", fp16="scales", i32="ticket")}
    given |= kinds(fp32="part squares sums")
    given |= {"rows": "i32", "eps": "fp32", "x_stride": "stride", "y_stride": "stride", "add_stride": "stride"}
    constants = {
        "N": n, "K": k, "GROUP": 128, "BLOCK_T": min(tile.block_t, max(8, rows)), "BLOCK_N": tile.block_n,
        "BLOCK_K": 128, "SPLITS": tile.splits, "SPAN": span, "AHEAD": 256, "STAGES": tile.stages, "HAS_ZEROS": True,
        "TILED": False, "GATED": False, "ACTIVATION": None, "HAS_BIAS": False, "HAS_ADD": True, "SQUARES": 32,
        "PARTS": 32, "NEXT": True, "ASM": True, "PDL": True,
    }  # fmt: skip
    return compiled(int4_triton._int4_kernel, given, constants, tile.warps)


def int4_roles(rows: int, n: int, k: int) -> dict[str, Any]:
    """The same of many rows, of Qwen3-8B, by warps with roles."""
    tile, lines = int4_roles_gluon.tile_for(rows, n, k), 64
    given = {**kinds(bf16="bias add y next scaled", i16="codes", u8="zeros", fp16="scales", i32="ticket")}
    given |= kinds(fp32="part squares sums")
    given |= {"rows": "i32", "eps": "fp32", "x_stride": "stride", "y_stride": "stride", "add_stride": "stride"}
    given["x_desc"] = f"tensordesc<bf16[{tile.block_t}, 64],{copies.TOKENS.value!r}>"
    given["codes_desc"] = f"tensordesc<i16[{lines // 16}, 16, 32],{copies.TILES.value!r}>"
    constants = {
        "N": n, "K": k, "GROUP": 128, "BLOCK_T": tile.block_t, "BLOCK_N": lines,
        "STAGES": tile.stages, "CONSUMERS": tile.consumers, "SPLITS": tile.splits, "HAS_ZEROS": True, "TILED": True,
        "GATED": False, "ACTIVATION": None, "HAS_BIAS": False, "HAS_ADD": True, "SQUARES": 64, "PARTS": 64,
        "NEXT": True, "ASM": True, "PDL": True,
    }  # fmt: skip
    return compiled(int4_roles_gluon._roles_kernel, given, constants)


def main() -> None:
    every = "--all" in sys.argv
    found = {"route": route(), "norm_router": norm_router(), "few gate_up": few_gate_up(), "few down": few_down(),
             "sort": sort(512, 4), "sort of a large prefill": sort(8192, 32)}  # fmt: skip
    for rows in (64, 2048):
        found[f"grouped gate_up x{rows}"] = grouped_product(rows, gated=True)
        found[f"grouped down x{rows}"] = grouped_product(rows, gated=False)
    for rows, queries, heads, kv_heads in (
        (1, 5, 16, 8),
        (64, 5, 16, 8),
        (64, 16, 32, 4),
        *((64, 16, 16, 8), (64, 5, 32, 4)) * every,
    ):
        found[f"drafts {rows} x {queries}, {heads} heads"] = drafts(rows, queries, heads, kv_heads)
    sizes = (("qkv", 4096, 1024), ("o", 1024, 2048), ("gate_up", 3072, 1024), ("down", 1024, 3072))
    for (i, rows), (j, (name, n, k)) in product(enumerate((64, 128, 256, 512)), enumerate(sizes)):
        if every or (i + j) % 2:  # widest products of 512 rows, sums of 64
            found[f"layer {name} x{rows}"] = layer_product(rows, n, k, gated=name == "gate_up")
    found["wide gate_up x256"] = wide_product()
    for rows in (704, 1088):
        found[f"layer gate_up x{rows}"] = layer_product(rows, 3072, 1024, gated=True)
    found["layer down x704"] = layer_product(704, 1024, 3072, gated=False)
    for name, n, k in (("qkv", 3072, 4096), ("gate_up", 6144, 4096)):
        found[f"half of {name} x64"] = layer_product(64, n, k, gated=name == "gate_up", hidden=4096)
    for rows in (64, 128, 256):
        found[f"half of down x{rows}"] = layer_product(rows, 4096, 6144, gated=False, hidden=4096, ranks=2)
    for name, n, k in (("qkv", 6144, 4096), ("o", 4096, 4096), ("gate_up", 12288, 4096), ("down", 4096, 12288)):
        norm = name in ("qkv", "gate_up")
        found[f"streamed {name}"] = streamed(n, k, gated=name == "gate_up", norm=norm)
        if name != "o":
            found[f"eight-bit streamed {name}"] = eight_bit_streamed(n, k, gated=name == "gate_up", norm=norm)
    found["streamed half of down"] = streamed(4096, 6144, gated=False, norm=False, ranks=2)
    found["eight-bit gemv, group"] = eight_bit_gemv("group", gated=False)
    for rows, dtype, inputs in (
        (16, "fp8", "token"),
        (64, "fp8", "group"),
        (256, "int8", "token"),
        (16, "int8", "plain"),
    ):
        found[f"eight-bit {dtype} x{rows}, {inputs}"] = eight_bit_tile(rows, dtype, inputs)
    for stages, longest in ((1, 4096), *((2, 40960),) * every):
        found[f"from qkv, {stages} stages"] = from_qkv(longest)
    for kind, group in (("fp8", 2), ("int8", 2), *(("fp8", 8),) * every):
        found[f"codes {kind}, {group} heads"] = codes(kind, group)
    for kind, group in (("fp8", 2), ("int8", 2), *(("fp8", 4),) * every):
        keys = code_slices_keys(kind, 256, 8, 4096, 132)
        assert keys is not None
        found[f"slices of {kind}, {group} heads"] = code_slices(kind, group, keys)
    for rows in (1, 256, *(8, 16) * every):
        config = slices_config(rows, 8, 2, 132)
        assert config is not None
        found[f"slices x{rows}"] = slices(config, 2)
    found["slices beside prompts"] = slices(SlicesConfig(splits=1, keys=128, least=4), 2, fused=False)
    for tokens in (256, 8192):
        found[f"prompts x{tokens}"] = prompts(tokens)
    for kind in ("Q4_0", "Q4_K", "Q6_K"):
        found[f"gguf one {kind}"] = gguf_one(kind, gated=kind == "Q4_K")
    found["gguf tiled Q4_K"] = gguf_tiled("Q4_K", 256)
    for rows in (1, 16, 64):
        found[f"int4 x{rows}"] = int4(rows, 4096, 4096)
    found["int4 roles"] = int4_roles(256, 4096, 12288)
    read = disassembly.instructions([kernel.pop("cubin") for kernel in found.values()])
    for kernel, instructions in zip(found.values(), read, strict=True):
        kernel["stores"] = {op: n for op, n in instructions.items() if op.startswith("STG")}
        kernel["instructions"] = {op: n for op, n in instructions.items() if op not in kernel["stores"]}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
