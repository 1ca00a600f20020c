"""What the flash_attn backend says of itself, and its calls of the package, which is tested itself on a GPU."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import flash_attn_stub
import pytest

from nanoengine.api import AttentionNeed, StepInputs
from nanoengine.plugins.attention_backends import register_attention_backends
from nanoengine.plugins.attention_backends.flash_attn import FlashAttn
from nanoengine.testing.conformance import ConformanceError, check_attention_backend

NEED = AttentionNeed(device="cuda", dtype="bfloat16", head_sizes=frozenset({128}), block_size=256)


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert "cannot be imported" in FlashAttn.unsupported(NEED)[-1]
    old = ModuleType("flash_attn")
    old.__version__ = "1.0"  # type: ignore[attr-defined]
    old.flash_attn_varlen_func = print  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", old)
    assert "flash_attn 1.0 has no flash_attn_with_kvcache" in FlashAttn.unsupported(NEED)[-1]
    old.flash_attn_with_kvcache = print  # type: ignore[attr-defined]
    assert not any("has no flash" in reason for reason in FlashAttn.unsupported(NEED))


def test_says_what_it_cannot() -> None:
    odd = AttentionNeed(device="cpu", dtype="float32", head_sizes=frozenset({12}), block_size=16)
    reasons = "; ".join(FlashAttn.unsupported(odd))
    for part in ("not on cpu", "not float32", "head sizes [12]", "block_size 16 is not a multiple of 256"):
        assert part in reasons


def test_order_of_the_backends() -> None:
    order = sorted(register_attention_backends(), key=lambda spec: -spec.preference)
    assert [spec.name for spec in order] == ["triton", "flash_attn", "torch"]
    assert all(spec.install for spec in order if spec.requires)


class OnTheHost(FlashAttn):
    capabilities = replace(
        FlashAttn.capabilities, devices=frozenset({"cpu"}), dtypes=frozenset({"float32"}), block_multiple=1
    )


class HostLengths(OnTheHost):
    """Takes the host's lengths of rows with several queries for exact."""

    def fill(self, inputs: StepInputs) -> None:
        super().fill(inputs)
        first = inputs.num_decode_rows
        for row, length in enumerate(inputs.seq_lens_host[first:]):
            self._key_starts[row + 1] = self._key_starts[row] + length


def test_its_calls_compute_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """In every step of the kit: rows with drafts are prefill rows to it, and the host has upper bounds of their
    lengths."""
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn_stub.module())
    check_attention_backend(OnTheHost, head_sizes=[16])
    with pytest.raises(ConformanceError, match="rows with drafts, lengths overestimated on the host, layer 0: row"):
        check_attention_backend(HostLengths, head_sizes=[16])
