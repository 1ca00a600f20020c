"""What the flash_attn backend says of itself; its results are tested on a GPU, with the others'."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from nanoengine.api import AttentionNeed
from nanoengine.plugins.attention_backends import register_attention_backends
from nanoengine.plugins.attention_backends.flash_attn import FlashAttn

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
