"""Our paged attention kernels compared with flash-attn: microseconds, GB/s of KV (decode), TFLOP/s (prefill).

The L2 cache is flushed before each call. flash-attn supports only block sizes that are multiples of 256; our other
block sizes are compared with its time for the same batch.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nanoengine.lab.bench.report import Report, number, share
from nanoengine.lab.bench.session import BenchmarkError, Setup
from nanoengine.lab.bench.timing import best_device, time_us

FLASH_BLOCK = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One batch at one block size.

    Attributes:
        kernel: "triton" or "flash-attn". us: median microseconds of a call.
        gb_s: KV bytes per time, for a decode batch. tflops: for a prefill batch. limit: of the device, in this unit.
        of_flash_attn: time of flash-attn divided by ours; None if it was not measured.
        error: largest absolute difference from the reference.
    """

    batch: str
    kernel: str
    block_size: int
    us: float
    gb_s: float | None
    tflops: float | None
    limit: float | None
    of_flash_attn: float | None = None
    error: float | None = None


def run(setup: Setup, block_sizes: Sequence[int], *, only: str = "", scale: float = 1.0, quick: bool = False) -> Report:
    """Measures all batches, or those whose name contains `only`. Raises `BenchmarkError` if the kernels cannot run."""
    device, notes = _device(), []
    from nanoengine.lab.bench.paged_batches import Batch, Heads, batches

    package, missing = flash_attn_package()
    if device.type != "cuda":
        package, missing = None, "on a CPU the kernels run in Triton's interpreter: the times have no meaning"
    notes += [missing] if missing else []
    shape, dtype = setup.shape, torch.bfloat16 if device.type == "cuda" else torch.float32
    heads = Heads(shape.heads, shape.kv_heads, shape.head_size)
    timer = _flushed_us(quick) if device.type == "cuda" else lambda call: time_us([call], device, replays=1)[0]
    rows: list[Row] = []
    for lengths in batches():
        if only not in lengths.name:
            continue
        theirs: float | None = None
        for size in sorted(block_sizes, reverse=True):  # flash-attn is measured at 256
            batch = Batch(lengths.scaled(scale), size, heads, dtype, device)
            if package is not None and size % FLASH_BLOCK == 0:
                theirs = _time_flash_attn(batch, package, timer, notes)
                if theirs is not None:
                    rows.append(_row(setup, batch, "flash-attn", theirs))
            call = batch.ours()
            us = timer(call)
            rows.append(_row(setup, batch, "triton", us, theirs and theirs / us, batch.error(call)))
    settings = {**setup.as_dict(), "heads": [heads.query, heads.kv, heads.size], "dtype": str(dtype)}
    return Report(benchmark="attention", settings=settings, rows=rows, columns=COLUMNS, notes=notes)


def _device() -> torch.device:
    device = best_device()
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise BenchmarkError(
            "the attention kernels need a CUDA GPU, and this machine has none; set TRITON_INTERPRET=1 and a small"
            " --scale to try the command in Triton's interpreter"
        )
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise BenchmarkError(f"the attention kernels need Triton: {error}; pip install 'nanoengine[triton]'") from error
    return device


def flash_attn_package() -> tuple[Any, str]:
    """The flash-attn package; or None, and the reason."""
    try:
        package = importlib.import_module("flash_attn")
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"flash-attn is not measured: {type(error).__name__}: {error}; pip install flash-attn"
    for name in ("flash_attn_with_kvcache", "flash_attn_varlen_func"):
        if not hasattr(package, name):
            return None, f"flash-attn is not measured: the installed one has no {name}; install version 2.6 or later"
    return package, ""


def _flushed_us(quick: bool) -> Callable[[Callable[[], Any]], float]:
    """A timer: median microseconds with the L2 cache flushed before each call."""
    from triton.testing import do_bench

    warm, repeat = (10, 40) if quick else (25, 150)
    return lambda call: 1e3 * float(do_bench(call, warmup=warm, rep=repeat, return_mode="median"))


def _time_flash_attn(batch: Any, package: Any, timer: Callable[[Callable[[], Any]], float], notes: list[str]
                     ) -> float | None:  # fmt: skip
    """The time of flash-attn; None if it fails: some builds do not have every head size."""
    call = batch.flash_attn(package)
    try:
        call()
    except (RuntimeError, ValueError) as error:
        notes.append(f"flash-attn, {batch.lengths.name}: {error}")
        return None
    return timer(call)


def _row(
    setup: Setup, batch: Any, kernel: str, us: float, of_flash_attn: float | None = None, error: float | None = None
) -> Row:
    prefill, limits = batch.lengths.prefill, setup.limits
    limit = None
    if limits is not None:
        limit = limits.flops / 1e12 if prefill else limits.bandwidth / 1e9
    return Row(
        batch=batch.lengths.name,
        kernel=kernel,
        block_size=batch.block_size,
        us=us,
        gb_s=None if prefill else batch.kv_bytes / us / 1e3,
        tflops=batch.flops / us / 1e6 if prefill else None,
        limit=limit,
        of_flash_attn=of_flash_attn,
        error=error,
    )


COLUMNS = {
    "batch": lambda r: r.batch,
    "kernel": lambda r: r.kernel,
    "block": lambda r: str(r.block_size),
    "us": lambda r: number(r.us, 1),
    "GB/s": lambda r: number(r.gb_s),
    "TFLOP/s": lambda r: number(r.tflops, 1),
    "of limit": lambda r: share(r.gb_s or r.tflops, r.limit),
    "of flash-attn": lambda r: "-" if r.of_flash_attn is None else f"{r.of_flash_attn:.0%}",
    "error": lambda r: "-" if r.error is None else f"{r.error:.1e}",
}
