"""Every backend on a GPU, against the naive float64 reference; captured, replayed, and without waiting."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from paged_case import Case, history, run
from torch import Tensor

from nanoengine.api import AttentionBackend, AttentionNeed, GraphSupport, StepInputs
from nanoengine.plugins.attention_backends.flash_attn import FlashAttn
from nanoengine.plugins.attention_backends.torch_paged import TorchPaged
from nanoengine.plugins.attention_backends.triton_paged import TritonPaged

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
DTYPES = list(TOLERANCE)


@pytest.fixture(params=[TorchPaged, TritonPaged, FlashAttn], ids=lambda cls: cls.__name__)
def backend_cls(request: pytest.FixtureRequest) -> type[AttentionBackend]:
    if request.param is FlashAttn:
        pytest.importorskip("flash_attn")
    return request.param


def gpu_case(cls: type[AttentionBackend], rows: list[tuple[int, int]], **more: object) -> Case:
    """With heads of 64 or 128, which any build of flash-attn has, and a block size that `cls` takes."""
    settings: dict[str, object] = {"head_size": 64, "heads": 8, "kv_heads": 4, "dtype": torch.bfloat16}
    settings |= {"block_size": max(16, cls.capabilities.block_multiple), "device": "cuda"} | more
    return Case(rows=rows, **settings)  # type: ignore[arg-type]


def error(out: Tensor, case: Case) -> float:
    want = case.reference()
    assert out.dtype == case.dtype
    assert out.isfinite().all()
    return float((out[: len(want)].double().cpu() - want).abs().max())


@pytest.mark.parametrize("seed", range(12))
def test_random_batches(backend_cls: type[AttentionBackend], seed: int) -> None:
    rng = random.Random(seed)
    queries = min(rng.choice([1, 5, 16]), backend_cls.capabilities.decode_queries)
    decode = [(min(rng.randint(1, queries), n), n) for n in (rng.randint(1, 700) for _ in range(rng.randint(0, 7)))]
    counts = (rng.choice([1, 2, 17, rng.randint(30, 300)]) for _ in range(rng.randint(0, 4)))
    prefill = [(count, count + rng.choice([0, rng.randint(0, 400)])) for count in counts]
    taken = backend_cls.capabilities.dtypes
    dtype = rng.choice([d for d in DTYPES if taken is None or str(d).removeprefix("torch.") in taken])
    more = {"soft_cap": rng.choice([None, 5.0]), "window": rng.choice([None, 50]), "dtype": dtype, "seed": seed}
    more["decode_queries"] = queries
    if backend_cls is not FlashAttn:
        more["block_size"] = rng.choice([16, 64, 256])
    case = gpu_case(
        backend_cls, decode + prefill or [(1, 1)], **more, tail=rng.choice([0, 70]), head_size=rng.choice([64, 128])
    )
    assert error(run(backend_cls, case), case) < TOLERANCE[dtype]


def padded(rows: list[tuple[int, int]], queries: int = 5, padded_rows: int = 2) -> dict[str, int]:
    """A graph of rows of up to `queries` tokens: with rows of padding, and tokens for as many in each row."""
    tokens = (len(rows) + padded_rows) * queries
    return {"decode_queries": queries, "padded_rows": padded_rows, "tail": tokens - sum(n for n, _ in rows)}


def into(static: StepInputs, new: StepInputs) -> None:
    for name in ("block_tables", "seq_lens", "query_start_loc", "slot_mapping", "positions"):
        getattr(static, name).copy_(getattr(new, name))


@contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


DECODE = ([(1, 30), (1, 500), (1, 1), (1, 64)], [(1, 700), (1, 3), (1, 65), (1, 256)])
MIXED = ([(1, 30), (1, 500), (40, 90), (24, 100)], [(1, 400), (1, 3), (10, 60), (54, 670)])
DRAFTS = ([(5, 30), (1, 500), (3, 64)], [(2, 700), (5, 9), (1, 300)])


@pytest.mark.parametrize("rows", [DECODE, MIXED, DRAFTS], ids=["decode", "mixed", "drafts"])
def test_a_captured_step_serves_other_lengths(
    backend_cls: type[AttentionBackend], rows: tuple[list[tuple[int, int]], ...]
) -> None:
    """Captured at one step's lengths, replayed at another's: the bits of the eager step, which is right."""
    wanted = GraphSupport.DECODE if rows is DECODE else GraphSupport.ALWAYS
    if backend_cls.capabilities.graphs < wanted:
        pytest.skip("not what the backend promises")
    one, other = (
        gpu_case(backend_cls, each, max_model_len=1000, seed=i, **(padded(each) if rows is DRAFTS else {}))
        for i, each in enumerate(rows)
    )
    backend = backend_cls(one.kv_spec, one.limits, torch.device("cuda"))
    backend.allocate(1, max(one.num_blocks, other.num_blocks))
    static, qkv = one.inputs(), one.step_qkv()
    history(backend, one, layer=0)
    backend.fill(static)
    eager = backend.forward(0, one.spec, *qkv)
    assert error(eager, one) < TOLERANCE[one.dtype]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = backend.forward(0, one.spec, *qkv)
    graph.replay()
    assert torch.equal(captured, eager)

    history(backend, other, layer=0)
    fresh = other.inputs()
    backend.fill(fresh)
    eager = backend.forward(0, other.spec, *other.step_qkv())
    into(static, fresh)
    for held, new in zip(qkv, other.step_qkv(), strict=True):
        held.copy_(new)
    backend.fill(static)
    captured.fill_(float("nan"))
    with no_waiting():
        graph.replay()
    assert torch.equal(captured, eager)
    assert error(captured, other) < TOLERANCE[other.dtype]


@pytest.mark.parametrize("rows", [DECODE[0], MIXED[0], DRAFTS[0]], ids=["decode", "mixed", "drafts"])
def test_nothing_waits(backend_cls: type[AttentionBackend], rows: list[tuple[int, int]]) -> None:
    several = rows is DRAFTS[0] and backend_cls.capabilities.decode_queries > 1
    case = gpu_case(backend_cls, rows, decode_queries=5 if several else 1)
    backend = backend_cls(case.kv_spec, case.limits, torch.device("cuda"))
    backend.allocate(1, case.num_blocks)
    inputs, qkv = case.inputs(), case.step_qkv()
    backend.fill(inputs)
    backend.forward(0, case.spec, *qkv)  # compiles, makes scratch memory
    with no_waiting():
        backend.fill(inputs)
        backend.forward(0, case.spec, *qkv)


def test_many_layers_after_each_other(backend_cls: type[AttentionBackend]) -> None:
    """Launches share scratch memory, and may overlap by programmatic dependence: every one must come out right."""
    case = gpu_case(backend_cls, [(1, 900), (1, 800), (1, 7)])
    backend = backend_cls(case.kv_spec, case.limits, torch.device("cuda"))
    backend.allocate(1, case.num_blocks)
    history(backend, case, layer=0)
    backend.fill(case.inputs())
    q, k, v = case.step_qkv()
    first = backend.forward(0, case.spec, q, k, v)
    outs = [backend.forward(0, case.spec, q, k, v) for _ in range(200)]
    assert error(first, case) < TOLERANCE[case.dtype]
    assert all(torch.equal(out, first) for out in outs)


def test_all_serve_a_usual_model(backend_cls: type[AttentionBackend]) -> None:
    need = AttentionNeed(device="cuda", dtype="bfloat16", head_sizes=frozenset({128}), block_size=256)
    assert backend_cls.unsupported(need) == []
