"""The interpreter that remembers types is as strict as Triton's own, and leaves the language as it found it."""

from __future__ import annotations

import pytest
import torch
from triton_interpreter import INSTALLED, interpreted

pytestmark = [
    pytest.mark.skipif(not INSTALLED, reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are not interpreted"),
]
if INSTALLED:
    import triton
    import triton.language as tl
    from triton.runtime.errors import InterpreterError

    with interpreted():

        @triton.jit
        def _twice(x):
            return tl.sum(x, axis=0) * 2

        @triton.jit
        def _kernel(out_ptr, rows: tl.constexpr, columns: tl.constexpr):
            at = tl.arange(0, rows)[:, None] * 10 + tl.arange(0, columns)[None, :]
            tl.store(out_ptr + tl.arange(0, columns), _twice(at).to(tl.float32) + 0.5)

        @triton.jit
        def _unlike(out_ptr, rows: tl.constexpr, columns: tl.constexpr):
            tl.store(out_ptr + tl.arange(0, rows), tl.arange(0, rows) + tl.arange(0, columns))


def run(rows: int, columns: int) -> list[float]:
    out = torch.zeros(8)
    _kernel[(1,)](out, rows, columns)
    return out[:columns].tolist()


def test_functions_of_ours_and_of_the_language() -> None:
    for _ in range(2):  # the second time all of it is known
        assert run(2, 4) == [20.5, 24.5, 28.5, 32.5]
        assert run(4, 2) == [120.5, 128.5]


def test_shapes_are_checked_behind_good_ones() -> None:
    run(4, 4)
    with pytest.raises(InterpreterError, match="power of 2"):
        run(4, 3)
    with pytest.raises(InterpreterError, match="incompatible dimensions"):
        _unlike[(1,)](torch.zeros(8), 4, 8)
    with pytest.raises(ValueError, match="must be a power of 2"):
        tl.block_type(tl.int32, [4, 6])
    with pytest.raises(TypeError, match="0d"):
        tl.block_type(tl.int32, [])


def test_types_are_what_triton_says() -> None:
    block = tl.block_type(tl.float16, [tl.constexpr(4), 8])
    assert (block.name, block.numel, list(block.shape)) == ("<['4', '8'], fp16>", 32, [4, 8])
    assert block == tl.block_type(tl.float16, [4, 8])
    assert block != tl.block_type(tl.float16, [8, 4])
    assert block != tl.block_type(tl.float32, [4, 8])
    assert block.shape == [tl.constexpr(4), 8]
    assert block.shape != [4, 4]
    assert tl.constexpr(3).type == tl.constexpr(tl.constexpr(3)).type


def test_the_language_is_restored() -> None:
    before = {name: getattr(tl, name) for name in ("load", "arange", "range", "reduce")}
    run(4, 4)
    with pytest.raises(InterpreterError):
        run(4, 3)
    assert before == {name: getattr(tl, name) for name in before}
    assert "__index__" not in vars(tl.tensor)
