"""bf16 and fp16 on a GPU by forced decoding: as near to a float32 reference as transformers in the same dtype is."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import test_bf16 as on_cpu
from parity import tiny
from transformers import PreTrainedModel

from .support import ON_GPU, assert_graphs, need, write_wide

pytestmark = pytest.mark.gpu
Pair = tuple[Path, PreTrainedModel]
COUNT = 64  # output tokens
LEAST = {"bfloat16": 1e-3, "float16": 1e-4}  # so much error a dtype makes at least
OPTIONS: dict[str, Any] = {**ON_GPU, "max_model_len": 512, "max_num_batched_tokens": 160, "max_num_seqs": 4}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """kind -> folder, and transformers' model of it in float32 on the GPU."""

    @cache
    def make(kind: str) -> Pair:
        folder = write_wide(kind, tmp_path_factory.mktemp("wide"))
        return folder, tiny.reference(folder).to("cuda")

    return make


def measure(pair: Pair, mode: str, dtype: str) -> on_cpu.Measured:
    """Prompts of up to 300 tokens: more than one block of 256, the size that flash-attn needs."""
    size = 256 if mode.startswith("flash_attn") else 16
    options = {**OPTIONS, **need(mode), "block_size": size, "dtype": dtype}
    return on_cpu.measure(*pair, COUNT, longest=300, **options)


@pytest.mark.parametrize("mode", ["torch", "triton eager", "triton", "flash_attn eager", "flash_attn"])
@pytest.mark.parametrize("dtype", LEAST)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_error_is_that_of_the_format(pair: Callable[[str], Pair], kind: str, dtype: str, mode: str) -> None:
    found = measure(pair(kind), mode, dtype)
    print(f"\n{kind} {dtype} {mode}: {found.ours:.6f} against {found.theirs:.6f}; {found.decided} decided")
    assert found.theirs > LEAST[dtype]
    assert found.ours <= 1.25 * found.theirs
    assert found.decided > 300
    assert found.flipped == 0
    assert_graphs(found.stats, mode)
    assert (found.stats.mixed_graph_steps > 0) == (mode == "triton"), found.stats


@pytest.mark.parametrize("mode", ["triton eager", "triton"])
def test_coarse_queries_are_caught(pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """Mutant: queries keep 5 of their 8 bits on the way into attention."""
    from nanoengine.plugins.attention_backends.triton_paged import TritonPaged

    attend, attend_qkv = TritonPaged.attend, TritonPaged.attend_qkv

    def coarse(x: torch.Tensor) -> torch.Tensor:
        mantissa, exponent = torch.frexp(x.float())
        return torch.ldexp((mantissa * 32).round() / 32, exponent).to(x.dtype)

    def of_qkv(self: TritonPaged, layer: int, spec: Any, qkv: torch.Tensor, *turn: Any) -> torch.Tensor | None:
        return attend_qkv(self, layer, spec, coarse(qkv), *turn)

    monkeypatch.setattr(TritonPaged, "attend", lambda self, layer, spec, q: attend(self, layer, spec, coarse(q)))
    monkeypatch.setattr(TritonPaged, "attend_qkv", of_qkv)
    found = measure(pair("llama"), mode, "bfloat16")
    assert found.ours > 1.25 * found.theirs
