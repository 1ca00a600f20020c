"""GGUF blocks as operands of tensor cores against plain torch: every type, one token and several, rows of them. The
interpreter cannot run the assembly: it is emulated, and read, here."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from gguf_blocks import KINDS, random_blocks

pytest.importorskip("triton")
import triton.language as tl
from emulated_mma import inline_asm_elementwise

from nanoengine.kernels import gguf, gguf_fragments_triton
from nanoengine.kernels.activation import act_and_mul
from nanoengine.kernels.gguf_fragment_parts_triton import assembly
from nanoengine.kernels.gguf_fragments import FRAGMENTS, fits, fragments
from nanoengine.kernels.gguf_fragments_decode_triton import rows as decoded
from nanoengine.kernels.gguf_fragments_triton import few
from nanoengine.kernels.matmul import Scaled
from nanoengine.kernels.split_k_triton import SplitProduct

EPS = 1e-6


class WithAssembly(SplitProduct):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.constants["ASM"] = True


def blocks_of(kind: str, rows: int, width: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(random_blocks(kind, rows, width)).to(device)


@pytest.fixture
def rand(rand, device, dtype):
    if device.type == "cuda" and dtype == torch.float32:
        pytest.skip("tensor cores round float32")
    return rand


@pytest.mark.half
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_products_agree(rand, assert_close, device, kind, rows) -> None:
    """Of Q4_K three tiles along K for two warps; tokens that do not fill the last of two tiles."""
    width = 768 if kind == "Q4_K" else 256
    blocks, x, bias = blocks_of(kind, 32, width, device), rand(rows, width), rand(32)
    expected = gguf.gguf_linear(x.float(), blocks, kind, bias.float())
    assert_close(few(x, fragments(blocks, kind), kind, bias, warps=2)[0], expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the test above runs the assembly")
@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float16), (9, torch.float16), (9, torch.bfloat16)])
@pytest.mark.parametrize("kind", KINDS)
def test_products_of_the_assembly_agree(kind, rows, dtype, monkeypatch) -> None:
    """Emulated: codes stand on a base, which scales and sums of x take off again. Triton's interpreter truncates
    bfloat16."""
    ran = list[str]()

    def emulated(asm: Any, *given: Any, **options: Any) -> Any:
        ran.append(asm)
        return inline_asm_elementwise(asm, *given, **options)

    monkeypatch.setattr(tl, "inline_asm_elementwise", emulated)
    monkeypatch.setattr(gguf_fragments_triton, "SplitProduct", WithAssembly)
    blocks = blocks_of(kind, 32, 256, torch.device("cpu"))
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = gguf.gguf_linear(x.float(), blocks, kind)
    error = (few(x, fragments(blocks, kind), kind, warps=1)[0].float() - expected).norm() / expected.norm()
    assert error < torch.finfo(dtype).eps
    assert {getattr(asm, "value", asm) for asm in ran} == set(assembly(kind, dtype))


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_product_is_added_and_prepares_the_norm_behind_it(rand, assert_close, device, rows) -> None:
    blocks = blocks_of("Q4_K", 64, 256, device)
    x, residual, norm = rand(rows, 256), rand(rows, 64), rand(64)
    total, scaled = few(x, fragments(blocks, "Q4_K"), "Q4_K", add=residual, next_norm=norm)
    assert_close(total, gguf.gguf_linear(x.float(), blocks, "Q4_K") + residual.float())
    assert scaled is not None
    assert_close(scaled.values, (total.float() * norm.float()).to(x.dtype))
    assert_close(scaled.squares.sum(0), total.float().square().sum(1))


@pytest.mark.parametrize(("rows", "gate"), [(1, "silu"), (3, "gelu_tanh"), (3, None)])
def test_a_norm_in_front_takes_no_launch(rand, assert_close, device, rows, gate) -> None:
    """The result may be columns of a wider tensor."""
    blocks, x, norm, bias = blocks_of("Q6_K", 64, 256, device), rand(rows, 256), rand(256), rand(64)
    squares = x.float().square().view(rows, 4, 64).sum(2).t().contiguous()
    values = (x.float() * norm.float()).to(x.dtype)
    wide = torch.zeros(rows, 70, dtype=x.dtype, device=device)
    out = wide[:, : 32 if gate else 64]
    tiles = fragments(blocks, "Q6_K")
    y, none = few(Scaled(norm, values, squares), tiles, "Q6_K", bias, eps=EPS, gate=gate, out=out, warps=1)
    assert y is out
    assert none is None
    normed = values.float() * torch.rsqrt(squares.sum(0)[:, None] / 256 + EPS)
    expected = gguf.gguf_linear(normed, blocks, "Q6_K", bias.float())
    bound = None if x.dtype == torch.float32 else 2 * torch.finfo(x.dtype).eps
    assert_close(y, act_and_mul(expected, gate) if gate else expected, bound)
    assert not wide[:, out.shape[1] :].any()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_agree(device, dtype, kind) -> None:
    """Up to one rounding: a product and a sum may be one operation here."""
    blocks, ids = blocks_of(kind, 32, 512, device), torch.tensor([31, 0, 9, 9], device=device)
    tiles, expected = fragments(blocks, kind), gguf.dequantise(blocks, kind)
    near = {"rtol": 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(decoded(None, tiles, kind, dtype), expected.to(dtype), **near)
    torch.testing.assert_close(decoded(ids, tiles, kind, dtype), expected[ids].to(dtype), **near)


@pytest.mark.parametrize("kind", KINDS)
def test_fragments_are_the_same_bits(kind) -> None:
    blocks = blocks_of(kind, 64, 512, torch.device("cpu"))
    tiles = fragments(blocks, kind)
    assert tiles.shape == (4, 2, 16 * FRAGMENTS[kind].row_bytes)
    assert tiles.numel() == blocks.numel()
    shift = torch.arange(8)
    of_tiles = (tiles.flatten(1).unsqueeze(2) >> shift) & 1
    of_lines = (blocks.view(4, -1).unsqueeze(2) >> shift) & 1
    assert torch.equal(of_tiles.sum((1, 2)), of_lines.sum((1, 2)))


@pytest.mark.parametrize(("kind", "rows", "width"), [("Q4_K", 48, 256), ("Q4_0", 32, 288)])
def test_rows_and_weights_that_fill_no_tile_do_not_fit(kind, rows, width) -> None:
    assert not fits(blocks_of(kind, rows, width, torch.device("cpu")), kind)
    assert fits(blocks_of(kind, 64, 512, torch.device("cpu")), kind)


def test_a_mutant_that_reads_another_rows_scales_is_seen(rand, device) -> None:
    blocks, x = blocks_of("Q4_K", 32, 512, device), rand(1, 512)
    tiles = fragments(blocks, "Q4_K")
    tiles[:, :, 2048:] = tiles[:, :, 2048:].roll(16, dims=2)
    expected = gguf.gguf_linear(x.float(), blocks, "Q4_K")
    error = (few(x, tiles, "Q4_K")[0].float() - expected).norm() / expected.norm()
    assert error > 0.1


def _operands(text: str, low: int, high: int, more: int) -> list[tuple[list[int], list[str]]]:
    """What each product of an assembly has: its codes' registers, and x. Runs all but the products."""
    values, found = {"$8": low, "$9": high, "$10": more}, []
    for line in text.strip("{}").split("\n"):
        name, *operands = re.findall(r"[\w.$]+", line)
        if name.startswith("mma"):
            found.append(([values[each] for each in operands[4:8]], operands[8:10]))
        elif name.startswith("sh"):
            to, of, by = operands
            values[to] = (values[of] >> int(by) if name == "shr.u32" else values[of] << int(by)) & 0xFFFFFFFF
        elif name.startswith("lop3"):
            to, of, mask, other, table = operands
            cut, base = values[of] & int(mask, 16), values[other] if other in values else int(other, 16)
            values[to] = {"0xEA": cut | base, "0x6A": cut ^ base}[table]
    return found


