"""The gated activation against torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from nanoengine.kernels.activation import silu_and_mul as reference
from nanoengine.kernels.activation_triton import silu_and_mul


@pytest.mark.parametrize(("rows", "width"), [(1, 16), (3, 2 * 1030), (4, 2 * 77)])
def test_agrees(rand, assert_close, rows, width) -> None:
    gate_up = rand(rows, width) * 4
    assert_close(silu_and_mul(gate_up), reference(gate_up.float()))


def test_large_values_saturate(rand, dtype, device) -> None:
    gate_up = torch.tensor([[-200.0, 200.0, 1.5, 2.0]], dtype=dtype, device=device)
    assert torch.equal(silu_and_mul(gate_up), torch.tensor([[0.0, 400.0]], dtype=dtype, device=device))


def test_rows_may_be_strided_or_absent(rand, assert_close) -> None:
    gate_up = rand(3, 96)[:, :64]
    assert_close(silu_and_mul(gate_up), reference(gate_up.float()))
    assert silu_and_mul(gate_up[:0]).shape == (0, 32)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "width"), [(16384, 2 * 3072), (7, 2 * 12289)])
def test_agrees_large(rand, assert_close, rows, width) -> None:
    gate_up = rand(rows, width)
    assert_close(silu_and_mul(gate_up), reference(gate_up.float()))
