"""Products with weights of eight bits against their reference in torch, and that against the formats' own words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch

pytest.importorskip("triton")
import triton.language as tl
from emulated_mma import inline_asm_elementwise

from nanoengine.kernels import eight_bit, eight_bit_streamed_triton, eight_bit_triton
from nanoengine.kernels.eight_bit import EightBit, dequantised
from nanoengine.kernels.eight_bit_streamed_triton import StreamedTile, streamed
from nanoengine.kernels.eight_bit_tile_triton import Tile, tiled
from nanoengine.kernels.quantise_triton import quantised
from nanoengine.kernels.rms_norm import add_rms_norm

EPS = 1e-6
FP8, INT8 = torch.float8_e4m3fn, torch.int8


@pytest.fixture
def weight(device):
    generator = torch.Generator().manual_seed(7)

    def make(dtype, n, k, inputs, *, rows=1, columns=0, input_scale=None, bound=None) -> EightBit:
        columns = columns or k
        values = torch.randn(n, k, generator=generator)
        codes = (values * 40).clamp(-127, 127).round().to(torch.int8) if dtype == INT8 else (values * 60).to(FP8)
        scale = torch.rand(-(-n // rows), -(-k // columns), generator=generator) * 0.02 + 0.01

        def one(value):
            return None if value is None else torch.tensor([value], device=device)

        return EightBit(codes.to(device), scale.to(device), rows, columns, inputs, one(input_scale), one(bound))

    return make


KINDS = {
    "fp8 token": {"dtype": FP8, "inputs": "token"},
    "fp8 bound": {"dtype": FP8, "inputs": "token", "bound": 1.5},
    "fp8 static": {"dtype": FP8, "inputs": "tensor", "input_scale": 0.004},
    "fp8 weight": {"dtype": FP8, "inputs": "plain"},
    "fp8 blocks": {"dtype": FP8, "inputs": "group", "rows": 32, "columns": 32},
    "fp8 blocks a row each": {"dtype": FP8, "inputs": "group", "rows": 1, "columns": 32},
    "fp8 blocks static": {"dtype": FP8, "inputs": "tensor", "rows": 32, "columns": 64, "input_scale": 0.01},
    "fp8 blocks weight": {"dtype": FP8, "inputs": "plain", "rows": 32, "columns": 64},
    "int8 token": {"dtype": INT8, "inputs": "token"},
    "int8 static": {"dtype": INT8, "inputs": "tensor", "input_scale": 0.02},
    "int8 weight": {"dtype": INT8, "inputs": "plain"},
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def rounded(dtype: torch.dtype, w: EightBit, gate: str | None = None) -> float:
    """Of a product whose codes are known: one rounding of the result, and what float32 sums lose. On a GPU tensor cores
    cut FP8's products at 2^-13 of the largest, which is up to 4 times the result, with each 32 inputs. A gate is a
    product of two, and changes up to 1.1 times as much as what it is of."""
    cores = w.scale.is_cuda and w.weight.dtype == FP8 and w.inputs != "plain"
    lost = 2e-6 + -(-w.weight.shape[1] // 32) * 2.0**-11 * cores
    return torch.finfo(dtype).eps / 2 + lost * (2.1 if gate else 1)


def one_code(w: EightBit, x: torch.Tensor) -> float:
    """What changes of a product, at most, if the largest code of each row is the next one: 1/8 of it, or 1."""
    if w.inputs == "plain":
        return 0.0
    codes = eight_bit.quantised(x, w)[0].float()
    step = codes.abs().amax(1) / 8 if w.weight.dtype == FP8 else torch.ones(len(x), device=x.device)
    return float((step / codes.norm(dim=1)).max())


def product_of_codes(w: EightBit, x: torch.Tensor, *args: Any, **around: Any) -> torch.Tensor:
    """float32: the reference's product of the codes that kernels make of x."""
    if w.inputs != "plain":
        codes, scale, _ = quantised(x, w)
        x = codes.float() * scale.repeat_interleave(w.group, 1)[:, : x.shape[1]]
    return eight_bit.product(replace(w, inputs="plain"), x.float(), *args, **around)


