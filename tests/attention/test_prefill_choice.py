"""Which kernel reads prompts: `attention_prefill_gluon` of engine.kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton_interpreter
from paged_case import Case
from test_kv_dtypes import TOLERANCE, error, needs_triton

from nanoengine.kernels import paged_attention_prefill_triton as by_triton
from nanoengine.kernels.choice import KERNELS, KernelChoice
from nanoengine.plugins.attention_backends.triton_paged import TritonPaged

triton_interpreter.import_kernels()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    with triton_interpreter.interpreted():
        yield


@needs_triton
@pytest.mark.parametrize("asked", [{}, {"attention_prefill_gluon": True}, {"attention_prefill_gluon": False}])
def test_prompts_on_hopper_are_read_by_the_kernel_that_is_on(
    asked: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[bool]()
    monkeypatch.setattr(by_triton, "runs_gluon", lambda *_: seen.append(True))
    case = Case(rows=[(1, 30), (20, 20)], block_size=16, device=DEVICE)
    monkeypatch.setattr(Case, "kv_spec", replace(case.kv_spec, kernels=KernelChoice.of(asked)))
    assert error(case, TritonPaged) < TOLERANCE[case.dtype]
    assert bool(seen) is asked.get("attention_prefill_gluon", KERNELS["attention_prefill_gluon"])


@pytest.mark.skipif(DEVICE == "cpu" or torch.cuda.get_device_capability() != (9, 0), reason="for Hopper GPUs")
@pytest.mark.gpu
@pytest.mark.parametrize("decodes", [0, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prompts_beside_decode_rows(decodes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoengine.kernels import paged_attention_prefill_gluon as by_gluon

    attend, launched = by_gluon.attend_prefill, list[int]()

    def counted(*args: Any, **more: Any) -> None:
        launched.append(len(args[0]))
        attend(*args, **more)

    monkeypatch.setattr(by_gluon, "attend_prefill", counted)
    rows = [*((1, 200 + i) for i in range(decodes)), (300, 300), (90, 500), (700, 700)]
    case = Case(
        rows=rows, heads=16, kv_heads=8, head_size=128, block_size=16, dtype=dtype, device=DEVICE, max_model_len=4096,
        tail=3,
    )  # fmt: skip
    on = replace(case.kv_spec, kernels=KernelChoice.of({"attention_prefill_gluon": True}))
    monkeypatch.setattr(Case, "kv_spec", on)
    assert error(case, TritonPaged) < TOLERANCE[dtype]
    assert case.inputs().positions.numel() in launched
