"""Kernels run on the GPU where there is one, else in Triton's interpreter (small shapes; about 1 ms a program), whose
bfloat16 arithmetic is silently wrong: that dtype is tested on a GPU only."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator

import pytest
import torch
from triton_interpreter import import_kernels, interpreted

ON_GPU = torch.cuda.is_available()
WEEK = 7 * 24 * 3600
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]


import_kernels()


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    with interpreted():
        yield


@pytest.fixture(scope="session")
def compiled_before(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of what Triton compiled, found by all that it is compiled from. It is kept between runs, in pytest's
    cache, and what was made over a week ago is removed."""
    kept = getattr(request.config, "cache", None)
    if kept is None:  # -p no:cacheprovider
        return str(tmp_path_factory.mktemp("triton"))
    folder = kept.mkdir("triton")
    for made in folder.iterdir():
        if time.time() - made.stat().st_mtime > WEEK:
            shutil.rmtree(made, ignore_errors=True)
    return str(folder)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def rand(device: torch.device, dtype: torch.dtype):
    """rand(*shape): normal values of the test's dtype, made on the host, so that every device gets the same."""
    generator = torch.Generator().manual_seed(1234)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

    return make


@pytest.fixture
def assert_close():
    """||out - expected|| <= bound * ||expected||, and nothing unwritten (NaN never passes).

    The default bound is the spacing of the dtype at 1 (twice what one rounding can do), so that it covers the result's
    rounding and one more of an operand; in float32, where sums in another order weigh more than rounding, 2e-6.
    """

    def check(out: torch.Tensor, expected: torch.Tensor, bound: float | None = None) -> None:
        assert out.shape == expected.shape
        if bound is None:
            bound = 2e-6 if out.dtype == torch.float32 else torch.finfo(out.dtype).eps
        out64, expected64 = out.double(), expected.double()
        error = (out64 - expected64).norm() / expected64.norm().clamp_min(1e-30)
        assert error.item() <= bound, f"relative error {error.item():.3g} > {bound:.3g}"

    return check
