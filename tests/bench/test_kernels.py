"""What the times of single kernels are divided by, and what flash-attn is asked beside ours."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton_interpreter
from torch import Tensor

from nanoengine.kernels import paged_attention
from nanoengine.lab.bench.timing import best_device

if not triton_interpreter.INSTALLED:
    pytest.skip("triton is not installed", allow_module_level=True)
triton_interpreter.import_kernels()

from nanoengine.lab.bench.paged_batches import Batch, Heads, Lengths, batches  # noqa: E402

SMALL = [lengths.scaled(0.02) for lengths in batches()]


def made(lengths: Lengths) -> Batch:
    return Batch(lengths, 256, Heads(4, 2, 32), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("lengths", SMALL, ids=lambda lengths: lengths.name)
def test_bytes_and_flops_counted_one_by_one(lengths: Lengths) -> None:
    batch = made(lengths)
    assert batch.kv_bytes == sum(lengths.seq) * 2 * batch.k_cache[0, :, 0].nbytes  # K and V of a token
    pairs = sum(key <= n - q + i for q, n in zip(lengths.query, lengths.seq, strict=True) for i in range(q)
                for key in range(n))  # fmt: skip
    assert batch.flops == pairs * batch.heads.query * (2 + 2) * batch.heads.size  # a multiplication and an addition


def test_decode_rows_stand_as_in_an_engine() -> None:
    decode = [lengths.seq for lengths in batches() if not lengths.prefill]
    assert any(len(set(seq)) > 1 for seq in decode)
    assert all(list(seq) == sorted(seq, reverse=True) for seq in decode)


def with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, block_table: Tensor, causal: bool
) -> Tensor:
    """As flash-attn documents it: q [rows, queries, heads, size], caches [blocks, 256, KV heads, size]."""
    assert causal
    caches = (cache.transpose(1, 2) for cache in (k_cache, v_cache))
    starts = torch.arange(len(q) + 1) * q.shape[1]
    scale = q.shape[-1] ** -0.5
    return paged_attention.attend_prefill(
        q.flatten(0, 1), *caches, block_table, cache_seqlens, starts, scale=scale
    ).view(q.shape)


def varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool,
    block_table: Tensor,
) -> Tensor:
    """As flash-attn documents it, with a paged cache."""
    assert causal
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    lens = cu_seqlens_k.diff()
    assert (max_seqlen_q, max_seqlen_k) == (cu_seqlens_q.diff().max(), lens.max())
    caches = (cache.transpose(1, 2) for cache in (k, v))
    return paged_attention.attend_prefill(q, *caches, block_table, lens, cu_seqlens_q, scale=q.shape[-1] ** -0.5)


@pytest.mark.parametrize("lengths", SMALL, ids=lambda lengths: lengths.name)
def test_flash_attn_is_given_the_same_batch(lengths: Lengths) -> None:
    package: Any = SimpleNamespace(flash_attn_with_kvcache=with_kvcache, flash_attn_varlen_func=varlen)
    batch = made(lengths)
    out = batch.flash_attn(package)()
    torch.testing.assert_close(out.view(batch.reference.shape), batch.reference)


def test_a_cpu_that_is_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [best_device(asked).type for asked in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]
