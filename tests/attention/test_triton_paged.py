"""The triton backend through the engine's seam, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton_interpreter
from paged_case import Case, history, run
from torch import Tensor

from nanoengine.api import AttentionLayerSpec, AttentionNeed, GraphSupport, HeadNorms, KVSpec, Rotation
from nanoengine.kernels.choice import KernelChoice
from nanoengine.kernels.rms_norm import rms_norm
from nanoengine.layers.rope import Angles, Rope, apply_rope
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


@pytest.mark.parametrize(
    "tried",
    [
        case([(5, 30), (1, 3), (3, 17)], decode_queries=5, padded_rows=2, tail=16),
        case([(2, 30), (1, 17), (9, 9), (20, 45)], decode_queries=2, tail=30),
        case([(4, 40), (16, 50)], decode_queries=16, window=10, soft_cap=2.0, heads=3, kv_heads=1, with_sinks=True),
        case([(4, 40), (3, 50)], decode_queries=4, causal=False),
        case([(2, 20)], decode_queries=2, tail=25),
    ],
    ids=["padded", "mixed", "window-cap-sinks", "ahead", "more-padding-than-rows-have"],
)
def test_rows_of_several_queries_agree(tried: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode rows of a token and its drafts have a kernel of their own, if their layer does not look ahead."""
    calls = []
    import nanoengine.kernels.paged_attention_triton as kernels

    several = kernels.attend_several
    monkeypatch.setattr(kernels, "attend_several", lambda *args, **more: calls.append(more) or several(*args, **more))
    assert error(tried) < TOLERANCE
    assert len(calls) == int(tried.causal)


def test_steps_with_drafts_have_few_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is compiled by itself, perhaps while requests wait: those of captured steps hold the eager ones too."""
    import nanoengine.kernels.paged_attention_triton as kernels

    seen: list[Any] = []
    monkeypatch.setattr(kernels, "attend_several", lambda *args, config, **more: seen.append(config))
    tried = case([(1, 300)] * 64, decode_queries=5, head_size=128)
    backend = TritonPaged(tried.kv_spec, tried.limits, torch.device(DEVICE))
    backend.allocate(1, tried.num_blocks)
    inputs, q = tried.inputs(), torch.zeros(64, tried.heads, 128, device=DEVICE)

    def step(rows: int, queries: int) -> None:
        part = {"block_tables": inputs.block_tables[:rows], "seq_lens": inputs.seq_lens[:rows]}
        backend.fill(replace(inputs, num_decode_rows=rows, decode_query_len=queries, **part))
        backend.attend(0, tried.spec, q[:rows])

    for rows in (1, 2, 4, 8, 16, 32, 64):
        step(rows, 5)
    captured = len(seen)
    for rows in range(1, 65):
        step(rows, 2 + rows % 4)
    assert set(seen[captured:]) <= set(seen[:captured])


class Apart(TritonPaged):
    """Norms and rotation by torch, and then `forward`."""

    def attend_qkv(
        self, layer: int, spec: AttentionLayerSpec, qkv: Tensor, rotation: Rotation, norms: HeadNorms | None
    ) -> Tensor:
        heads = qkv.view(len(qkv), -1, spec.head_size)
        q, k, v = heads.split_with_sizes((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1)
        if norms is not None:
            q, k = rms_norm(q, norms.q, norms.eps), rms_norm(k, norms.k, norms.eps)
        assert self._inputs is not None
        plain = Rope(frequencies=tuple(rotation.inv_freq.tolist()))
        cos, sin = Angles(self._inputs.positions, rotation.inv_freq, plain).tables
        return self.forward(layer, spec, apply_rope(q, cos, sin), apply_rope(k, cos, sin), v)


def of_qkv(
    tried: Case, backend_cls: type[TritonPaged], norm: bool = True, extras: Any = (), **rotation: Any
) -> tuple[Tensor, Tensor]:
    """What `attend_qkv` returns for the step's qkv (nothing: an empty tensor), and the cache behind it."""
    backend = backend_cls(tried.kv_spec, tried.limits, torch.device(DEVICE))
    backend.allocate(1, tried.num_blocks)
    history(backend, tried, layer=0)
    backend.fill(tried.inputs())
    qkv = torch.cat(tried.step_qkv(), dim=1).flatten(1)
    size = tried.head_size
    weights = (1 + torch.arange(2 * size) / size).view(2, size).to(DEVICE)
    turn = Rotation(inv_freq=(100.0 ** -(torch.arange(0, size, 2) / size)).to(DEVICE), **rotation)
    norms = HeadNorms(q=weights[0], k=weights[1], eps=1e-6) if norm else None
    out = backend.attend_qkv(0, replace(tried.spec, extras=dict(extras)), qkv, turn, norms)
    return torch.empty(0) if out is None else out, backend._kv[0, :, 1:]  # the dummy block holds whatever came last


