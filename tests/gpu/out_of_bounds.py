"""A kernel that writes one element behind its tensor: what `memcheck.sh` must see before it is believed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _write(out, COUNT: tl.constexpr):  # noqa: N803
    tl.store(out + tl.arange(0, COUNT), 1.0)


if __name__ == "__main__":
    _write[(1,)](torch.zeros(127, device="cuda"), COUNT=128)
    torch.cuda.synchronize()
