"""Products that end with their sum over ranks: two processes that share files, and what layers ask of a group."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanoengine.api import TensorParallelGroup
from nanoengine.kernels import all_reduce
from nanoengine.kernels.ops import Ops
from nanoengine.layers.linear import RowParallelLinear, Unquantised, name_next_norm
from nanoengine.layers.norm import RMSNorm

from . import inbox_ranks as ranks


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted; GPUs are tested in tests/gpu")
def test_two_ranks_with_sums_by_words_of_all_kernels_by_turns(tmp_path: Path) -> None:
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
    for number, (one, other) in enumerate(zip(*found, strict=True)):
        products = [x @ w.T for x, w, _ in (ranks.values(rank, number) for rank in range(2))]
        expected = all_reduce.all_reduce_add(products, ranks.values(0, number)[2])
        assert torch.equal(one, other), number
        assert (one - expected).norm() <= 2e-6 * expected.norm(), number


class Group(TensorParallelGroup):
    """Rank 0 of two, the other of which adds ones."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, has_inboxes: bool, sums: bool) -> None:
        self.rank, self.size, self.tp, self.ops, self.has_inboxes = 0, 2, self, Summing(sums), has_inboxes

    def all_reduce(self, x: Tensor) -> Tensor:
        return x + 1

    def all_gather(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def highest(self, keys: Tensor) -> Tensor:
        raise NotImplementedError

    def inboxes(self, like: Tensor) -> Callable[[], Any] | None:
        assert like.shape == (3, 8)
        return self.begin if self.has_inboxes else None

    def begin(self) -> Any:
        raise NotImplementedError


class Summing(Ops):
    """Operations that note what they are given, and sum products if `sums`."""

    def __init__(self, sums: bool) -> None:
        self.sums, self.given = sums, list[Any]()

    def linear_over_ranks(
        self, x: Tensor, weight: Tensor, residual: Tensor, inboxes: Any, *, next_norm: Tensor | None = None
    ) -> Tensor | None:
        self.given += [inboxes, next_norm]
        return self.linear(x, weight) + 1 + residual if self.sums else None


@pytest.mark.parametrize(
    "case", ["summed", "no inboxes", "not by this kernel", "no norm is named", "quantised", "bias"]
)
def test_what_a_layer_asks_of_its_group(case: str) -> None:
    group = Group(case != "no inboxes", case != "not by this kernel")
    method = type("Other", (Unquantised,), {})() if case == "quantised" else None
    layer = RowParallelLinear("o", 16, 8, bias=case == "bias", place=group, method=method)  # type: ignore[arg-type]
    norm = RMSNorm(8, 1e-6, place=group)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(3)
    for parameter in layer.parameters():
        parameter.data.normal_(generator=generator)
    x, residual = torch.randn(3, 16, generator=generator)[:, :8], torch.randn(3, 8, generator=generator)
    expected = torch.nn.functional.linear(x, layer.get_parameter("weight"), layer.bias) + 1 + residual
    if case != "no norm is named":
        name_next_norm(layer, norm)
    total, rest = layer.added(x, residual)
    assert torch.allclose(total if rest is None else total + rest, expected, atol=1e-5)
    asked = case in ("summed", "not by this kernel", "no norm is named")
    assert group.ops.given == ([group.begin, None if case == "no norm is named" else norm.weight] if asked else [])
    assert (rest is None) == (case in ("summed", "no norm is named"))