def assert_next_to(codes: torch.Tensor, expected: torch.Tensor) -> None:
    """Few differ, and by one step: a quotient's last bit may decide a tie."""
    off, wide = (codes.float() - expected.float()).abs(), expected.float().abs()
    assert (off > 0).float().mean() < 0.02
    assert (off <= ((wide / 8).clamp_min(2.0**-9) if codes.dtype == FP8 else torch.ones_like(wide))).all()


@kinds
def test_codes_are_those_of_the_reference(rand, weight, kind) -> None:
    """With ties, values that are rounded up to the next power of two, subnormal ones, and a row of zeros."""
    if kind["inputs"] == "plain":
        pytest.skip("nothing is quantised")
    x = rand(5, 88)
    x[1] = torch.linspace(-1, 1, 88)
    x[2, :64] *= 0.001
    x[3] = 0
    w = weight(n=16, k=88, **kind)
    codes, scale, total = quantised(x, w)
    expected, expected_scale = eight_bit.quantised(x, w)
    assert total is x
    assert codes.dtype == w.weight.dtype
    assert torch.equal(scale, expected_scale)
    assert_next_to(codes, expected)


@pytest.mark.parametrize("normed", [False, True])
def test_several_programs_quantise_a_long_row(rand, weight, assert_close, normed) -> None:
    """As one does; 2,100 inputs do not fill the last of four parts."""
    x, residual, norm = rand(2, 2100), rand(2, 2100), rand(2100)
    w = weight(n=1, k=2100, **KINDS["fp8 token"])
    given = {"residual": residual, "norm_weight": norm, "eps": EPS} if normed else {}
    codes, scale, total = quantised(x, w, **given)
    source, stream = add_rms_norm(x, residual, norm, EPS) if normed else (x, x)
    expected, expected_scale = eight_bit.quantised(source, w)
    assert_close(total, stream)
    # A sum of n squares in another order changes by n * 2^-24, its root by half of that; then values are rounded.
    rtol = 2100 * 2.0**-25 + (torch.finfo(x.dtype).eps if x.dtype != torch.float32 else 0.0) if normed else 0.0
    torch.testing.assert_close(scale, expected_scale, rtol=rtol, atol=0)
    if not normed or x.dtype == torch.float32:
        assert_next_to(codes, expected)
    else:  # a value that is rounded to the other side moves up to a step
        seen = [each.float() * of for each, of in ((codes, scale), (expected, expected_scale))]
        assert_close(*seen, bound=rtol + 2.0**-4)


@pytest.mark.half
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@kinds
def test_what_is_not_finite_is_seen_in_its_row_alone(rand, weight, assert_close, kind, value) -> None:
    w, x = weight(n=16, k=64, **kind), rand(20, 64)
    clean = eight_bit.product(w, x)
    x[1, 3] = value
    for rows in (x, x[:2]):
        for module in (eight_bit, eight_bit_triton):
            y = module.product(w, rows)
            assert not y[1].isfinite().any()
            assert_close(y[:1], clean[:1].float(), bound=2 * rounded(x.dtype, w) + one_code(w, x[:1]))


