"""K and V in eight bits, with a scale for each head of each token: backends, blocks, and engines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_interpreter
from paged_case import Case, run
from torch import Tensor

from nanoengine import LLM, SamplingParams
from nanoengine.api import AttentionNeed, ConfigError, HeadNorms, KVSpec, Rotation
from nanoengine.api.parallel import SingleRank
from nanoengine.kernels.choice import KernelChoice
from nanoengine.kernels.kv_quant import KV_DTYPES, LARGEST, dequantise_heads, quantise_heads, stored_bytes
from nanoengine.kernels.ops import Ops
from nanoengine.kernels.rms_norm import rms_norm
from nanoengine.kernels.rope import rotate
from nanoengine.plugins.attention_backends.flash_attn import FlashAttn
from nanoengine.plugins.attention_backends.torch_paged import TorchPaged
from nanoengine.plugins.attention_backends.triton_paged import TritonPaged
from nanoengine.setup.start.build_model import Builder
from nanoengine.testing.checkpoints import tiny_llama

triton_interpreter.import_kernels()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
EACH = pytest.mark.parametrize("kv_dtype", KV_DTYPES)
needs_triton = pytest.mark.skipif(not triton_interpreter.INSTALLED, reason="triton is not installed")


@pytest.fixture(autouse=True)
def _interpreted() -> Iterator[None]:
    with triton_interpreter.interpreted():
        yield


def error(case: Case, backend: type[Any] = TorchPaged) -> float:
    out, want = run(backend, case), case.reference()
    assert out.isfinite().all()
    return float((out[: len(want)].double().cpu() - want).abs().max())


# Values


@EACH
def test_values_come_back_within_half_a_step(kv_dtype: str) -> None:
    x = torch.randn(7, 3, 20) * torch.tensor([1e-6, 1.0, 1e5]).view(3, 1)
    codes, scale = quantise_heads(x, kv_dtype)
    assert (codes.dtype, scale.dtype, scale.shape) == (KV_DTYPES[kv_dtype], torch.float32, (7, 3))
    largest = x.abs().amax(-1, keepdim=True)
    found = dequantise_heads(codes, scale, torch.float32)
    step = {"int8": largest / 127, "fp8": torch.maximum(x.abs() / 8, largest / 448 * 2**-9)}[kv_dtype]
    assert ((found - x).abs() <= step * 0.5001).all()
    assert torch.equal(codes.float().abs().amax(-1), torch.full((7, 3), LARGEST[kv_dtype]))


@EACH
def test_a_head_of_zeros_is_zeros_and_one_that_is_not_finite_stays_so(kv_dtype: str) -> None:
    x = torch.zeros(3, 8)
    x[1, 2], x[2, 3] = float("nan"), float("inf")
    found = dequantise_heads(*quantise_heads(x, kv_dtype), torch.float32)
    assert torch.equal(found[0], x[0])
    assert not found[1].isfinite().any()
    assert not found[2].isfinite().all()


# Backends


@EACH
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_torch_in_every_path(kv_dtype: str, dtype: torch.dtype) -> None:
    rows = [(1, 4), (1, 300), (1, 5), (3, 9), (7, 7), (200, 330), (1, 2)]
    case = Case(rows=rows, head_size=12, dtype=dtype, tail=3, kv_dtype=kv_dtype)
    assert error(case) < TOLERANCE[dtype]
    assert error(replaced(case, kv_dtype="auto")) < TOLERANCE[dtype]


def replaced(case: Case, **more: Any) -> Case:
    given = {name: getattr(case, name) for name in ("rows", "head_size", "dtype", "tail", "kv_dtype")}
    return Case(**{**given, **more})


class StoresAsTheReference(TritonPaged):
    """For the interpreter, which rounds to float8 otherwise than a GPU."""

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        assert self._inputs is not None
        slots, size = self._inputs.slot_mapping, self.limits.block_size
        for which, new in enumerate((k, v)):
            codes, scale = quantise_heads(new, self.spec.kv_dtype)
            stored, scales = self._kv[layer, which].view(torch.uint8), self._scales_of(layer)
            stored[slots // size, :, slots % size] = codes.view(torch.uint8)
            assert scales is not None
            scales[which][slots // size, :, slots % size] = scale


@needs_triton
@EACH
@pytest.mark.parametrize(
    "more",
    [
        {"rows": [(1, 30), (1, 3)], "padded_rows": 2},
        {"rows": [(1, 30), (1, 17), (9, 9), (20, 45)], "tail": 30},
        {"rows": [(1, 40), (21, 50)], "window": 10, "soft_cap": 2.0, "heads": 3, "kv_heads": 1, "with_sinks": True},
        {"rows": [(5, 30), (1, 3), (3, 17)], "decode_queries": 5, "padded_rows": 2, "tail": 16},
        {"rows": [(4, 40), (9, 50)], "causal": False},
        {"rows": [(1, 30), (1, 3), (1, 64)], "padded_rows": 2, "dtype": torch.float16},
        {"rows": [(1, 40), (1, 7)], "window": 10, "heads": 3, "kv_heads": 1, "with_sinks": True, "head_size": 20,
         "dtype": torch.float16},
    ],
    ids=["decode", "mixed", "window-cap-sinks", "drafts", "ahead", "halves", "halves, window-sinks"],
)  # fmt: skip
def test_triton_in_every_kernel(kv_dtype: str, more: dict[str, Any]) -> None:
    exact = DEVICE == "cuda" or kv_dtype == "int8"
    case = Case(device=DEVICE, block_size=16, kv_dtype=kv_dtype, **more)
    assert error(case, TritonPaged if exact else StoresAsTheReference) < TOLERANCE[more.get("dtype", torch.float32)]


@pytest.mark.skipif(DEVICE == "cpu" or torch.cuda.get_device_capability() != (9, 0), reason="for Hopper GPUs")
@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "block_size", "mixed"), [(2, 32, False), (4, 16, True), (10, 128, True), (32, 64, False)]
)
def test_tensor_cores_take_codes(
    kv_dtype: str, dtype: torch.dtype, heads: int, block_size: int, mixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanoengine.kernels import paged_attention_codes_gluon as by_gluon

    attend, beside = by_gluon.attend_codes, []
    monkeypatch.setattr(
        by_gluon, "attend_codes", lambda *args, **more: (beside.append(more["beside"]), attend(*args, **more))
    )
    rows, more = [(1, length) for length in (1, 63, 64, 65, 128, 193, 300, 700)], {"padded_rows": 1}
    if mixed:
        rows, more = [*rows, (20, 90)], {"tail": 3}
    case = Case(
        rows=rows, heads=heads, kv_heads=2, head_size=128, block_size=block_size, dtype=dtype, device=DEVICE,
        kv_dtype=kv_dtype, max_model_len=4096, **more,
    )  # fmt: skip
    assert error(case, TritonPaged) < TOLERANCE[dtype]
    assert beside == [mixed]


@needs_triton
@pytest.mark.parametrize("on", [True, False])
def test_codes_on_hopper_are_read_by_the_kernel_that_is_on(on: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoengine.kernels import paged_attention_decode_triton as by_triton

    asked = list[bool]()
    monkeypatch.setattr(by_triton, "runs_gluon", lambda *_: asked.append(True))
    place = Ops()
    place.kernels = KernelChoice.of({} if on else {"attention_codes": False})
    case = Case(rows=[(1, 30)], block_size=16, kv_dtype="int8", device=DEVICE)
    made = Builder(SingleRank(), case.dtype, torch.device(DEVICE), place).attention("model.attn", case.spec)
    monkeypatch.setattr(Case, "kv_spec", replace(case.kv_spec, kernels=made.kv_spec.kernels))
    assert error(case, TritonPaged) < TOLERANCE[case.dtype]
    assert asked == [True] * on


@needs_triton
@EACH
def test_triton_stores_what_the_reference_does(kv_dtype: str) -> None:
    case = Case(rows=[(5, 5)], kv_dtype=kv_dtype, device=DEVICE, head_size=20)
    ours, want = (cls(case.kv_spec, case.limits, torch.device(DEVICE)) for cls in (TritonPaged, StoresAsTheReference))
    _, k, v = case.step_qkv()
    k[1] = 0
    for backend in (ours, want):
        backend.allocate(1, case.num_blocks)
        backend.fill(case.inputs())
        backend.store(0, k, v)
    assert ours._scales is not None
    assert torch.equal(ours._scales, want._scales)
    step = 0.0 if DEVICE == "cuda" or kv_dtype == "int8" else 64.0  # of fp8's largest values
    torch.testing.assert_close(ours._kv.float(), want._kv.float(), rtol=0.0, atol=step)


class ScalesOfOtherHeads(TorchPaged):
    def _take(self, blocks: Tensor, scales: Tensor, index: Tensor, out: Tensor) -> None:
        super()._take(blocks, scales.roll(1, dims=1), index, out)


class ScalesStayBehind(TorchPaged):
    """The scale of the block's first token for all of its tokens."""

    def _take(self, blocks: Tensor, scales: Tensor, index: Tensor, out: Tensor) -> None:
        super()._take(blocks, scales[..., :1].expand_as(scales).contiguous(), index, out)


