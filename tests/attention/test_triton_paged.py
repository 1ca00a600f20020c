"""The triton backend through the engine's seam, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import triton_interpreter
from paged_case import Case, history, run
from torch import Tensor

from nanoengine.api import AttentionNeed, GraphSupport, KVSpec
from nanoengine.plugins.attention_backends.triton_paged import TritonPaged

triton_interpreter.import_kernels()
pytestmark = pytest.mark.skipif(not triton_interpreter.INSTALLED, reason="triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 5e-6


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    with triton_interpreter.interpreted():
        yield


def case(rows: list[tuple[int, int]], **more: object) -> Case:
    return Case(rows=rows, device=DEVICE, block_size=16, **more)  # type: ignore[arg-type]


def error(tried: Case, backend: type[TritonPaged] = TritonPaged) -> float:
    out, want = run(backend, tried), tried.reference()
    assert out.isfinite().all()  # padding included
    return float((out[: len(want)].double().cpu() - want).abs().max())


@pytest.mark.parametrize(
    "tried",
    [
        case([(1, 30), (1, 3)], padded_rows=2),
        case([(1, 30), (1, 17), (9, 9), (20, 45)], tail=30),
        case([(1, 40), (21, 50)], window=10, soft_cap=2.0, heads=3, kv_heads=1, tail=20),
        case([(1, 20)], tail=25),
    ],
    ids=["decode", "mixed", "window-cap", "decode-and-padding"],
)
def test_agrees(tried: Case) -> None:
    assert error(tried) < TOLERANCE


class LooksOneBack(TritonPaged):
    def attend(self, layer: int, spec: object, q: Tensor) -> Tensor:
        self._inputs = replace(self._inputs, seq_lens=self._inputs.seq_lens - 1)  # type: ignore[type-var, union-attr]
        return super().attend(layer, spec, q)  # type: ignore[arg-type]


class StoresLate(TritonPaged):
    def forward(self, layer: int, spec: object, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = self.attend(layer, spec, q)  # type: ignore[arg-type]
        self.store(layer, k, v)
        return out


@pytest.mark.parametrize("mutant", [LooksOneBack, StoresLate])
def test_mutants_are_caught(mutant: type[TritonPaged]) -> None:
    try:
        wrong = error(case([(1, 20), (5, 9)], tail=20), mutant)
    except AssertionError:  # what is not stored is NaN
        return
    assert wrong > 1e-2


def test_layers_are_apart() -> None:
    tried = case([(1, 9), (4, 11)], tail=9)
    backend = TritonPaged(tried.kv_spec, tried.limits, torch.device(DEVICE))
    backend.allocate(2, tried.num_blocks)
    history(backend, tried, layer=1)
    backend.fill(tried.inputs())
    out, want = backend.forward(1, tried.spec, *tried.step_qkv())[:5].double().cpu(), tried.reference()
    assert (out - want).abs().max() < TOLERANCE
    other = backend.forward(0, tried.spec, *tried.step_qkv())[:5].double().cpu()
    assert (other - want).abs().max() > 1e-2


def test_what_it_says_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    need = AttentionNeed(device="cpu", dtype="float16", head_sizes=frozenset({64, 96}), block_size=16)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert TritonPaged.unsupported(need) == []
    assert "head size 264 is larger than 256" in TritonPaged.unsupported(replace(need, head_sizes=frozenset({264, 64})))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert "TRITON_INTERPRET=1" in TritonPaged.unsupported(need)[0]
    assert TritonPaged.capabilities.graphs is GraphSupport.ALWAYS
    monkeypatch.setitem(sys.modules, "nanoengine.kernels.paged_attention_triton", None)
    assert "cannot be imported" in TritonPaged.unsupported(replace(need, device="cuda"))[0]


def test_memory_is_as_promised_and_given_back() -> None:
    spec = KVSpec(num_kv_heads=3, head_size=64, dtype="bfloat16")
    backend = TritonPaged(spec, case([(1, 1)]).limits, torch.device(DEVICE))
    backend.allocate(5, 7)
    assert backend._kv.nbytes == 5 * 7 * TritonPaged.kv_block_bytes(spec, 16)
    backend.release()
    assert backend._kv.nbytes == 0
