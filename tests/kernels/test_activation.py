"""The gated activations and the soft cap against torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from nanoengine.kernels import activation as reference
from nanoengine.kernels.activation_triton import act_and_mul, soft_cap

ACTIVATIONS = ["silu", "gelu_tanh", "swiglu_clamped"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (3, 2 * 1030), (4, 2 * 77)])
def test_agrees(rand, assert_close, rows, width, activation) -> None:
    gate_up = rand(rows, width) * 4
    assert_close(act_and_mul(gate_up, activation), reference.act_and_mul(gate_up.float(), activation))


def test_activations_differ(rand, assert_close) -> None:
    gate_up = rand(3, 64)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(act_and_mul(gate_up, "gelu_tanh"), reference.act_and_mul(gate_up.float(), "silu"))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_large_values_saturate(rand, dtype, device, activation) -> None:
    gate_up = torch.tensor([[-200.0, 200.0, 1.5, 2.0]], dtype=dtype, device=device)
    assert torch.equal(act_and_mul(gate_up, activation), torch.tensor([[0.0, 400.0]], dtype=dtype, device=device))


def test_clamps(dtype, device) -> None:
    """Gates at 7, what they gate at 7 either way; a NaN in either is one behind them too."""
    nan = float("nan")
    gate_up = torch.tensor([[-200.0, 200.0, 200.0, nan, 1.0, 5.0, 9.0, -9.0, 2.0, nan]], dtype=dtype, device=device)
    for kernel in (act_and_mul, reference.act_and_mul):
        out = kernel(gate_up, "swiglu_clamped")[0].tolist()
        assert out[0] == 0.0
        assert out[1:3] == pytest.approx([56.0, -42.0], rel=1e-3)
        assert out[3] != out[3]
        assert out[4] != out[4]


def test_rows_may_be_strided_or_absent(rand, assert_close) -> None:
    gate_up = rand(3, 96)[:, :64]
    assert_close(act_and_mul(gate_up), reference.act_and_mul(gate_up.float()))
    assert act_and_mul(gate_up[:0]).shape == (0, 32)


def test_soft_cap(rand, assert_close) -> None:
    """In place; what was masked stays masked, what is far above the cap lies at it."""
    logits = rand(3, 1500) * 40
    expected = reference.soft_cap(logits.float(), 30.0)
    capped = soft_cap(logits, 30.0)
    assert capped.data_ptr() == logits.data_ptr()
    assert_close(capped, expected)
    edges = rand(1, 3)
    edges[0] = torch.tensor([float("-inf"), 1e4, -1e4])
    for cap in (soft_cap, reference.soft_cap):
        assert cap(edges.clone(), 30.0).tolist() == [[float("-inf"), 30.0, -30.0]]
    assert soft_cap(logits[:0], 30.0).shape == (0, 1500)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "width"), [(16384, 2 * 3072), (7, 2 * 12289)])
def test_agrees_large(rand, assert_close, rows, width, activation) -> None:
    gate_up = rand(rows, width)
    assert_close(act_and_mul(gate_up, activation), reference.act_and_mul(gate_up.float(), activation))


@pytest.mark.gpu
def test_soft_cap_large(rand, assert_close) -> None:
    logits = rand(257, 262144) * 40
    assert_close(soft_cap(logits.clone(), 30.0), reference.soft_cap(logits.float(), 30.0))