@pytest.mark.parametrize(
    ("tried", "norm"),
    [
        (case([(1, 40)], heads=2, kv_heads=1), True),
        (case([(1, 30), (1, 3), (1, 17)], padded_rows=2), False),
        (case([(1, 33), (1, 9)], window=9), False),
        (case([(1, 40), (1, 90)], with_sinks=True), True),
    ],
    ids=["held", "padded", "window", "sinks"],
)
def test_qkv_in_one_kernel(tried: Case, norm: bool) -> None:
    (got, cache), (want, expected) = of_qkv(tried, TritonPaged, norm), of_qkv(tried, Apart, norm)
    rows = len(tried.rows)
    assert len(got) == rows + tried.padded_rows
    torch.testing.assert_close(got[:rows], want[:rows], atol=2e-5, rtol=0)
    torch.testing.assert_close(cache, expected, atol=2e-5, rtol=0)


def test_qkv_that_it_leaves_to_others() -> None:
    """Prefill tokens, rows of several, rotations that are not whole halves, and features of plugins, which are in their
    `attend`; nothing is stored."""
    decode, mixed = case([(1, 20), (1, 3)]), case([(1, 20), (5, 9)])
    several = case([(2, 20), (0, 3)], decode_queries=2)  # as many tokens as rows
    for tried, rotation in ((mixed, {}), (several, {}), (decode, {"interleaved": True}), (decode, {"magnitude": 1.2}),
                            (decode, {"extras": {"tests.bias": 1}})):  # fmt: skip
        got, cache = of_qkv(tried, TritonPaged, **rotation)
        assert len(got) == 0
        untouched = of_qkv(tried, LeavesAll)[1]
        assert torch.equal(cache, untouched)


class LeavesAll(TritonPaged):
    def attend_qkv(self, *_: Any) -> None:
        return None


ROWS = [(1, 130), (1, 3), (9, 9), (20, 45)]


@pytest.mark.parametrize(
    "tried",
    [
        case(ROWS, with_sinks=True, tail=5),
        case(ROWS, with_sinks=True, window=10, soft_cap=2.0, heads=3, kv_heads=1),
        case(ROWS, causal=False, tail=5),
        case(ROWS, causal=False, window=10, with_sinks=True, head_size=20),
    ],
    ids=["sinks", "sinks-window-cap", "ahead", "ahead-window-sinks"],
)
def test_sinks_and_attention_that_looks_ahead_agree(tried: Case) -> None:
    assert error(tried) < TOLERANCE


def test_a_sink_counts_once_in_a_row_that_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, splits = case([(1, 300), (1, 3)], with_sinks=True, heads=2, kv_heads=1), []
    from nanoengine.kernels.paged_attention_triton import DecodePlanner

    config = DecodePlanner.config
    monkeypatch.setattr(DecodePlanner, "config", lambda self, rows: splits.append(made := config(self, rows)) or made)
    assert error(tried) < TOLERANCE
    assert splits[-1].splits > 1


class IgnoresSinks(TritonPaged):
    def attend(self, layer: int, spec: AttentionLayerSpec, q: Tensor) -> Tensor:
        return super().attend(layer, replace(spec, sinks=None), q)


class LooksNotAhead(TritonPaged):
    def attend(self, layer: int, spec: AttentionLayerSpec, q: Tensor) -> Tensor:
        return super().attend(layer, replace(spec, causal=True), q)


@pytest.mark.parametrize("mutant", [IgnoresSinks, LooksNotAhead])
def test_mutants_of_features_are_caught(mutant: type[TritonPaged]) -> None:
    assert error(case([(1, 20), (5, 9)], with_sinks=True, causal=False), mutant) > 1e-2


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


@pytest.mark.parametrize("on", [True, False])
def test_few_rows_of_qkv_go_to_slices_where_they_are_on(on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And elsewhere, or without the kernel, to the one that reads tile by tile."""
    from nanoengine.plugins.attention_backends import triton_paged

    asked, runs = list[str](), triton_paged.runs_gluon
    monkeypatch.setattr(triton_paged, "runs_gluon", lambda *given: asked.append(given[2]) or runs(*given))
    tried = case([(1, 40)], heads=2, kv_heads=1)
    if DEVICE == "cuda":
        rows, sizes = [(1, n) for n in (40, 300, 1, 513)], {"heads": 16, "kv_heads": 8, "head_size": 128}
        tried = case(rows, dtype=torch.bfloat16, max_model_len=4096, **sizes)
    kernels = KernelChoice.of({"attention_slices": on, "attention_slices_beside": False})
    monkeypatch.setattr(Case, "kv_spec", replace(tried.kv_spec, kernels=kernels))
    (out, cache), (want, stored) = of_qkv(tried, TritonPaged), of_qkv(tried, Apart)
    torch.testing.assert_close(out, want, rtol=0.02, atol=0.02 if DEVICE == "cuda" else 2e-5)
    torch.testing.assert_close(cache, stored, rtol=0.02, atol=0.02 if DEVICE == "cuda" else 2e-5)
    assert asked == ["paged_attention_slices_gluon"] * on