class LeavesOldScales(TorchPaged):
    def _clear_tails(self, inputs: Any) -> None:
        scales, self._scales = self._scales, self._scales.clone()
        super()._clear_tails(inputs)
        self._scales = scales


@pytest.mark.parametrize("mutant", [ScalesOfOtherHeads, ScalesStayBehind, LeavesOldScales])
def test_mutants_are_caught(mutant: type[TorchPaged]) -> None:
    case = Case(rows=[(1, 30), (1, 17), (6, 6)], kv_dtype="int8")
    assert error(case) < TOLERANCE[torch.float32]
    try:
        wrong = error(case, mutant)
    except AssertionError:  # not finite
        return
    assert wrong > 100 * TOLERANCE[torch.float32]


@EACH
def test_a_block_has_the_bytes_of_its_codes_and_scales(kv_dtype: str) -> None:
    spec = KVSpec(num_kv_heads=8, head_size=128, dtype="bfloat16", kv_dtype=kv_dtype)
    for backend in (TorchPaged, TritonPaged):
        assert backend.kv_block_bytes(spec, 16) == 2 * 16 * 8 * (128 + 4)
        assert backend.kv_block_bytes(replace(spec, kv_dtype="auto"), 16) == 2 * 16 * 8 * 256
    assert stored_bytes("auto", "float32", 64) == 256


