"""Programmatic dependent launch (PDL; compute capability 9.0 and later) for a chain of short kernels.

A kernel launched this way may start while the one before it in the stream still runs: it loads what no kernel of a
step writes (weights), then waits. That hides launch and first-load latency, which is most of a small kernel's time.

The rule that keeps it right: every program of such a kernel calls `wait_for_inputs` before it reads anything a kernel
may have written and before it writes anything. Then "my predecessor is complete" holds along the whole chain, however
early each kernel lets the next one start. Kernels launched plainly (cuBLAS, torch) may stand anywhere in the chain:
they start when everything before them is complete. What changes weights must be followed by at least one plain kernel.

One exception: a kernel that lets the next one start behind its own wait thereby says that everything before itself is
complete. All that follow may read that before their waits, past this multiprocessor's cache (`.cg`) if an older value
was read a kernel or two ago. So do the kernels of a step's inputs and the embedding: what the host sends, and what is
gathered, is complete before the first layer. Decode behind the prefill attention of other rows even reads and writes
before its wait, which stands at its end: so both run at the same time, and what follows still finds both complete.
"""

# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: N803 - constants of a kernel are in capitals
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Returns when the kernels before this one are complete and what they wrote can be seen."""
    if PDL:
        gdc_wait()


@triton.jit
def release_dependents(PDL: tl.constexpr):
    """The next kernel may start once every program has called this, and wait in its turn."""
    if PDL:
        gdc_launch_dependents()


@functools.cache
def _supported(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def pdl_options(x: Tensor) -> dict[str, bool]:
    """Launch arguments of a kernel with a `PDL: tl.constexpr` argument that works on x's device."""
    if not x.is_cuda:  # the interpreter
        return {"PDL": False}
    enabled = _supported(x.device)
    return {"PDL": enabled, "launch_pdl": enabled}
