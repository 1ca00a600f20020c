"""Sums that ranks write into each other's memory: two processes that share files, and what layers ask of a group."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanoengine.api import TensorParallelGroup
from nanoengine.api.parallel import PushedSum
from nanoengine.distributed.pushed_sum import COPIES, WORDS, PushedSums
from nanoengine.kernels import all_reduce, rms_norm
from nanoengine.kernels.ops import Ops
from nanoengine.layers.linear import RowParallelLinear, Unquantised, name_next_norm
from nanoengine.layers.norm import RMSNorm

from . import pushed_ranks as ranks

EPS = 1e-6


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted; GPUs are tested in tests/gpu")
def test_two_ranks_with_sums_of_all_kinds_by_turns(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    given = [sys.executable, ranks.__file__]
    both = [subprocess.Popen([*given, str(rank), str(tmp_path)], env=environment) for rank in range(2)]
    try:
        assert [each.wait(120) for each in both] == [0, 0]
    finally:
        for each in both:
            each.kill()
            each.wait()
    found = [torch.load(tmp_path / f"found{rank}") for rank in range(2)]
    for number, results in enumerate(zip(*found, strict=True)):
        products = [(x @ w.T).unsqueeze(0) for x, w, _ in (ranks.values(rank, number) for rank in range(2))]
        residual = ranks.values(0, number)[2]
        expected = all_reduce.all_reduce_norm(products, residual, ranks.norm_weight(), EPS)
        for one, other, reference in zip(*results, expected, strict=True):
            assert torch.equal(one, other), number
            assert (one - reference).norm() <= 2e-6 * reference.norm(), number


def test_which_sums_are_pushed() -> None:
    sums = PushedSums(inboxes(WORDS), inboxes(COPIES), lambda: None)
    assert sums.of(torch.empty(64, 4096, dtype=torch.bfloat16)) is not None
    assert sums.of(torch.empty(65, 64)) is None
    assert sums.of(torch.empty(0, 64)) is None
    assert sums.of(torch.empty(64, 16384, dtype=torch.bfloat16)) is None  # too large to be copied
    assert sums.of(torch.empty(1, 32768, dtype=torch.bfloat16)) is None  # two rows are too large for words


def inboxes(capacity: int) -> Any:
    return type("Inboxes", (), {"capacity": capacity})


class Group(TensorParallelGroup):
    """Rank 0 of two, the other of which adds ones. Also its pushed sum."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, pushes: bool) -> None:
        self.rank, self.size, self.tp, self.ops, self.pushes = 0, 2, self, Noting(), pushes

    def all_reduce(self, x: Tensor) -> Tensor:
        return x + 1

    def all_gather(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def highest(self, keys: Tensor) -> Tensor:
        raise NotImplementedError

    def pushed_sum(self, residual: Tensor) -> PushedSum | None:
        self.residual = residual
        return self if self.pushes else None

    def begin(self) -> Any:
        raise NotImplementedError

    def end(self, parts: Tensor, norm_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        assert len(parts) == 2
        total = parts.sum(0) + 1 + self.residual
        return total, rms_norm.rms_norm(total, norm_weight, eps)


class Noting(Ops):
    """Operations that note what they are given."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.begin: list[Any] = []

    def linear_parts(self, x: Tensor, weight: Tensor, bias: Tensor | None, begin: Any) -> Tensor:
        self.begin.append(begin)
        y = self.linear(x, weight, bias)
        return torch.stack((y - 3, torch.full_like(y, 3)))

    def keep_normed(self, total: Tensor, norm_weight: Tensor, normed: Tensor) -> None:
        self.kept += [total, norm_weight, normed]


@pytest.mark.parametrize("case", ["pushed", "not pushed", "no norm is named", "quantised", "bias"])
def test_what_a_layer_asks_of_its_group(case: str) -> None:
    group = Group(case != "not pushed")
    method = type("Other", (Unquantised,), {})() if case == "quantised" else None
    layer = RowParallelLinear("o", 16, 8, bias=case == "bias", place=group, method=method)  # type: ignore[arg-type]
    norm = RMSNorm(8, EPS, place=group)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    for parameter in (*layer.parameters(), *norm.parameters()):
        parameter.data.normal_(generator=generator)
    x, residual = torch.randn(3, 8, generator=generator), torch.randn(3, 8, generator=generator)
    expected = torch.nn.functional.linear(x, layer.get_parameter("weight"), layer.bias) + 1 + residual
    if case != "no norm is named":
        name_next_norm(layer, norm)
    total, rest = layer.added(x, residual)
    assert torch.allclose(total if rest is None else total + rest, expected, atol=1e-5)
    assert (group.ops.begin == [group.begin]) == (case == "pushed")
    if case == "pushed":
        assert rest is None
        assert group.ops.kept[0] is total
        assert group.ops.kept[1] is norm.weight
        assert torch.equal(group.ops.kept[2], norm(total))
    else:
        assert not group.ops.kept
