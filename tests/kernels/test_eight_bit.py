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
    """Products of one row that quantise it themselves."""

    KINDS: ClassVar[dict[str, dict[str, Any]]] = {
        "token": {"inputs": "token"},
        "bound": {"inputs": "token", "bound": 1.5},
        "static": {"inputs": "tensor", "input_scale": 0.004},
        "static blocks": {"inputs": "tensor", "rows": 8, "input_scale": 0.01},
    }
    kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())

    @pytest.fixture(autouse=True)
    def small_pieces(self, monkeypatch, device) -> int:
        """Of K, in the interpreter; on a GPU each of eight warps needs 512 inputs."""
        piece = 4096 if device.type == "cuda" else 64
        monkeypatch.setattr(eight_bit_streamed_triton, "_PIECE", piece)
        return piece

    @pytest.mark.half
    @pytest.mark.parametrize("gate", [None, "silu"])
    @pytest.mark.parametrize(
        ("pieces", "tile"),
        [
            (1.5, StreamedTile(rows=1, stages=3, warps=8, programs=5)),  # shares of which the last is short
            (1, StreamedTile(rows=2, stages=4, programs=64)),  # fewer rows than programs, steps than stages
            (3, StreamedTile(rows=4, stages=3, programs=2)),
        ],
    )
    def test_agrees(self, rand, weight, assert_close, small_pieces, pieces, tile, gate) -> None:
        self._agrees(rand, weight, assert_close, int(pieces * small_pieces), tile, gate, self.KINDS["token"])

    @kinds
    def test_inputs_of_each_kind_agree(self, rand, weight, assert_close, small_pieces, kind) -> None:
        tile = StreamedTile(rows=2, stages=3, programs=5)
        self._agrees(rand, weight, assert_close, small_pieces, tile, "gelu_tanh", kind)

    def _agrees(self, rand, weight, assert_close, k, tile, gate, kind) -> None:
        w, x, norm, bias = weight(FP8, 44, k, **kind), rand(1, k), rand(k), rand(44)
        add = rand(1, 22 if gate else 44)
        y = streamed(w, x, bias, gate=gate, add=add, tile=tile)
        assert_close(y, product_of_codes(w, x, bias, gate=gate, add=add), bound=rounded(x.dtype, w, gate))
        y = streamed(w, x, bias, norm_weight=norm, eps=EPS, gate=gate, tile=tile)
        expected, _ = eight_bit.norm_product(w, x, None, norm, EPS, bias, gate=gate)
        normed, _ = eight_bit.add_rms_norm(x, None, norm, EPS)
        lost = (2.1 if gate else 1) * (torch.finfo(x.dtype).eps + one_code(w, normed))
        assert_close(y, expected, bound=2 * rounded(x.dtype, w, gate) + lost)

    @pytest.mark.filterwarnings("ignore:invalid value encountered")
    @kinds
    def test_codes_are_those_of_the_kernel_in_front(self, rand, weight, small_pieces, kind) -> None:
        """Bit for bit: the weight is every third row of the unit matrix, so a product is a code times its scale. What
        is not finite is seen."""
        k = small_pieces
        w = weight(FP8, -(-k // 3), k, **kind)
        w = replace(w, weight=torch.eye(k, device=w.scale.device)[::3].to(FP8), scale=torch.ones_like(w.scale))
        tile = StreamedTile(rows=2, stages=3, programs=3)
        small = rand(1, k)
        small[:, : k // 2] *= 0.001
        for x in (rand(1, k), torch.linspace(-1, 1, k, device=small.device, dtype=small.dtype)[None], small, small * 0):
            codes, scale, _ = quantised(x, w)
            y = streamed(w, x, None, tile=tile, out=torch.empty(1, len(w.weight), device=x.device))
            assert torch.equal(y, (codes.float() * scale)[:, ::3])
            for value in (float("inf"), float("nan")):
                wrong = x.clone()
                wrong[0, 3] = value
                assert not streamed(w, wrong, None, tile=tile).isfinite().any()

    @kinds
    def test_the_switch_is_asked(self, rand, weight, small_pieces, kind, monkeypatch) -> None:
        size, ran = small_pieces, list[int]()

        def counted(w, x, *args, **options):
            ran.append(len(x))
            return streamed(w, x, *args, tile=StreamedTile(rows=2, stages=3, programs=5), **options)

        monkeypatch.setattr(eight_bit_triton, "streamed", counted)
        monkeypatch.setattr(eight_bit_streamed_triton, "_WORTH", 1)
        monkeypatch.setattr(eight_bit_streamed_triton, "_LEAST_K", size)
        for on in (True, False):
            w, x = replace(weight(FP8, 32, size, **kind), streamed=on), rand(2, size)
            for rows in (1, 2):
                eight_bit_triton.product(w, x[:rows], None)
                eight_bit_triton.product_added(w, x[:rows], None, rand(rows, 32))
                eight_bit_triton.norm_product(w, x[:rows], None, rand(size), EPS)
                eight_bit_triton.norm_product(w, x[:rows], x[:rows], rand(size), EPS)
        assert ran == [1, 1, 1]
        for other in (
            weight(INT8, 32, size, "token"),
            weight(FP8, 32, size, "plain"),
            weight(FP8, 32, size, "group", columns=32),
            weight(FP8, 32, size, "tensor", columns=32, input_scale=0.01),
            weight(FP8, 32, size + 8, "token"),
            weight(FP8, 32, size - 16, "token"),
        ):
            assert not eight_bit_streamed_triton.takes_streamed(replace(other, streamed=True), 1)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the tests above run the assembly")
    @pytest.mark.parametrize("gate", [None, "silu"])
    def test_products_of_the_assembly_agree(self, weight, assert_close, monkeypatch, gate) -> None:
        """Emulated: what is wanted of tensor cores' products is their diagonals."""
        monkeypatch.setattr(eight_bit_streamed_triton, "_PIECE", 1024)
        monkeypatch.setattr(tl, "inline_asm_elementwise", inline_asm_elementwise)
        monkeypatch.setattr(eight_bit_streamed_triton, "_assembly_for", lambda _: eight_bit_streamed_triton.assembly())
        tile = StreamedTile(rows=2, stages=3, programs=2)
        x = torch.randn(1, 2000, generator=torch.Generator().manual_seed(1))
        w = weight(FP8, 14, 2000, **self.KINDS["token"])
        assert_close(
            streamed(w, x, None, gate=gate, tile=tile),
            product_of_codes(w, x, gate=gate),
            bound=rounded(x.dtype, w, gate),
        )
