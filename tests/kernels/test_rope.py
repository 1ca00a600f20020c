"""q/k norm + rotary embedding + KV store against torch, and against the layers they stand for."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from nanoengine.kernels.kv_quant import KV_DTYPES, LARGEST
from nanoengine.kernels.rope import qk_norm_rope_store as reference
from nanoengine.kernels.rope_triton import qk_norm_rope_store
from nanoengine.layers.rope import Rope, RopeConfig, RotaryEmbedding, apply_rope

EPS = 1e-6
BLOCK_SIZE = 16


def make_cache(heads: int, size: int, like: torch.Tensor, *, head_major: bool = False) -> torch.Tensor:
    """[blocks, block size, heads, D] of NaN, in one of two memory orders; more slots than tokens."""
    blocks = len(like) // BLOCK_SIZE + 2
    shape = (blocks, heads, BLOCK_SIZE, size) if head_major else (blocks, BLOCK_SIZE, heads, size)
    cache = torch.full(shape, float("nan"), dtype=like.dtype, device=like.device)
    return cache.transpose(1, 2) if head_major else cache


def run_both(
    rand, device, assert_close, *, tokens, heads, kv_heads, size, norm, head_major=False, rotated=None, **rope
) -> None:
    qkv = rand(tokens, (heads + 2 * kv_heads) * size)
    options = {"q_weight": rand(size), "k_weight": rand(size), "eps": EPS} if norm else {}
    options |= rope
    positions = (torch.arange(tokens, device=device) * 7919) % 40960
    inv_freq = RotaryEmbedding(RopeConfig(theta=1e6), size, device).inv_freq[
        : None if rotated is None else rotated // 2
    ]
    # every slot at most once: what is written twice is undefined
    slots = torch.randperm((tokens // BLOCK_SIZE + 2) * BLOCK_SIZE, generator=torch.Generator().manual_seed(5))
    slots = slots[:tokens].to(device)
    slots[tokens // 2] = -1
    outs = []
    for run in (reference, qk_norm_rope_store):
        k, v = (make_cache(kv_heads, size, qkv, head_major=head_major) for _ in range(2))
        q = run(qkv, positions, inv_freq, k, v, slots, **options)
        outs.append((q, k, v))
    (q, k, v), (got_q, got_k, got_v) = outs
    # two roundings beside each other where float32 differs in its last bit: norm, then rotation
    bound = 4e-6 if q.dtype == torch.float32 else torch.finfo(q.dtype).eps
    assert_close(got_q, q, bound)
    assert torch.equal(got_k.isnan(), k.isnan()), "wrong slots written"
    assert k.isnan().any()
    assert_close(got_k.nan_to_num(), k.nan_to_num(), bound)
    assert torch.equal(got_v.nan_to_num(), v.nan_to_num())
    assert got_v.isnan().sum() == v.isnan().sum()


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 128), (3, 1, 80), (9, 3, 64), (2, 2, 6)])
def test_agrees(rand, device, assert_close, heads, kv_heads, size, norm) -> None:
    run_both(rand, device, assert_close, tokens=3, heads=heads, kv_heads=kv_heads, size=size, norm=norm)


KINDS = [
    {"rotated": 32},
    {"interleaved": True},
    {"magnitude": 1.3},
    {"rotated": 20, "interleaved": True, "magnitude": 0.7},
    {"rotated": 2, "magnitude": 2.0},
    {"rotated": 0},
]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_each_kind_of_rotation_agrees(rand, device, assert_close, kind, norm) -> None:
    run_both(rand, device, assert_close, tokens=3, heads=3, kv_heads=2, size=48, norm=norm, **kind)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_each_kind_agrees_with_the_layer(rand, device, dtype, assert_close, kind) -> None:
    heads, kv_heads, size = 2, 1, 48
    width = kind.get("rotated", size)
    frequencies = RopeConfig(theta=1e4).rope(size).frequencies[: width // 2]
    others = {name: value for name, value in kind.items() if name != "rotated"}
    layer = RotaryEmbedding(Rope(frequencies=frequencies, **others), size, device)
    qkv, positions = rand(5, (heads + 2 * kv_heads) * size), torch.tensor([0, 1, 7, 4095, 131071], device=device)
    k, v = (make_cache(kv_heads, size, qkv) for _ in range(2))
    slots = torch.arange(5, device=device)
    q = qk_norm_rope_store(qkv, positions, layer.inv_freq, k, v, slots, **others)
    expected = layer(positions).rotate(qkv.view(5, -1, size))
    bound = 2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert_close(q, expected[:, :heads], bound)
    assert_close(k[0, :5], expected[:, heads : heads + kv_heads], bound)
    rest = qkv.view(5, -1, size)[:, :heads, width:]
    assert torch.equal(q[..., width:], rest)  # beyond the rotated elements nothing happens
    assert width == 0 or not torch.equal(q[1:, :, :width], qkv.view(5, -1, size)[1:, :heads, :width])


def test_head_major_cache(rand, device, assert_close) -> None:
    run_both(rand, device, assert_close, tokens=5, heads=4, kv_heads=2, size=96, norm=True, head_major=True)


@pytest.mark.filterwarnings("ignore:All-NaN slice|invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("stored", ["int8", "fp8"])
@pytest.mark.parametrize("kind", [{}, {"interleaved": True}, {"magnitude": 1.3}], ids=str)
def test_codes_are_those_of_the_reference(rand, device, assert_close, stored, kind) -> None:
    """With a head of zeros, one that is not finite, and a token that goes nowhere; other slots keep what they had."""
    heads, kv_heads, size, tokens = 3, 2, 48, 5
    qkv, weights = rand(tokens, (heads + 2 * kv_heads) * size), {"q_weight": rand(size), "k_weight": rand(size)}
    qkv.view(tokens, -1, size)[1, heads + kv_heads] = 0
    qkv.view(tokens, -1, size)[2, heads, 7] = float("nan")
    slots, positions = torch.tensor([3, 17, 20, -1, 30], device=device), torch.arange(tokens, device=device) * 37
    outs = []
    for run in (reference, qk_norm_rope_store):
        shape = (2, kv_heads, BLOCK_SIZE, size)
        caches = [torch.zeros(shape, dtype=KV_DTYPES[stored], device=device).transpose(1, 2) for _ in range(2)]
        scales = [torch.full(shape[:-1], -1.0, device=device).transpose(1, 2) for _ in range(2)]
        inv_freq = torch.rand(12, generator=torch.Generator().manual_seed(3)).to(device)
        q = run(qkv, positions, inv_freq, *caches, slots, eps=EPS, **weights, scales=tuple(scales), **kind)
        outs.append((q, caches, scales))
    (q, caches, scales), (got_q, got_caches, got_scales) = outs
    assert_close(got_q, q, 4e-6 if q.dtype == torch.float32 else torch.finfo(q.dtype).eps)
    for which in range(2):
        torch.testing.assert_close(got_scales[which], scales[which], rtol=1e-2, atol=0, equal_nan=True)
        assert (scales[which] == -1).sum() == (2 * BLOCK_SIZE - 4) * kv_heads
        finite = scales[which].isfinite().unsqueeze(-1)
        got, want = (torch.where(finite, each[which].float(), 0) for each in (got_caches, caches))
        assert want.abs().max() == LARGEST[stored]
        step = {"int8": 1.0, "fp8": 32.0 if device.type == "cuda" else 64.0}[stored]  # the interpreter rounds otherwise
        assert ((got - want).abs() <= step).all()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 1000])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "size"), [(16, 8, 128), (32, 8, 64), (14, 2, 80), (6, 3, 96), (8, 1, 256)]
)
def test_agrees_large(rand, device, assert_close, tokens, heads, kv_heads, size) -> None:
    run_both(rand, device, assert_close, tokens=tokens, heads=heads, kv_heads=kv_heads, size=size, norm=True)


@pytest.mark.parametrize("position", [0, 1, 4095, 131071])
def test_agrees_with_the_layer(rand, device, dtype, assert_close, position) -> None:
    """Angles up to 131071 radians: the range reduction must hold."""
    heads, kv_heads, size = 2, 1, 64
    rope = RotaryEmbedding(RopeConfig(theta=1e4), size, device)
    qkv, positions = rand(1, (heads + 2 * kv_heads) * size), torch.tensor([position], device=device)
    k, v = (make_cache(kv_heads, size, qkv) for _ in range(2))
    q = qk_norm_rope_store(qkv, positions, rope.inv_freq, k, v, torch.tensor([3], device=device))
    expected = apply_rope(qkv.view(1, -1, size), *rope(positions).tables)
    bound = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert_close(q, expected[:, :heads], bound)
    assert_close(k[0, 3], expected[0, heads : heads + 1], bound)


def test_no_tokens(rand, device) -> None:
    qkv, empty = rand(0, 4 * 8), torch.empty(0, dtype=torch.int64, device=device)
    k, v = (make_cache(1, 8, qkv) for _ in range(2))
    assert qk_norm_rope_store(qkv, empty, torch.ones(4, device=device), k, v, empty).shape == (0, 2, 8)
    assert k.isnan().all()