@pytest.mark.half
@kinds
@pytest.mark.parametrize("rows", [2, 20])
@pytest.mark.parametrize(("gate", "with_bias", "with_add"), [(None, True, True), ("silu", True, False)])
def test_product_agrees(rand, weight, assert_close, kind, rows, gate, with_bias, with_add) -> None:
    n, k = 64, 88
    w, x = weight(n=n, k=k, **kind), rand(rows, k)
    bias = rand(n) if with_bias else None
    add = rand(rows, n // 2 if gate else n) if with_add else None
    expected = product_of_codes(w, x, bias, gate=gate, add=add)
    assert expected.dtype == torch.float32
    y = eight_bit_triton.product(w, x, bias, gate=gate, add=add)
    assert y.dtype == x.dtype
    assert_close(y, expected, bound=rounded(x.dtype, w, gate))


@pytest.mark.half
@kinds
@pytest.mark.parametrize("rows", [1, 9])
def test_norm_product_agrees(rand, weight, assert_close, kind, rows) -> None:
    w, x, norm_weight = weight(n=48, k=160, **kind), rand(rows, 160), rand(160)
    for residual in (None, rand(rows, 160)):
        y, total = eight_bit_triton.norm_product(w, x, residual, norm_weight, EPS)
        expected, expected_total = eight_bit.norm_product(w, x, residual, norm_weight, EPS)
        assert torch.equal(total, expected_total)
        normed, _ = add_rms_norm(x, residual, norm_weight, EPS)
        assert_close(y, expected, bound=2 * rounded(x.dtype, w) + torch.finfo(x.dtype).eps + one_code(w, normed))


@kinds
def test_k_in_parts_agrees(rand, weight, assert_close, kind) -> None:
    """Parts of K, bands of token tiles, and outputs that do not fill a tile."""
    w, x, add = weight(n=40, k=224, **kind), rand(19, 224), rand(19, 40)
    plain = w.inputs == "plain"
    codes, scale = (x, None) if plain else quantised(x, w)[:2]
    block = w.columns if w.columns < 224 else 32
    tile = Tile(block_n=32, block_k=block, block_t=16, warps=4, stages=2, splits=3)
    for each in (tile, replace(tile, splits=1)):
        y = tiled(w, codes, scale, None, dtype=x.dtype, add=add, tile=each)
        assert_close(y, product_of_codes(w, x, add=add), bound=rounded(x.dtype, w))


def test_out_receives_the_result(rand, weight) -> None:
    w = weight(FP8, 32, 64, "token")
    for rows in (1, 5):
        x = rand(rows, 64)
        for module in (eight_bit, eight_bit_triton):
            out = torch.full((rows, 32), 9.0, dtype=torch.float32, device=x.device)
            assert module.product(w, x, out=out) is out
            torch.testing.assert_close(module.product(w, x).float(), out, rtol=torch.finfo(x.dtype).eps, atol=0)


def test_no_rows_are_no_work(rand, weight) -> None:
    for kind in KINDS.values():
        w = weight(n=32, k=64, **kind)
        assert eight_bit_triton.product(w, rand(0, 64), gate="silu").shape == (0, 16)
        assert eight_bit_triton.norm_product(w, rand(0, 64), None, rand(64), EPS)[0].shape == (0, 32)


class TestReference:
    def test_a_weight_is_its_codes_times_its_blocks_scales(self, weight) -> None:
        w = weight(FP8, 5, 7, "plain", rows=2, columns=3)
        for n in range(5):
            for k in range(7):
                assert dequantised(w)[n, k] == w.weight[n, k].float() * w.scale[n // 2, k // 3]
        assert torch.equal(dequantised(w, 3, 5), dequantised(w)[3:])

    @pytest.mark.parametrize("dtype", [FP8, INT8])
    def test_every_code_is_widened_exactly(self, dtype) -> None:
        codes = torch.arange(256, dtype=torch.uint8).view(dtype).view(1, -1)
        found = [each for each in (codes, codes[:, :127], codes[:, 128:255]) if dtype == FP8 or each is codes]
        for each in found:  # with NaN, and without, where bits become those of a float16
            w = EightBit(each, torch.ones(1, 1), 1, each.shape[1], "plain")
            assert torch.equal(dequantised(w).signbit(), each.float().signbit())
            torch.testing.assert_close(dequantised(w), each.float(), rtol=0, atol=0, equal_nan=True)

    @pytest.mark.parametrize("kind", ["int8 token", "int8 static"])
    def test_products_of_whole_numbers_are_those_of_widened_ones(self, weight, rand, kind, monkeypatch) -> None:
        w, x = weight(n=33, k=80, **KINDS[kind]), rand(3, 80).float()
        if x.is_cuda or not eight_bit.whole_products():
            pytest.skip("not on this processor")
        calls = list[int]()
        product = torch._int_mm
        monkeypatch.setattr(torch, "_int_mm", lambda a, b: (calls.append(len(a)), product(a, b))[1])
        found = [eight_bit.product(w, x[:rows]) for rows in (0, 1, 3)]
        assert calls == [1, 3]
        monkeypatch.setattr(eight_bit, "whole_products", lambda: False)
        for each, rows in zip(found, (0, 1, 3), strict=True):
            torch.testing.assert_close(each, eight_bit.product(w, x[:rows]))

    def test_a_processor_whose_sums_saturate_is_seen(self, monkeypatch) -> None:
        def saturating(a, b):
            pairs = (a.long().unsqueeze(1) * b.t().long()).unflatten(2, (-1, 2)).sum(3)
            return pairs.clamp(-(2**15), 2**15 - 1).sum(2).to(torch.int32)

        monkeypatch.setattr(torch, "_int_mm", saturating)
        assert not eight_bit.whole_products.__wrapped__()

    def test_large_weights_are_expanded_piece_by_piece(self, weight, rand, monkeypatch) -> None:
        w, x = weight(FP8, 50, 32, "token"), rand(3, 32).float()
        whole = eight_bit.product(w, x)
        monkeypatch.setattr(eight_bit, "_CHUNK", 32 * 8)
        torch.testing.assert_close(eight_bit.product(w, x), whole)

    def test_a_groups_scale_is_its_largest_value_over_the_largest_code(self, weight) -> None:
        w = weight(FP8, 4, 40, "group", rows=32, columns=32)
        x = torch.linspace(-3, 5, 80, device=w.scale.device).view(2, 40)
        codes, scale = eight_bit.quantised(x, w)
        torch.testing.assert_close(scale, torch.stack([x[:, :32].abs().amax(1), x[:, 32:].abs().amax(1)], 1) / 448)
        assert torch.equal(codes[:, 32:].float(), (x[:, 32:] / scale[:, 1:]).to(FP8).float())

    def test_a_bound_limits_the_scale_and_the_values(self, weight) -> None:
        w = weight(FP8, 4, 4, "token", bound=2.0)
        codes, scale = eight_bit.quantised(torch.tensor([[1.0, -2.0, 8.0, 0.0]], device=w.scale.device), w)
        assert scale.item() == pytest.approx(2 / 448)
        assert codes.float().tolist() == [[224.0, -448.0, 448.0, 0.0]]

    def test_int8_codes_are_symmetric(self, weight) -> None:
        w = weight(INT8, 4, 4, "token")
        codes, scale = eight_bit.quantised(torch.tensor([[254.0, -254.0, 5.0, 3.0]], device=w.scale.device), w)
        assert codes.tolist() == [[127, -127, 2, 2]]  # 2.5 and 1.5: ties to even
        assert scale.item() == 2.0


class TestStreamed:
    """Products that quantise a few rows themselves."""

    KINDS: ClassVar[dict[str, dict[str, Any]]] = {
        "token": {"inputs": "token"},
        "bound": {"inputs": "token", "bound": 1.5},
        "static": {"inputs": "tensor", "input_scale": 0.004},
        "blocks": {"inputs": "group", "rows": 32, "columns": 64},
        "blocks static": {"inputs": "tensor", "rows": 1, "columns": 64, "input_scale": 0.01},
    }
    kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())

    @pytest.mark.filterwarnings("ignore:invalid value encountered")
    @kinds
    def test_codes_are_those_of_the_kernel_in_front(self, rand, weight, kind) -> None:
        """Bit for bit: the weight is every third row of the unit matrix, so a product is a code times its scale. What
        is not finite is seen in its row, and nowhere else."""
        x = rand(4, 80)
        x[1] = torch.linspace(-1, 1, 80)
        x[2, :64] *= 0.001
        x[3] = 0
        w = weight(FP8, 27, 80, **kind)
        w = replace(w, weight=torch.eye(80, device=x.device)[::3].to(FP8), scale=torch.ones_like(w.scale))
        codes, scale, _ = quantised(x, w)
        out = torch.empty(4, 27, device=x.device)
        y, _ = streamed(w, x, None, out=out)
        assert torch.equal(y, (codes.float() * scale.repeat_interleave(w.group, 1)[:, :80])[:, ::3])
        assert not y[3].any()
        assert y[1].any()
        x[1, 3], x[2, 70] = float("inf"), float("nan")
        again, _ = streamed(w, x, None, out=torch.empty_like(out))
        assert not again[1:3].isfinite().any()
        assert torch.equal(again[::3], y[::3])

    @pytest.mark.parametrize("gate", [None, "silu"])
    @pytest.mark.parametrize("pairs", [1, 2, 4])
    def test_chunks_of_k_and_rows_that_fill_no_tile(self, rand, weight, assert_close, pairs, gate) -> None:
        kind = self.KINDS["blocks" if pairs == 2 else "token"]
        w, x, norm = weight(FP8, 22, 1040, **kind), rand(2, 1040), rand(1040)
        programs, bias = -(-22 // (4 * pairs)), rand(22)
        tile = StreamedTile(pairs=pairs, chunks=3, warps=1, programs=programs, steps=2)
        y, total = streamed(w, x, bias, residual=x, norm_weight=norm, eps=EPS, gate=gate, tile=tile)
        expected, expected_total = eight_bit.norm_product(w, x, x, norm, EPS, bias, gate=gate)
        assert torch.equal(total, expected_total)
        normed, _ = eight_bit.add_rms_norm(x, x, norm, EPS)
        lost = (2.1 if gate else 1) * (torch.finfo(x.dtype).eps + one_code(w, normed))
        assert_close(y, expected, bound=2 * rounded(x.dtype, w, gate) + lost)

    @kinds
    def test_the_switch_is_asked(self, rand, weight, kind, monkeypatch) -> None:
        ran = list[int]()

        def counted(w, x, *args, **options):
            ran.append(len(x))
            return streamed(w, x, *args, **options)

        monkeypatch.setattr(eight_bit_triton, "streamed", counted)
        for on in (True, False):
            w, x = replace(weight(FP8, 32, 64, **kind), streamed=on), rand(2, 64)
            for rows in (1, 2):
                eight_bit_triton.product(w, x[:rows], None)
                eight_bit_triton.product_added(w, x[:rows], None, rand(rows, 32))
                eight_bit_triton.norm_product(w, x[:rows], None, rand(64), EPS)
        assert ran == [1, 1, 1]
        wide = replace(weight(FP8, 16, 64, inputs="group", columns=1024), streamed=True)  # a program has 512 inputs
        assert not eight_bit_streamed_triton.takes_streamed(wide, 1)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the tests above run the assembly")
    def test_products_of_the_assembly_agree(self, weight, assert_close, monkeypatch) -> None:
        """Emulated, two warps: what is wanted of tensor cores' products is their diagonals."""
        monkeypatch.setattr(tl, "inline_asm_elementwise", inline_asm_elementwise)
        monkeypatch.setattr(eight_bit_streamed_triton, "_assembly_for", lambda _: eight_bit_streamed_triton.assembly())
        tile = StreamedTile(pairs=2, chunks=1, warps=2, programs=2, steps=1)
        for kind in ("token", "blocks"):
            x = torch.randn(2, 1008, generator=torch.Generator().manual_seed(1))
            w = weight(FP8, 7, 1008, **self.KINDS[kind])
            y, _ = streamed(w, x, None, tile=tile)
            assert_close(y, product_of_codes(w, x), bound=rounded(x.dtype, w))
