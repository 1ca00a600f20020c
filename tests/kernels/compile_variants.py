"""Compiles what the wrappers of quantised weights and caches launch, and draws behind masks, for compute capability 9.0
on any machine: with the sizes of Qwen3-8B in bfloat16, or smaller ones where sizes change nothing. Prints one line a
launch that cannot be compiled, and how many were. Triton must not be interpreting. --all: every variant, not one of
each kind."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver


class Hopper:
    """A driver without a device."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


COMPILED = [0]


def only_compile() -> None:
    """From here on launches are compiled, not run; tensors say that they are on a GPU."""
    driver.set_active(Hopper())
    run = JITFunction.run

    def compiled(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        COMPILED[0] += 1
        run(kernel, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compiled  # type: ignore[method-assign]
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # type: ignore[assignment]
    torch.Tensor.is_cuda = property(lambda _: True)  # type: ignore[assignment, misc]
    torch._scaled_mm = lambda a, b, *_, **__: rand(len(a), b.shape[1])  # type: ignore[assignment]


def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype)


HIDDEN, INNER = 4096, 12288
Launch = tuple[str, Callable[[], Any]]


def either(number: int, every: bool) -> Sequence[tuple[int, int, str | None]]:
    """(outputs, inputs, gate) of an MLP's two products: both, or one, each for two of four launches."""
    products = ((2 * INNER, HIDDEN, "silu"), (HIDDEN, INNER, None))
    return products if every else (products[number.bit_count() % 2],)


def eight_bit(every: bool) -> Iterator[Launch]:
    from nanoengine.kernels import eight_bit_triton
    from nanoengine.kernels.eight_bit import EightBit

    fp8, int8 = torch.float8_e4m3fn, torch.int8
    kinds = [(fp8, "token", 1, 0), (fp8, "group", 128, 128), (int8, "plain", 1, 0), (int8, "token", 1, 0)]
    kinds += [(fp8, "plain", 1, 0), (fp8, "tensor", 1, 0), (fp8, "plain", 128, 128), (int8, "group", 1, 128)] * every
    for number, ((dtype, inputs, high, wide), rows) in enumerate(product(kinds, (1, 8, 64, 256) if every else (1, 64))):
        for n, k, gate in either(number, every):
            scale = rand(-(-n // high), -(-k // (wide or k)), dtype=torch.float32)
            static = rand(1, dtype=torch.float32) if inputs == "tensor" else None
            w = EightBit(rand(n, k, dtype=dtype), scale, high, wide or k, inputs, static, streamed=rows == 1)  # type: ignore[arg-type]
            x, norm, stream = rand(rows, k), rand(k), rand(rows, n)
            name = f"{dtype} {inputs} x{rows} {n} x {k}"
            if gate:
                yield name, partial(eight_bit_triton.norm_product, w, x, x, norm, 1e-6, gate=gate)
            else:
                yield name, partial(eight_bit_triton.product_added, w, x, None, stream)


def int4(every: bool) -> Iterator[Launch]:
    from nanoengine.kernels import int4_triton
    from nanoengine.kernels.int4 import Int4Weight

    all_rows, groups = ((1, 16, 64, 256, 300), (128, 64, 32)) if every else ((1, 64, 256), (128,))
    for number, (rows, group, zeros) in enumerate(product(all_rows, groups, (True, False))):
        for n, k, gate in either(number, every):
            zero = rand(n, k // group, dtype=torch.uint8) if zeros else None
            codes, scales = rand(n, k // 2, dtype=torch.uint8), rand(n, k // group, dtype=torch.float16)
            w, x = Int4Weight(codes, scales, zero, group), rand(rows, k)
            name = f"int4 groups of {group} x{rows} {n} x {k}"
            if not int4_triton.takes(rows, w):
                yield name, partial(int4_triton.dequantised, w, torch.bfloat16)
            elif gate:
                yield name, partial(int4_triton.int4_linear, x, w, gate=gate)
            else:
                yield name, partial(int4_triton.product, x, w, add=rand(rows, n), next_norm=rand(n))


def int4_for_hopper(every: bool) -> Iterator[Launch]:
    """In tiles."""
    from nanoengine.kernels import int4_few_gluon, int4_roles_gluon, int4_tiles_triton
    from nanoengine.kernels.int4 import Int4Weight

    cases = product((1, 8, 32, 64, 256, 512), (True, False))
    for number, (rows, zeros) in enumerate(cases if every else ((1, False), (1, True), (8, True), (256, True))):
        few = int4_tiles_triton.product if rows == 1 else int4_few_gluon.product
        made = few if rows <= 8 else int4_roles_gluon.product
        for n, k, gate in either(number, every):
            zero = rand(n, k // 128, dtype=torch.uint8) if zeros else None
            scales = rand(n, k // 128, dtype=torch.float16)
            w = Int4Weight(rand(n, k // 2, dtype=torch.uint8), scales, zero, 128, tiled=True)
            around: dict[str, Any] = {"gate": gate} if gate else {"add": rand(rows, n), "next_norm": rand(n)}
            yield f"int4 for Hopper x{rows} {n} x {k}", partial(made, rand(rows, k), w, **around)


def gguf(every: bool) -> Iterator[Launch]:
    from nanoengine.kernels import gguf_triton
    from nanoengine.kernels.gguf import BLOCK_TYPES

    some = (("Q4_K", 1), ("Q4_K", 64), ("Q8_0", 1))
    for kind, rows in product(BLOCK_TYPES, (1, 16, 64)) if every else some:
        outputs = 2 * INNER if rows < 64 else 512  # many rows are multiplied by torch, which computes here
        planes = rand(outputs, BLOCK_TYPES[kind].row_bytes(HIDDEN), dtype=torch.uint8)
        x, name = rand(rows, HIDDEN), f"gguf {kind} x{rows}"
        yield name, partial(gguf_triton.gguf_norm_linear, x, x, rand(HIDDEN), 1e-6, planes, kind, gate="silu")
        yield name, partial(gguf_triton.gguf_linear, x, planes, kind)
        if rows == 1:
            ids = torch.zeros(3, dtype=torch.int64)
            yield f"{name} rows", partial(gguf_triton.gguf_rows, ids, planes, kind, torch.bfloat16)


def fragments(every: bool) -> Iterator[Launch]:
    from nanoengine.kernels import gguf_fragments_decode_triton
    from nanoengine.kernels.gguf_fragments import FRAGMENTS
    from nanoengine.kernels.gguf_fragments_triton import few
    from nanoengine.kernels.matmul import Scaled

    for kind, rows in product(FRAGMENTS, (1, 8, 16)) if every else (("Q4_K", 16), ("Q6_K", 1)):
        name, size = f"fragments {kind} x{rows}", 16 * FRAGMENTS[kind].row_bytes
        up, down = (rand(n // 16, k // 256, size, dtype=torch.uint8) for n, k in ((2 * INNER, HIDDEN), (HIDDEN, INNER)))
        if kind != "Q6_K" or every:
            scaled = Scaled(rand(HIDDEN), rand(rows, HIDDEN), rand(128, rows, dtype=torch.float32))
            yield f"{name} gated", partial(few, scaled, up, kind, eps=1e-6, gate="silu")
        if kind != "Q4_K" or every:
            yield name, partial(few, rand(rows, INNER), down, kind, add=rand(rows, HIDDEN), next_norm=rand(HIDDEN))
        if rows == 1:
            yield f"{name} rows", partial(gguf_fragments_decode_triton.rows, None, down, kind, torch.bfloat16)


def caches(every: bool) -> Iterator[Launch]:
    """Of the two types one has every other launch, the other the rest."""
    kinds = [launches_of_cache(kind, rows) for kind, rows in cases_of_caches(every)]
    for first, launches in enumerate(kinds):
        yield from launches if every else islice(launches, first, None, 2)


def cases_of_caches(every: bool) -> Iterator[tuple[str, int]]:
    from nanoengine.kernels.kv_quant import KV_DTYPES

    return product(KV_DTYPES, (1, 8, 64, 256)) if every else zip(KV_DTYPES, (1, 256), strict=True)


def launches_of_cache(kind: str, rows: int) -> Iterator[Launch]:
    from nanoengine.kernels import paged_attention_code_slices_gluon as by_slices
    from nanoengine.kernels import paged_attention_codes_gluon as by_gluon
    from nanoengine.kernels import paged_attention_triton as attention
    from nanoengine.kernels.kv_quant import KV_DTYPES
    from nanoengine.kernels.paged_attention_plan import decode_config, several_config
    from nanoengine.kernels.rope_triton import qk_norm_rope_store

    heads, kv_heads, size, block = 32, 8, 128, 16
    cache = rand(64, kv_heads, block, size, dtype=KV_DTYPES[kind])
    scales = (rand(64, kv_heads, block, dtype=torch.float32), rand(64, kv_heads, block, dtype=torch.float32))
    tables, lens = rand(rows, 16, dtype=torch.int32), rand(rows, dtype=torch.int32)
    starts, slots = rand(rows + 1, dtype=torch.int32), rand(rows, dtype=torch.int64)
    q, parts = rand(rows, heads, size), rand(1 << 20, dtype=torch.float32)
    scratch = attention.DecodeScratch(parts, parts, rand(1 << 16, dtype=torch.int32))
    shape, group = (kv_heads, size, 4096, 2, 132), heads // kv_heads
    given: dict[str, Any] = {"scale": 0.1, "window": None, "soft_cap": None, "scales": scales}
    read = (q, cache, cache, torch.empty_like(q), tables, lens)
    name = f"cache in {kind} x{rows}"
    one, several = decode_config(rows, *shape), several_config(rows, 4, group, *shape)
    yield (
        f"{name} decode",
        partial(attention.attend_decode, *read, config=one, scratch=scratch, beside=rows > 1, **given),
    )
    assert by_gluon.takes(q, cache)
    launch = partial(by_gluon.attend_codes, q, cache, cache, scales, *read[3:], scale=0.1, scratch=scratch)
    yield f"{name} decode by Gluon", partial(launch, config=one, beside=rows > 1)
    yield f"{name} prefill", partial(attention.attend_prefill, *read, starts, **given)
    yield (
        f"{name} several",
        partial(
            attention.attend_several, *read, starts, queries=4, config=several, tickets=scratch.tickets,
            pad_tokens=rows, **given,
        ),
    )  # fmt: skip
    qkv, norm, turned = rand(rows, (heads + 2 * kv_heads) * size), rand(size), cache.transpose(1, 2)
    by_token = (scales[0].transpose(1, 2), scales[1].transpose(1, 2))
    yield (
        f"{name} rotation and store",
        partial(
            qk_norm_rope_store, qkv, slots, rand(64, dtype=torch.float32), turned, turned, slots,
            q_weight=norm, k_weight=norm, eps=1e-6, scales=by_token,
        ),
    )  # fmt: skip
    tokens = attention.NewTokens(slots=slots, inv_freq=rand(64, dtype=torch.float32), q_weight=norm, k_weight=norm)
    launch = partial(by_slices.attend_code_slices, qkv, cache, cache, scales, *read[3:], tokens, scale=0.1)
    yield f"{name} decode by slices", partial(launch, keys=64 if rows == 1 else 128)
    new = rand(rows, kv_heads, size)
    yield f"{name} store", partial(attention.store_kv, new, new, cache, cache, slots, scales)


def prompts(every: bool) -> Iterator[Launch]:
    from nanoengine.kernels import paged_attention_prefill_gluon as by_gluon

    few, many = (by_gluon.warps_config(tokens, 2, 8, 132) for tokens in (256, 8192))
    cases = product((few, many), (16, 64, 256), (1, 2, 8)) if every else [(few, 256, 1)]  # others: compile_for_hopper
    for config, block, group in cases:
        assert config is not None
        q, cache = rand(100, 8 * group, 128), rand(64, 8, block, 128)
        tables, lens, starts = rand(3, 16, dtype=torch.int32), rand(3, dtype=torch.int32), rand(4, dtype=torch.int32)
        read = (q, cache, cache, torch.empty_like(q), tables, lens, starts)
        assert by_gluon.takes(q, cache)
        yield (
            f"prompts by {config}, blocks of {block}, groups of {group}",
            partial(by_gluon.attend_prefill, *read, scale=0.1, counter=rand(1, dtype=torch.int32), config=config),
        )


def sums(every: bool) -> Iterator[Launch]:
    from nanoengine.kernels.inboxes_triton import PLACES, Inboxes
    from nanoengine.kernels.matvec_triton import matvec_over_ranks

    addresses, turns = rand(2, dtype=torch.int64), rand(PLACES, dtype=torch.int32)
    inboxes = Inboxes(0, 2, addresses, addresses, addresses, turns, (1 << 20, 1 << 20))
    for k, streams in ((2048, False), (6144, True)):
        given = (rand(1, k), rand(4096, k), rand(1, 4096), lambda: inboxes)

        def product(given: Any = given, streams: bool = streams) -> None:
            assert matvec_over_ranks(*given, streams=streams) is not None

        yield f"sum over ranks behind {k}", product


def masked_draws(every: bool) -> Iterator[Launch]:
    from nanoengine.kernels import sampling_triton

    kinds = [*product((1, 32, 64), sampling_triton.Tail)] if every else [(1, sampling_triton.Tail.TEMPERATURE)]
    for rows, tail in kinds:
        columns: dict[str, Any] = dict.fromkeys(("greedy", "top_k", "positions", "at"), rand(rows, dtype=torch.int32))
        columns |= dict.fromkeys(("temperature", "top_p", "min_p"), rand(rows, dtype=torch.float32))
        columns |= dict.fromkeys(("seeds", "sample_index"), rand(rows, dtype=torch.int64))
        out, mask = (rand(rows, dtype=torch.int64), rand(rows, dtype=torch.int32)), rand(rows, 1000, dtype=torch.int32)
        draw = partial(sampling_triton.sample, rand(rows, 32_000), tail, *out, early=True, mask=mask, **columns)
        yield f"draw behind a mask x{rows} {tail.name}", draw


def main() -> None:
    only_compile()
    every, failed = "--all" in sys.argv, 0
    for kind in (eight_bit, int4, int4_for_hopper, gguf, fragments, caches, prompts, masked_draws, sums):
        for name, launch in kind(every):
            try:
                launch()
            except Exception as error:  # noqa: BLE001 - a compiler raises what it likes
                failed += 1
                reason: BaseException = error
                while reason.__cause__ is not None:
                    reason = reason.__cause__
                print(f"{name}: {type(reason).__name__}: {str(reason)[-300:]}", flush=True)
    print(f"{COMPILED[0]} launches, {failed} failed")


if __name__ == "__main__":
    main()
