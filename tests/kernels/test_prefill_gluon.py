"""Attention of prompts by the kernel for Hopper GPUs, against the plain-torch reference, on caches whose unused slots
hold NaN. Gluon has no interpreter; `test_compiles.py` compiles it everywhere."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from test_paged_attention import Batch, Shape, agree

from nanoengine.kernels import gluon
from nanoengine.kernels import paged_attention_prefill_triton as by_triton

ON_HOPPER = torch.cuda.is_available() and gluon.runs_gluon(
    torch.device("cuda", torch.cuda.current_device()), "prompts are slower", "paged_attention_prefill_gluon"
)
in_gluon = pytest.mark.skipif(not ON_HOPPER, reason="Gluon has no interpreter, and the kernel is for Hopper GPUs")
SIXTEEN_BITS = [torch.bfloat16, torch.float16]
CONFIGS = [(2, 128, 2, 1), (2, 64, 4, 1), (1, 64, 2, 1), (1, 64, 2, 2)]
ROWS = {
    "one": [(1, 1)],
    "whole": [(128, 128), (64, 64), (256, 256)],
    "ragged": [(1, 700), (130, 130), (17, 900), (513, 1100), (2, 2), (64, 64), (63, 127), (65, 129)],
    "chunks": [(100, 1000), (31, 31), (33, 4097)],
    "long": [(3000, 3000)],
}


@dataclass
class Launches:
    """Runs of one batch that follow each other, as in an engine: the counter is made once."""

    batch: Batch
    config: tuple[int, int, int, int] | None = None
    fewer: int = 0  # rows in front that the launch leaves alone
    extra: int = 0  # tokens behind the last row

    def __post_init__(self) -> None:
        self.counter = torch.zeros(1, dtype=torch.int32, device=self.batch.q.device)

    def run(self) -> Tensor:
        from nanoengine.kernels import paged_attention_prefill_gluon as by_gluon

        batch, fewer = self.batch, self.fewer
        q = torch.cat([batch.q, torch.full_like(batch.q[:1], float("nan")).expand(self.extra, -1, -1)])
        out = torch.full_like(q, 7.0)
        read = (q, batch.k_cache, batch.v_cache, out, batch.tables[fewer:], batch.lens[fewer:], batch.starts[fewer:])
        if self.config is None:
            by_triton.attend_prefill(*read, **batch.shape.arguments, counter=self.counter)  # type: ignore[arg-type]
        else:
            scale, config = batch.shape.head_size**-0.5, by_gluon.WarpsConfig(*self.config)
            by_gluon.attend_prefill(*read, scale=scale, counter=self.counter, config=config)
        assert not self.counter.any()  # ready for the next launch
        return out


@in_gluon
@pytest.mark.gpu
@pytest.mark.half
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("block_size", [16, 64, 256])
@pytest.mark.parametrize("rows", ROWS)
def test_agrees(rows: str, block_size: int, dtype: torch.dtype, config: Any, device: torch.device) -> None:
    batch = Batch(Shape(16, 8, 128, block_size), ROWS[rows], dtype, device)
    launches = Launches(batch, config)
    for _ in range(2):
        agree(launches.run(), batch.want())


@in_gluon
@pytest.mark.gpu
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[3]], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (2, 1), (32, 8), (32, 4), (16, 1), (64, 1)])
def test_groups_of_heads(heads: int, kv_heads: int, config: Any, device: torch.device) -> None:
    rng = random.Random(heads)
    rows = [(q, q + rng.randint(0, 90)) for q in (rng.randint(1, 200) for _ in range(40))]
    batch = Batch(Shape(heads, kv_heads, 128, 16), rows, torch.bfloat16, device)
    agree(Launches(batch, config).run(), batch.want())


@in_gluon
@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_earlier_tokens_are_left_alone_and_later_ones_are_zeros(config: Any, device: torch.device) -> None:
    batch = Batch(
        Shape(16, 8, 128),
        [*[(1, 90)] * 100, (1, 4), (150, 200), (0, 0), (3, 3), *[(0, 0)] * 20],
        torch.bfloat16,
        device,
    )
    out, want = Launches(batch, config, fewer=101, extra=200).run(), batch.want()
    assert (out[:101] == 7).all()
    agree(out[101:254], want[101:])
    assert (out[254:] == 0).all()


@in_gluon
@pytest.mark.gpu
def test_programs_take_more_tiles_than_there_are_multiprocessors(device: torch.device) -> None:
    batch = Batch(Shape(16, 8, 128), [(1024, 1024)] * 5 + [(77, 2100)] * 9, torch.bfloat16, device)
    for config in CONFIGS:
        agree(Launches(batch, config).run(), batch.want())


@in_gluon
@pytest.mark.gpu
def test_no_tokens(device: torch.device) -> None:
    batch = Batch(Shape(16, 8, 128), [(5, 9), (0, 0), (0, 0)], torch.bfloat16, device)
    out = Launches(batch, CONFIGS[3], fewer=1, extra=40).run()
    assert (out[:5] == 7).all()
    assert (out[5:] == 0).all()


@in_gluon
@pytest.mark.gpu
def test_a_slice_of_a_fused_projection_and_the_choice_by_size(device: torch.device) -> None:
    batch = Batch(Shape(16, 8, 128), [(40, 300), (1, 9)], torch.bfloat16, device)
    fused = torch.cat([batch.q, torch.full_like(batch.q, float("nan"))], dim=1)
    batch.q = fused[:, :16]
    want = batch.want()
    agree(Launches(batch).run(), want)
    agree(Launches(batch, CONFIGS[0]).run(), want)


def asked_for(monkeypatch: pytest.MonkeyPatch, **given: Any) -> list[bool]:
    """Runs prefill; whether Gluon was asked for."""
    asked = list[bool]()
    monkeypatch.setattr(by_triton, "runs_gluon", lambda *_: asked.append(True))
    rows, device = [(5, 30), (3, 3)], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = Batch(Shape(heads=2, kv_heads=1), rows, torch.float32, device)
    out, counter = torch.empty_like(batch.q), torch.zeros(1, dtype=torch.int32, device=device)
    read = (batch.q, batch.k_cache, batch.v_cache, out, batch.tables, batch.lens, batch.starts)
    by_triton.attend_prefill(*read, **{**batch.shape.arguments, "counter": counter, **given})
    return asked


def test_what_the_kernel_for_hopper_lacks_is_left_to_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked_for(monkeypatch) == [True]
    for lacking in ({"window": 5}, {"soft_cap": 2.0}, {"causal": False}, {"scale": -1.0}, {"counter": None}):
        assert asked_for(monkeypatch, **lacking) == []


def test_few_tokens_beside_decode_leave_room_for_its_programs() -> None:
    from nanoengine.kernels.paged_attention_prefill_gluon import warps_config

    few, many = ([warps_config(n, 2, 8, 132, decode_behind=behind) for behind in (False, True)] for n in (600, 8192))
    assert few[1].programs < few[0].programs
    assert many[0] == many[1]
    assert few[0].consumers < many[0].consumers


def test_what_it_takes() -> None:
    from nanoengine.kernels import paged_attention_prefill_gluon as by_gluon

    def takes(heads: int = 16, block: int = 16, width: int = 128, dtype: torch.dtype = torch.bfloat16) -> bool:
        q, cache = torch.empty(5, heads, width, dtype=dtype), torch.empty(9, 8, block, width, dtype=dtype)
        return by_gluon.takes(q, cache)

    assert all(takes(heads, block) for heads, block in itertools.product((8, 32, 512), (16, 256)))
    assert takes(dtype=torch.float16)
    for unlike in ({"heads": 24}, {"block": 8}, {"block": 48}, {"width": 64}, {"dtype": torch.float32}):
        assert not takes(**unlike)  # type: ignore[arg-type]
    assert not by_gluon.takes(torch.empty(5, 8, 128, dtype=torch.bfloat16), torch.empty(9, 8, 16, 128).to(torch.int8))
