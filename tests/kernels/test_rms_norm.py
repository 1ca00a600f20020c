"""Residual add + RMS norm against torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from nanoengine.kernels.rms_norm import add_rms_norm as reference
from nanoengine.kernels.rms_norm import sum_rms_norm as sum_reference
from nanoengine.kernels.rms_norm_triton import add_rms_norm, sum_rms_norm

EPS = 1e-6


@pytest.mark.parametrize(("rows", "hidden"), [(1, 64), (3, 576), (5, 1), (300, 24)])
@pytest.mark.parametrize("with_residual", [True, False])
def test_agrees(rand, assert_close, rows, hidden, with_residual) -> None:
    x, weight = rand(rows, hidden), rand(hidden)
    residual = rand(rows, hidden) if with_residual else None
    y, total = add_rms_norm(x, residual, weight, EPS)
    expected_total = x if residual is None else x + residual
    assert torch.equal(total, expected_total)
    expected, _ = reference(expected_total.float(), None, weight.float(), EPS)
    assert_close(y, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "hidden"), [(1, 1024), (2, 16384), (257, 4096), (4097, 1000), (16384, 128)])
def test_agrees_large(rand, assert_close, rows, hidden) -> None:
    x, residual, weight = rand(rows, hidden), rand(rows, hidden), rand(hidden)
    y, total = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert_close(y, reference(total.float(), None, weight.float(), EPS)[0])
    again, _ = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(y, again)


def test_rows_may_be_strided_or_absent(rand, assert_close) -> None:
    wide, weight = rand(4, 100), rand(40)
    x, residual = wide[:, :40], wide[:, 50:90]
    y, total = add_rms_norm(x, residual, weight, EPS)
    expected, expected_total = reference(x.float(), residual.float(), weight.float(), EPS)
    assert_close(total, expected_total)
    assert_close(y, expected, bound=2 * torch.finfo(x.dtype).eps + 1e-6)
    assert add_rms_norm(x[:0], residual[:0], weight, EPS)[0].shape == (0, 40)


def test_a_row_does_not_depend_on_the_others(rand) -> None:
    x, weight = rand(5, 96), rand(96)
    assert torch.equal(add_rms_norm(x, None, weight, EPS)[0][3:4], add_rms_norm(x[3:4], None, weight, EPS)[0])


@pytest.mark.parametrize(("parts", "rows", "hidden"), [(1, 3, 64), (2, 5, 576), (4, 1, 40)])
def test_parts_are_added_up(rand, assert_close, parts, rows, hidden) -> None:
    terms = torch.stack([rand(rows, hidden).float() for _ in range(parts)])
    wide, weight = rand(rows, hidden + 8), rand(hidden)
    residual = wide[:, :hidden]
    y, total = sum_rms_norm(terms, residual, weight, EPS)
    expected, expected_total = sum_reference(terms, residual.float(), weight.float(), EPS)
    assert y.dtype == total.dtype == residual.dtype
    assert_close(total, expected_total)
    assert_close(y, expected, bound=2 * torch.finfo(y.dtype).eps + 1e-6)
    assert sum_rms_norm(terms[:, :0], residual[:0], weight, EPS)[0].shape == (0, hidden)


@pytest.mark.gpu
def test_two_parts_of_many_rows(rand, assert_close) -> None:
    terms = torch.stack([rand(257, 4096).float() for _ in range(2)])
    residual, weight = rand(257, 4096), rand(4096)
    y, total = sum_rms_norm(terms, residual, weight, EPS)
    assert torch.equal(total, (terms.sum(0) + residual.float()).to(total.dtype))
    assert_close(y, reference(total.float(), None, weight.float(), EPS)[0])
