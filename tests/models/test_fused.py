"""Every family through the fused kernels, in Triton's interpreter: what the plain operations and transformers give."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_interpreter
from paged_harness import PagedModel
from parity import families
from torch import Tensor
from transformers import AutoModelForCausalLM

from nanoengine.kernels.ops import Ops, TritonOps
from nanoengine.testing.checkpoints import (
    tiny_gemma2,
    tiny_gemma3,
    tiny_llama,
    tiny_mistral,
    tiny_qwen2,
    tiny_qwen3,
)

triton_interpreter.import_kernels()
pytestmark = [
    pytest.mark.skipif(not triton_interpreter.INSTALLED, reason="triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the compiled kernels"),
]
MAKERS = [tiny_llama, tiny_qwen3, tiny_qwen2, tiny_mistral, tiny_gemma2, tiny_gemma3]
SIZES: dict[str, Any] = {"num_hidden_layers": 2, "head_dim": 16, "num_attention_heads": 4, "std": 0.1, "vocab_size": 97}
PROMPTS = {"a": list(range(30, 50)), "b": [3, 1, 4, 1, 5]}
NEXT = {"a": [[7], [8]], "b": [[9], [2]]}


class Watched(TritonOps):
    """Counts the calls of each fused operation."""

    def __init__(self, **options: bool) -> None:
        super().__init__(**options)
        self.calls: dict[str, int] = {}

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if callable(found) and hasattr(Ops, name) and not name.startswith("_"):
            self.calls[name] = self.calls.get(name, 0) + 1
        return found


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    with triton_interpreter.interpreted():
        yield


def log_probs(model: PagedModel) -> dict[str, Tensor]:
    """A prefill of both sequences, then two steps of one token each; per sequence [tokens, V]."""
    steps = [model.step(PROMPTS), *(model.step({name: NEXT[name][i] for name in NEXT}) for i in range(2))]
    return {name: torch.cat([step[name] for step in steps]).log_softmax(-1) for name in PROMPTS}


def fused(path: Path, **options: bool) -> tuple[dict[str, Tensor], dict[str, int]]:
    from nanoengine.plugins.attention_backends.triton_paged import TritonPaged

    ops = Watched(**options)

    class Counted(TritonPaged):
        def attend_qkv(self, *args: Any) -> Tensor | None:
            out = super().attend_qkv(*args)
            ops.calls["attend_qkv"] = ops.calls.get("attend_qkv", 0) + (out is not None)
            return out

    return log_probs(PagedModel(path, 16, 9, backend_cls=Counted, ops=ops)), ops.calls


@pytest.mark.parametrize("make", MAKERS)
def test_fused_kernels_agree(make: Any, tmp_path: Path) -> None:
    path = make(tmp_path, **SIZES)
    got, calls = fused(path)
    assert {"norm_linear", "qk_norm_rope_store"} <= calls.keys()
    assert calls["attend_qkv"] == 2 * SIZES["num_hidden_layers"]  # the two decode steps, and not the prefill
    assert ("linear_add" in calls) == (make not in (tiny_gemma2, tiny_gemma3))  # a norm stands before the sum
    assert ("soft_cap" in calls) == (make is tiny_gemma2)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    for name, prompt in PROMPTS.items():
        ids = prompt + [token for step in NEXT[name] for token in step]
        with torch.inference_mode():
            want = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
        torch.testing.assert_close(got[name], want, atol=5e-4, rtol=0)


def test_attention_without_norms_and_rotation(tmp_path: Path) -> None:
    """Switched off, no backend is asked; the result is the same."""
    path = tiny_qwen3(tmp_path, **SIZES)
    (want, asked), (got, calls) = fused(path), fused(path, attends_qkv=False)
    assert asked["attend_qkv"] > 0
    assert "attend_qkv" not in calls
    for name in PROMPTS:
        torch.testing.assert_close(got[name], want[name], atol=1e-4, rtol=0)


def scaled(path: Path, monkeypatch: pytest.MonkeyPatch, **options: bool) -> tuple[dict[str, Tensor], list[bool]]:
    """With the kernels of many rows for any number of rows; and of each of their products, whether a norm that took no
    launch was in front."""
    from nanoengine.kernels import matmul_launch
    from nanoengine.kernels.matmul import MatmulTile, Scaled

    seen: list[bool] = []
    call = matmul_launch.Products.__call__

    def watched(self: Any, x: Tensor | Scaled, *args: Any, **around: Any) -> Any:
        seen.append(isinstance(x, Scaled))
        return call(self, x, *args, **around)

    tile = MatmulTile(16, 32, 32, warps=4, stages=2)
    monkeypatch.setattr(matmul_launch, "matmul_tile", lambda rows, outputs, k, **_: tile if outputs <= 256 else None)
    monkeypatch.setattr(matmul_launch.Products, "__call__", watched)
    got, _ = fused(path, attends_qkv=False, **options)
    return got, seen


def test_norms_between_products_take_no_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the first and the last of a model are part of the products around them."""
    path = tiny_qwen3(tmp_path, **SIZES)
    want, _ = fused(path, products=False)
    got, seen = scaled(path, monkeypatch)
    assert sum(seen) == 3 * (2 * SIZES["num_hidden_layers"] - 1)  # in each of three steps
    for name in PROMPTS:
        torch.testing.assert_close(got[name], want[name], atol=1e-4, rtol=0)