def test_a_backend_without_it_is_refused_with_the_reason() -> None:
    need = AttentionNeed(device="cuda", dtype="bfloat16", head_sizes=frozenset({128}), kv_dtype="fp8")
    assert any("not as fp8" in reason for reason in FlashAttn.unsupported(need))
    assert not any("fp8" in reason for reason in TorchPaged.unsupported(need))


@needs_triton
@EACH
@pytest.mark.parametrize("rows", [[(1, 5), (1, 20)], [(1, 5), (7, 9)]], ids=["decode", "mixed"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_one_kernel_rotates_and_stores_codes(kv_dtype: str, rows: list[tuple[int, int]], interleaved: bool) -> None:
    """The same q, codes and scales as norm, rotation and `forward` one by one."""
    case = Case(rows=rows, kv_dtype=kv_dtype, device=DEVICE, head_size=16, block_size=16)
    ours, want = (cls(case.kv_spec, case.limits, torch.device(DEVICE)) for cls in (TritonPaged, StoresAsTheReference))
    q, k, v = case.step_qkv()
    qkv = torch.cat([q, k, v], 1).flatten(1)
    rotation = Rotation(inv_freq=torch.tensor([1.0, 0.3, 0.1, 0.03], device=DEVICE), interleaved=interleaved)
    weights = [1 + 0.1 * torch.randn(16, device=DEVICE) for _ in range(2)]
    norms = HeadNorms(q=weights[0], k=weights[1], eps=1e-6)
    for backend in (ours, want):
        backend.allocate(1, case.num_blocks)
        backend.fill(case.inputs())
    assert ours.kv_cache(0) is None
    found = ours.attend_qkv(0, case.spec, qkv, rotation, norms)
    turned = [
        _rotated(rms_norm(each, weight, 1e-6), case.inputs().positions, rotation)
        for each, weight in zip((q, k), weights, strict=True)
    ]
    expected = want.forward(0, case.spec, *turned, v)
    assert found is not None
    assert ours._scales is not None
    assert want._scales is not None
    torch.testing.assert_close(ours._scales, want._scales, rtol=1e-5, atol=0)
    step = 1.0 if kv_dtype == "int8" else 64.0  # where a value's last bit decides
    torch.testing.assert_close(ours._kv.float(), want._kv.float(), rtol=0, atol=step)
    off = 0.02 if kv_dtype == "int8" else 0.1 if DEVICE == "cuda" else 0.5  # the interpreter rounds to float8 otherwise
    torch.testing.assert_close(found, expected, rtol=0, atol=off)
    assert ours._kv.float().abs().sum() > 0


@needs_triton
@EACH
@pytest.mark.parametrize("on", [True, False])
def test_many_rows_of_qkv_go_to_slices_where_they_are_on(
    kv_dtype: str, on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And elsewhere, or without the kernel, to one that stores and one that attends."""
    from nanoengine.plugins.attention_backends import triton_paged

    asked, runs = list[str](), triton_paged.runs_gluon
    monkeypatch.setattr(triton_paged, "runs_gluon", lambda *given: asked.append(given[2]) or runs(*given))
    case = Case(rows=[(1, 40)], kv_dtype=kv_dtype, block_size=16)
    if DEVICE == "cuda":
        rows, sizes = [(1, 1 + 7 * n) for n in range(100)], {"heads": 16, "kv_heads": 8, "head_size": 128}
        case = Case(rows=rows, kv_dtype=kv_dtype, block_size=16, dtype=torch.bfloat16, device=DEVICE, **sizes)
    kernels = KernelChoice.of({"attention_code_slices": on})
    monkeypatch.setattr(Case, "kv_spec", replace(case.kv_spec, kernels=kernels))
    ours, want = (cls(case.kv_spec, case.limits, torch.device(DEVICE)) for cls in (TritonPaged, StoresAsTheReference))
    inv_freq = 100.0 ** -torch.linspace(0, 1, case.head_size // 2, device=DEVICE)
    rotation, inputs = Rotation(inv_freq=inv_freq), case.inputs()
    keys, values = torch.cat(case.keys), torch.cat(case.values)
    for backend in (ours, want):
        backend.allocate(1, case.num_blocks)
        slots = torch.tensor([slot for row in range(len(case.rows)) for slot in case.slots(row)], device=DEVICE)
        backend.fill(replace(inputs, slot_mapping=slots))
        backend.store(0, *(each.to(case.dtype).to(DEVICE) for each in (keys, values)))
        backend.fill(inputs)
    q, k, v = case.step_qkv()
    found = ours.attend_qkv(0, case.spec, torch.cat([q, k, v], 1).flatten(1), rotation, None)
    expected = want.forward(0, case.spec, *(_rotated(each, inputs.positions, rotation) for each in (q, k)), v)
    assert asked == ["paged_attention_code_slices_gluon"] * on
    assert found is not None
    off = 0.03 if kv_dtype == "int8" or DEVICE == "cuda" else 0.5  # the interpreter rounds to float8 otherwise
    torch.testing.assert_close(found, expected, rtol=0, atol=off)
    assert ours._scales is not None
    assert want._scales is not None
    torch.testing.assert_close(ours._scales, want._scales, rtol=1e-5, atol=0)
    step = 1.0 if kv_dtype == "int8" else 64.0
    torch.testing.assert_close(ours._kv.float(), want._kv.float(), rtol=0, atol=step)


def _rotated(x: Tensor, positions: Tensor, rotation: Rotation) -> Tensor:
    angles = (positions.float().unsqueeze(1) * rotation.inv_freq).unsqueeze(1)
    return rotate(x, angles.cos(), angles.sin(), rotation.interleaved)


# Engines

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16] * 3, [7, 8, 9], [5, 6, 7, 8, 9, 10, 11, 12, 20, 21]]
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)


def answers(path: Path, **options: Any) -> tuple[list[tuple[int, ...]], list[float], LLM]:
    given = {"max_model_len": 64, "num_gpu_blocks_override": 64, "block_size": 4, "attention": "torch", "device": "cpu"}
    with LLM(path, **{**given, **options}) as llm:
        outputs = [each.outputs[0] for each in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]
        again = [each.outputs[0] for each in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]
    assert [each.token_ids for each in again] == [each.token_ids for each in outputs]  # with a prefix cache, or without
    found = [
        step[token].logprob for out in outputs for token, step in zip(out.token_ids, out.logprobs or (), strict=True)
    ]
    return [each.token_ids for each in outputs], found, llm


@EACH
def test_the_same_tokens_every_way(kv_dtype: str, tmp_path: Path) -> None:
    """Chunked, preempted, without prefix cache and without overlap; on fewer bytes, and near those of plain K and V."""
    path = tiny_llama(tmp_path)
    tokens, logprobs, llm = answers(path, kv_dtype=kv_dtype)
    _, plain, other = answers(path)
    assert llm.memory_report.block_bytes < other.memory_report.block_bytes
    assert logprobs != plain
    assert logprobs[:: PARAMS.max_tokens] == pytest.approx(plain[:: PARAMS.max_tokens], abs=0.1)  # of first tokens
    ways: list[dict[str, Any]] = [
        {"max_num_batched_tokens": 7},
        {"num_gpu_blocks_override": 18, "max_num_seqs": 3},
        {"enable_prefix_caching": False, "overlap": False},
    ]
    for way in ways:
        got, found, _ = answers(path, kv_dtype=kv_dtype, **way)
        assert got == tokens
        assert found == pytest.approx(logprobs, abs=1e-4)


def test_two_ranks(tmp_path: Path) -> None:
    path = tiny_llama(tmp_path)
    tokens, logprobs, _ = answers(path, kv_dtype="int8")
    got, found, _ = answers(path, kv_dtype="int8", tensor_parallel_size=2)
    assert got == tokens
    assert found == pytest.approx(logprobs, abs=1e-3)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kv_dtype"):
        LLM(tiny_llama(tmp_path / "b"), kv_dtype="fp4", device="cpu")
