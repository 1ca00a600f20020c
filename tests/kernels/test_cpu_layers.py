"""Norms, gates and the attention of rows of one token in C, beside their torch twins, on every path of instructions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cpu_libraries import PATHS, library_of
from torch import Tensor

from nanoengine.kernels import activation, paged_attention, rms_norm
from nanoengine.kernels.cpu import Library
from nanoengine.kernels.cpu.attention import DecodeAttention


@pytest.fixture(scope="module", params=PATHS)
def library(request: pytest.FixtureRequest) -> Library:
    return library_of(request.param)


@pytest.mark.parametrize("width", [576, 50])
@pytest.mark.parametrize("rows", [0, 1, 40])
@pytest.mark.parametrize("residual", [False, True])
def test_norm(library: Library, width: int, rows: int, residual: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, width, generator=g), torch.rand(width, generator=g)
    more = torch.randn(rows, width, generator=g) if residual else None
    y, total = library.add_rms_norm(x, more, weight, 1e-5)
    wanted, sum_ = rms_norm.add_rms_norm(x, more, weight, 1e-5)
    assert torch.equal(total, sum_)
    torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize("width", [1536, 21])
@pytest.mark.parametrize("gate", ["silu", "gelu_tanh", "swiglu_clamped"])
def test_gate(library: Library, width: int, gate: activation.Activation) -> None:
    x = torch.randn(7, 2 * width, generator=torch.Generator().manual_seed(0)) * 10
    x[0, :4] = torch.tensor([-200.0, 200.0, -87.0, 0.0])
    torch.testing.assert_close(library.act_and_mul(x, gate), activation.act_and_mul(x, gate), atol=1e-5, rtol=2e-6)
    x[3, 5] = torch.nan
    assert library.act_and_mul(x, gate).isnan().nonzero().tolist() == [[3, 5]]


BLOCK = 4
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one head": {"heads": 1, "kv_heads": 1},
    "pairs": {"heads": 4, "kv_heads": 2},
    "eight of a head of 128": {"heads": 8, "kv_heads": 1, "size": 128},
    "an odd size of vectors": {"size": 48},
    "norms": {"norms": True},
    "a window": {"window": 5},
    "a soft cap": {"soft_cap": 3.0},
    "sinks": {"sinks": True},
    "nothing is rotated": {"rotated": 0},
    "a part is rotated": {"rotated": 16},
    "pairs are neighbours": {"interleaved": True},
}


def inputs(heads: int, kv_heads: int, size: int, rotated: int | None, lens: list[int]) -> dict[str, Tensor]:
    g, rows, width = torch.Generator().manual_seed(len(lens)), len(lens), -(-max(lens) // BLOCK)
    used = torch.randperm(rows * width, generator=g).view(rows, width).int()
    ends = torch.tensor(lens)
    blocks = used.gather(1, ((ends - 1) // BLOCK).unsqueeze(1)).squeeze(1).long()
    return {
        "qkv": torch.randn(rows, (heads + 2 * kv_heads) * size, generator=g),
        "k": torch.randn(rows * width, kv_heads, BLOCK, size, generator=g),
        "v": torch.randn(rows * width, kv_heads, BLOCK, size, generator=g),
        "tables": used,
        "lens": ends.int(),
        "slots": blocks * BLOCK + (ends - 1) % BLOCK,
        "inv_freq": 1.0 / 10.0 ** torch.arange((size if rotated is None else rotated) // 2),
        "q_weight": torch.rand(size, generator=g),
        "k_weight": torch.rand(size, generator=g),
        "sinks": torch.randn(heads, generator=g),
    }


def attend(library: Library, t: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of the kernel: the result and the caches behind it."""
    k, v, kernel = t["k"].clone(), t["v"].clone(), DecodeAttention(library)
    kernel.begin(t["tables"], t["lens"], t["slots"], t["lens"].long() - 1)
    return kernel.attend(t["qkv"], k, v, inv_freq=t["inv_freq"], **options), k, v


def wanted(t: dict[str, Tensor], interleaved: bool = False, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    k, v, norms = t["k"].clone(), t["v"].clone(), {n: options.pop(n) for n in ("q_weight", "k_weight") if n in options}
    q = paged_attention.rope.qk_norm_rope_store(
        t["qkv"], t["lens"].long() - 1, t["inv_freq"], k.transpose(1, 2), v.transpose(1, 2), t["slots"],
        eps=options.pop("eps"), magnitude=options.pop("magnitude"), interleaved=interleaved, **norms,
    )  # fmt: skip
    return paged_attention.attend_decode(q, k, v, t["tables"], t["lens"], **options), k, v


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lens", [[1], [37], [3, 17, 4, 29, 1]], ids=str)
def test_attention(library: Library, case: str, lens: list[int]) -> None:
    asked = {"heads": 6, "kv_heads": 2, "size": 32, "rotated": None, **CASES[case]}
    t = inputs(asked["heads"], asked["kv_heads"], asked["size"], asked["rotated"], lens)
    options: dict[str, Any] = {"scale": 0.2, "eps": 1e-3, "magnitude": 1.25, "sinks": None}
    options.update({name: asked[name] for name in ("window", "soft_cap", "interleaved") if name in asked})
    if asked.get("norms"):
        options.update(q_weight=t["q_weight"], k_weight=t["k_weight"])
    if asked.get("sinks"):
        options["sinks"] = t["sinks"]
    for got, own in zip(attend(library, t, **options), wanted(t, **options), strict=True):
        torch.testing.assert_close(got, own, atol=1e-5, rtol=1e-5)


def test_attention_does_not_depend_on_rows_beside_it_or_on_threads(library: Library) -> None:
    t = inputs(6, 2, 32, None, [9, 60, 31, 2] * 20)
    together = attend(library, t, scale=0.2)
    torch.set_num_threads(3)
    try:
        assert all(torch.equal(a, b) for a, b in zip(attend(library, t, scale=0.2), together, strict=True))
    finally:
        torch.set_num_threads(1)
    one = {**t, **{name: t[name][1:2] for name in ("qkv", "tables", "lens", "slots")}}
    assert torch.equal(attend(library, one, scale=0.2)[0], together[0][1:2])


@pytest.mark.parametrize("where", ["qkv", "k"])
def test_attention_of_what_is_no_number_is_none(library: Library, where: str) -> None:
    """In its row; the other rows are as they were."""
    t = inputs(6, 2, 32, None, [9, 30, 5])
    before = attend(library, t, scale=0.2)[0]
    if where == "qkv":
        t["qkv"][1, 3] = torch.nan  # of the first head
    else:
        t["k"][t["tables"][1, 2], 0, 1, 3] = torch.nan
    after = attend(library, t, scale=0.2)[0]
    assert after[1, 0].isnan().all()
    assert torch.equal(after[::2], before[::2])