def in_parts(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Tensor], list[int]]:
    """With products in two parts of K, for any sizes; and how many parts each norm added up."""
    from nanoengine.kernels import matmul_launch, rms_norm_triton

    seen: list[int] = []
    add_up = rms_norm_triton.sum_rms_norm
    monkeypatch.setattr(matmul_launch.Products, "takes", lambda *_, **__: False)
    monkeypatch.setattr(matmul_launch.Products, "has_parts", lambda *_: True)
    monkeypatch.setattr(matmul_launch.Products, "gates", lambda *_: False)
    monkeypatch.setattr(Watched, "_few", lambda *_: False)
    monkeypatch.setattr(
        rms_norm_triton, "sum_rms_norm", lambda parts, *rest: (seen.append(len(parts)), add_up(parts, *rest))[1]
    )
    return fused(path, attends_qkv=False)[0], seen


def test_norms_add_up_parts_of_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the last of a model, which is not named, and the first."""
    path = tiny_qwen3(tmp_path, **SIZES)
    want, _ = fused(path, products=False)
    got, seen = in_parts(path, monkeypatch)
    assert seen == [2] * 3 * (2 * SIZES["num_hidden_layers"] - 1)  # in each of three steps
    for name in PROMPTS:
        torch.testing.assert_close(got[name], want[name], atol=1e-4, rtol=0)


def test_what_was_normalised_for_another_norm_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoengine.layers.decoder import DecoderLayer

    path = tiny_qwen3(tmp_path, **SIZES)
    want, _ = fused(path, products=False)

    def wrong(layer: DecoderLayer, _: Any) -> None:
        layer.mlp.name_next_norm(layer.post_attention_layernorm)

    monkeypatch.setattr(DecoderLayer, "name_next_norms", wrong)
    got, seen = in_parts(path, monkeypatch)
    assert len(seen) == 3 * SIZES["num_hidden_layers"]
    for name in PROMPTS:
        torch.testing.assert_close(got[name], want[name], atol=1e-4, rtol=0)


def test_a_norm_that_was_not_named_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of the next norm is a hint: with a wrong one the result is the same, and nothing was prepared for it."""
    from nanoengine.layers.decoder import DecoderLayer

    path = tiny_qwen3(tmp_path, **SIZES)
    want, _ = fused(path, products=False)

    def wrong(layer: DecoderLayer, _: Any) -> None:
        layer.mlp.name_next_norm(layer.post_attention_layernorm)

    monkeypatch.setattr(DecoderLayer, "name_next_norms", wrong)
    got, seen = scaled(path, monkeypatch)
    assert seen
    assert not any(seen)
    for name in PROMPTS:
        torch.testing.assert_close(got[name], want[name], atol=1e-4, rtol=0)


FAMILIES = {
    "olmo2": {"norm_linear", "linear_add"},  # norms after the products, none before
    "granite": {"linear_add"},  # a factor before the sum
    "phi3, partly rotated": set[str](),
    "cohere": {"norm_linear", "linear_add"},  # no RMS norm, and two results in one sum
    "cohere, norms of heads": {"norm_linear", "linear_add"},
    "starcoder2": {"norm_linear"},
    "gpt2": {"norm_linear"},  # nothing is rotated
    "glm4": {"linear_add"},
    "gpt_neox": {"norm_linear", "linear_add"},
    "llama, yarn with its numbers": set[str](),
    "qwen3-moe, one layer dense": set[str](),
    "qwen2-moe": set[str](),
    "mixtral": set[str](),
    "olmoe": set[str](),
    "smollm3": set[str](),  # one of the two layers rotates
    "deepseek-v2, as V2.5": {"qk_norm_rope_store"},  # keys of heads are computed from a vector, and a part is rotated
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_open_decoder_through_the_fused_kernels(family: str, tmp_path: Path) -> None:
    """Rotations of each kind in the kernel that stores; what a family cannot fuse runs as its plain operations."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97}
    if family.startswith("deepseek"):
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    path = families.write(tmp_path, family, **sizes, num_hidden_layers=2)
    got, calls = fused(path)
    unfused = FAMILIES[family]
    assert {"norm_linear", "linear_add", "qk_norm_rope_store"} - calls.keys() == unfused
    assert ({"norm_router", "route", "experts"} <= calls.keys()) == (
        family.startswith(("qwen", "mixtral", "olmoe", "deep"))
    )
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    for name, prompt in PROMPTS.items():
        ids = prompt + [token for step in NEXT[name] for token in step]
        with torch.inference_mode():
            want = reference(torch.tensor([ids])).logits[0].log_softmax(-1)
        torch.testing.assert_close(got[name], want, atol=5e-4, rtol=0)


def test_a_gate_of_another_kind_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutant: the fused products know no activation but SiLU."""
    path = tiny_gemma3(tmp_path, **SIZES)
    want = log_probs(PagedModel(path))
    original = TritonOps.norm_linear

    def norm_linear(self: TritonOps, *args: Any, gate: str | None = None) -> Any:
        return original(self, *args, gate="silu" if gate else None)

    monkeypatch.setattr(TritonOps, "norm_linear", norm_linear)
    got, _ = fused(path)
    assert (got["a"] - want["a"]).abs().max() > 0.05
