"""The triton backend at every head size and block size it promises, against the naive float64 reference: ragged rows,
one-token rows, padded rows, tokens behind the last row, nothing but one row."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from attention.paged_case import Case, run

from nanoengine.plugins.attention_backends.triton_paged import TritonPaged

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SIZES = list(product((64, 80, 96, 128, 256), (16, 32, 64, 128, 256)))
VARIANTS = [(None, None), (70, None), (None, 5.0), (33, 3.0)]  # window, soft cap

BATCHES = {
    "decode, padded": ([(1, 300), (1, 1), (1, 64), (1, 257)], {"padded_rows": 5}),
    "mixed, tail": ([(1, 200), (1, 17), (1, 1), (2, 2), (40, 290), (17, 17)], {"tail": 67}),
    "one token": ([(1, 1)], {}),
    "one prompt, padded": ([(65, 65)], {"padded_rows": 3, "tail": 9}),
}


def error(case: Case, backend: type[TritonPaged] = TritonPaged) -> float:
    out, want = run(backend, case), case.reference()
    assert out.dtype == case.dtype
    assert out.isfinite().all()
    return float((out[: len(want)].double().cpu() - want).abs().max())


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("head_size", "block_size"), SIZES)
def test_agrees(head_size: int, block_size: int, batch: str) -> None:
    """Dtypes and variants take turns, so that each meets each head size and each block size."""
    at = SIZES.index((head_size, block_size)) + list(BATCHES).index(batch)
    dtype, (window, soft_cap), (rows, more) = list(TOLERANCE)[at % 3], VARIANTS[at // 3 % 4], BATCHES[batch]
    case = Case(
        rows=rows, heads=4, kv_heads=2, head_size=head_size, block_size=block_size, window=window,
        soft_cap=soft_cap, dtype=dtype, device="cuda", seed=at, **more,
    )  # fmt: skip
    assert error(case) < TOLERANCE[dtype], (dtype, window, soft_cap)


def test_a_wider_window_is_caught() -> None:
    rows, more = BATCHES["mixed, tail"]
    case = Case(rows=rows, head_size=64, block_size=16, window=33, dtype=torch.bfloat16, device="cuda", **more)
    assert error(case) < TOLERANCE[torch.bfloat16]
    out = run(TritonPaged, case)
    case.window = 34
    want = case.reference()
    assert float((out[: len(want)].double().cpu() - want).abs().max()) > 2 * TOLERANCE[torch.bfloat16]
