"""Products in C with quantised weights: every kind, as the torch twin computes them, on every path of instructions."""

from __future__ import annotations

import platform
import sys
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cpu_libraries import PATHS, library_of
from torch import Tensor

from nanoengine.kernels.cpu import KINDS, Library, twin
from nanoengine.kernels.gguf import BLOCK_TYPES, dequantise

GGUF = [kind for kind in KINDS if kind in BLOCK_TYPES]
WIDTH = 512


@pytest.fixture(scope="module", params=PATHS)
def library(request: pytest.FixtureRequest) -> Library:
    return library_of(request.param)


def blocks_of(kind: str, outputs: int, width: int = WIDTH) -> Tensor:
    """Random blocks whose float16 fields are scales of up to 0.1."""
    rng, size = np.random.default_rng(outputs), BLOCK_TYPES[kind].size
    blocks = rng.integers(0, 256, (outputs * width // BLOCK_TYPES[kind].block, size), np.uint8)
    halves = rng.uniform(0.01, 0.1, (len(blocks), 2)).astype(np.float16).view(np.uint8)
    place = slice(208, 210) if kind == "Q6_K" else slice(0, 2 if kind in ("Q4_0", "Q5_0", "Q8_0") else 4)
    blocks[:, place] = halves[:, : place.stop - place.start]
    return torch.from_numpy(blocks).view(outputs, -1)


def close(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=2e-6 * wanted.abs().max().item(), rtol=0)


@pytest.mark.parametrize("kind", GGUF)
@pytest.mark.parametrize("outputs", [16, 70])
def test_rows_are_those_of_the_blocks_bit_for_bit(library: Library, kind: str, outputs: int) -> None:
    blocks = blocks_of(kind, outputs)
    tiles = library.pack(blocks, kind, WIDTH)
    ids = torch.arange(outputs).flip(0)
    assert torch.equal(library.rows(ids, tiles, kind, WIDTH, torch.float32), dequantise(blocks, kind).flip(0))
    assert tiles[: outputs // 16].numel() <= 1.03 * blocks[: outputs // 16 * 16].numel()


@pytest.mark.parametrize("kind", GGUF)
def test_product_is_that_of_quantised_rows(library: Library, kind: str) -> None:
    """Of 1 to 17 rows: every size of a tile of rows, and what is left of them."""
    blocks = blocks_of(kind, 70)
    tiles, weight = library.pack(blocks, kind, WIDTH), dequantise(blocks, kind)
    for rows in (1, 2, 3, 8, 15, 17):
        x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows))
        close(library.product(x, tiles, kind, 70), twin.product(x, weight))


@pytest.mark.parametrize("kind", GGUF)
def test_the_error_of_quantised_rows_is_small(library: Library, kind: str) -> None:
    """Under 1% of the product's root mean square, for rows of a normal distribution."""
    blocks = blocks_of(kind, 70)
    x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1))
    exact = F.linear(x, dequantise(blocks, kind))
    error = library.product(x, library.pack(blocks, kind, WIDTH), kind, 70) - exact
    assert error.any()
    assert error.square().mean().sqrt() < 0.01 * exact.square().mean().sqrt()


@pytest.mark.parametrize("gate", [None, "silu", "gelu_tanh", "swiglu_clamped"])
@pytest.mark.parametrize(("norm", "bias", "add"), list(product(*[[False, True]] * 3)))
def test_what_is_fused(library: Library, gate: str | None, norm: bool, bias: bool, add: bool) -> None:
    g = torch.Generator().manual_seed(0)
    blocks = blocks_of("Q4_1", 96)
    parts = {
        "bias": torch.randn(96, generator=g) if bias else None,
        "norm": torch.rand(WIDTH, generator=g) if norm else None,
        "eps": 1e-3,
        "gate": gate,
        "add": torch.randn(3, 48 if gate else 96, generator=g) if add else None,
    }
    x = torch.randn(3, WIDTH, generator=g) / 8
    got = library.product(x, library.pack(blocks, "Q4_1", WIDTH), "Q4_1", 96, **parts)
    wanted = twin.product(x, dequantise(blocks, "Q4_1"), **parts)
    # what a norm rounds otherwise may be quantised to the neighbouring value
    torch.testing.assert_close(got, wanted, atol=(2e-2 if norm else 1e-5) * wanted.abs().max().item(), rtol=0)


def test_codes_with_scales_of_single_precision(library: Library) -> None:
    g = torch.Generator().manual_seed(0)
    x, eight = torch.randn(5, WIDTH, generator=g), torch.randint(-127, 128, (40, WIDTH), generator=g).to(torch.int8)
    scale = torch.rand(40, 1, generator=g)
    close(library.product(x, library.pack_codes(eight, scale), "I8", 40), twin.product(x, eight * scale))
    four = torch.randint(0, 16, (40, WIDTH), generator=g).to(torch.uint8)
    scales, low = torch.rand(40, 4, generator=g), torch.randn(40, 4, generator=g)
    weight = (four.view(40, 4, 128) * scales.unsqueeze(2) + low.unsqueeze(2)).view(40, WIDTH)
    tiles = library.pack_codes(four, scales, low)
    close(library.product(x, tiles, "I4", 40), twin.product(x, weight))
    torch.testing.assert_close(library.rows(torch.arange(40), tiles, "I4", WIDTH, torch.float32), weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_none(library: Library, bad: float) -> None:
    """So that a row that failed is seen; the rows beside it are as they were."""
    blocks = blocks_of("Q4_0", 16)
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    tiles = library.pack(blocks, "Q4_0", WIDTH)
    before = library.product(x, tiles, "Q4_0", 16)
    x[1, 77] = bad
    after = library.product(x, tiles, "Q4_0", 16)
    assert after[1].isnan().all()
    assert torch.equal(after[::2], before[::2])


def test_results_do_not_depend_on_rows_beside_them_or_on_threads(library: Library) -> None:
    blocks = blocks_of("Q4_K", 700)
    x = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(0))
    tiles = library.pack(blocks, "Q4_K", WIDTH)
    together = library.product(x, tiles, "Q4_K", 700)
    assert torch.equal(torch.cat([library.product(row, tiles, "Q4_K", 700) for row in x.split(1)]), together)
    torch.set_num_threads(3)
    try:
        assert torch.equal(library.product(x, tiles, "Q4_K", 700), together)
    finally:
        torch.set_num_threads(1)


def test_zeros_and_no_rows(library: Library) -> None:
    tiles = library.pack(blocks_of("Q4_1", 32), "Q4_1", WIDTH)
    assert not library.product(torch.zeros(2, WIDTH), tiles, "Q4_1", 32).any()
    assert library.product(torch.zeros(0, WIDTH), tiles, "Q4_1", 32).shape == (0, 32)


def test_a_narrow_dtype_is_rounded_once(library: Library) -> None:
    tiles = library.pack(blocks_of("Q8_0", 32), "Q8_0", WIDTH)
    x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(library.product(x, tiles, "Q8_0", 32), library.product(x.float(), tiles, "Q8_0", 32).bfloat16())


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="options of x86")
@pytest.mark.skipif(sys.platform != "linux", reason="needs dlsym of an OpenMP runtime that torch loads")
def test_torch_s_threads_are_found(library: Library) -> None:
    assert library.threaded
