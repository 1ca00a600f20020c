"""Products with a gate of some hundred rows by large weights: what takes them, and on a GPU what they give."""

from __future__ import annotations

import pytest
import torch

from nanoengine.kernels import activation, rms_norm
from nanoengine.kernels.choice import KernelChoice
from nanoengine.kernels.gluon import is_hopper
from nanoengine.kernels.matmul import takes_wide
from nanoengine.kernels.ops import ops_for

pytest.importorskip("triton")


def test_only_what_was_measured_is_taken() -> None:
    """Where its tiles are one wave: Qwen3-8B's gate and up of 193 to 256 rows, Qwen3-0.6B's of 705 to 1,024."""
    assert [rows for rows in range(1, 600) if takes_wide(rows, 12288, 4096, 2, 132)] == list(range(193, 257))
    assert not takes_wide(256, 12288, 4096, 4, 132), "float32"
    assert [rows for rows in range(1, 2100) if takes_wide(rows, 3072, 1024, 2, 132)] == list(range(705, 1025))
    assert not takes_wide(900, 3072, 1024, 2, 96), "more than one wave on a smaller GPU"
    assert not takes_wide(256, 14336, 4096, 2, 132), "more than one wave"
    assert not takes_wide(256, 6144, 4096, 2, 132), "half a wave"
    assert not takes_wide(256, 12288, 4096, 2, 0), "no GPU"


def _is_hopper() -> bool:
    return torch.cuda.is_available() and is_hopper(torch.device("cuda", 0))


def _rand(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", generator=generator)


@pytest.mark.gpu
@pytest.mark.skipif(not _is_hopper(), reason="needs a Hopper GPU")
@pytest.mark.parametrize(
    ("rows", "outputs", "k"), [(1, 96, 256), (193, 192, 1024), (256, 12288, 4096), (300, 96, 4160)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gated_products_on_a_gpu(rows: int, outputs: int, k: int, dtype: torch.dtype) -> None:
    """Also of x with a stride, in more tiles of rows than one, and again and again."""
    from nanoengine.kernels.matmul_wide_gluon import gated

    x = _rand(rows, k + 64, seed=1).to(dtype)[:, :k]
    weight = (_rand(2 * outputs, k, seed=2) / k**0.5).to(dtype)
    want = activation.act_and_mul(x.float() @ weight.float().T)
    first = gated(x, weight)
    assert float((first.float() - want).norm() / want.norm()) < 4e-3
    assert all(torch.equal(gated(x, weight), first) for _ in range(20)), "programs do not wait for their tiles"
    swapped = torch.cat([weight[outputs:], weight[:outputs]])
    assert float((gated(x, swapped).float() - want).norm() / want.norm()) > 0.1, "the gate is not told from up"


@pytest.mark.gpu
@pytest.mark.skipif(not _is_hopper(), reason="needs a Hopper GPU")
def test_layers_call_it_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoengine.kernels import matmul_wide_gluon

    calls, gated = [], matmul_wide_gluon.gated
    monkeypatch.setattr(matmul_wide_gluon, "gated", lambda x, w: (calls.append(len(x)), gated(x, w))[1])
    x, weight, norm = (
        _rand(256, 4096, seed=1).bfloat16(),
        (_rand(24576, 4096, seed=2) / 64).bfloat16(),
        torch.ones(4096),
    )
    norm = norm.cuda().bfloat16()
    normed, total = rms_norm.add_rms_norm(x, x, norm, 1e-6)
    want = activation.act_and_mul(normed.float() @ weight.float().T)
    for on in (True, False):
        ops = ops_for(torch.device("cuda", 0), kernels=KernelChoice.of({"products_wide": on}))
        found, stream = ops.norm_linear(x, x, norm, 1e-6, weight, gate="silu")
        assert float((found.float() - want).norm() / want.norm()) < 5e-3
        assert torch.equal(stream, total)
    assert calls == [256]
