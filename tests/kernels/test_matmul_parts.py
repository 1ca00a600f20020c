"""Products that are left in parts of K, which the norm behind them adds up: what is taken, and what comes out."""

from __future__ import annotations

import pytest
import torch

from nanoengine.kernels import rms_norm
from nanoengine.kernels.choice import KernelChoice
from nanoengine.kernels.gluon import is_hopper
from nanoengine.kernels.matmul import PARTS, takes_parts
from nanoengine.kernels.ops import ops_for

pytest.importorskip("triton")
from nanoengine.kernels.matmul_launch import Products


def test_only_what_was_measured_is_taken() -> None:
    """Qwen3-8B's down of 193 to 256 rows, whose tiles are one wave."""
    assert [rows for rows in range(1, 600) if takes_parts(rows, 4096, 12288, 2, 132)] == list(range(193, 257))
    assert not takes_parts(256, 4096, 12288, 4, 132), "float32"
    assert not takes_parts(256, 4096, 4096, 2, 132), "o: cuBLAS needs no parts"
    assert not takes_parts(256, 1024, 3072, 2, 132), "a third of a wave"
    assert not takes_parts(256, 5120, 17408, 2, 132), "more than one wave"
    assert not takes_parts(256, 4096, 12288, 2, 0), "no GPU"


def test_parts_are_terms_of_the_product() -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(n, 256, generator=generator) for n in (5, 12))
    parts = Products().parts(x, weight)
    assert parts.shape == (PARTS, 5, 12)
    assert parts.is_contiguous()
    torch.testing.assert_close(parts.sum(0), x @ weight.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts[1], x[:, 128:] @ weight[:, 128:].T, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or not is_hopper(torch.device("cuda", 0)), reason="needs Hopper")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_add_them_up_on_a_gpu(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator("cuda").manual_seed(1)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator).to(dtype)

    x, down, stream, norm = rand(200, 12288), rand(4096, 12288) / 110, rand(200, 4096), rand(4096)
    qkv = rand(6144, 4096) / 64
    total = x.float() @ down.float().T + stream.float()
    want = rms_norm.rms_norm(total, norm.float(), 1e-6) @ qkv.float().T
    asked, parts_of = list[int](), Products.parts
    monkeypatch.setattr(Products, "parts", lambda self, x, w: (asked.append(len(x)), parts_of(self, x, w))[1])
    for on in (True, False):
        ops = ops_for(torch.device("cuda", 0), kernels=KernelChoice.of({"products_in_parts": on}))
        added, rest = ops.linear_add(x, down, None, stream, next_norm=norm, eps=1e-6)
        assert (rest is None) == on
        found, kept = ops.norm_linear(added, rest, norm, 1e-6, qkv)
        assert float((kept.float() - total).norm() / total.norm()) < 4e-3
        assert float((found.float() - want).norm() / want.norm()) < 1e-2
    assert asked == [200]