@pytest.mark.parametrize(("dtype", "base"), [(torch.bfloat16, 128), (torch.float16, 1024)])
@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_the_assembly_takes_every_code_beside_its_x(kind, part, dtype, base) -> None:
    """Register r of a product: row g or g + 8 (r % 2), weights 0 and 1 or 2 and 3 of its four (r // 2)."""
    more = FRAGMENTS[kind].more
    codes = torch.randint(0, 16 << more, (2, 8), generator=torch.Generator().manual_seed(part)).tolist()
    words, further = [0, 0], 0
    for row in range(2):
        for e, code in enumerate(codes[row]):
            words[row] |= (code & 15) << (e // 2 * 4 + e % 2 * 16)
            at = (row * 4 + e // 2) * more + e % 2 * 16 + (8 * part if more == 1 else 0)
            further |= (code >> 4) << at if more else 0
    products = _operands(assembly(kind, dtype)[part], *words, further)
    assert [x for _, x in products] == [["$11", "$12"], ["$13", "$14"]]
    turned = 8 if kind == "Q8_0" and part else 0
    for row in range(2):
        for e, code in enumerate(codes[row]):
            word = products[e // 4][0][row + e // 2 % 2 * 2]
            half = torch.tensor((word >> 16 * (e % 2)) & 0xFFFF, dtype=torch.int32).to(torch.int16).view(dtype)
            assert half.item() == base + (code ^ turned)
