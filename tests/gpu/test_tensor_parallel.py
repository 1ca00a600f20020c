"""Two GPUs against transformers: the float32 class in all modes, the half formats by forced decoding, and an end."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from parity import test_bf16 as forced
from parity import test_tiny_models as on_cpu
from parity import tiny
from parity.compare import compare
from transformers import PreTrainedModel

from nanoengine import LLM, SamplingParams
from nanoengine.api.errors import WorkerError
from nanoengine.kernels.matmul import tile_over_ranks
from nanoengine.testing.checkpoints import tiny_llama

from .support import ON_GPU, need, write_wide

pytestmark = pytest.mark.multi_gpu
Pair = tuple[Path, PreTrainedModel]
TWO: dict[str, Any] = {**ON_GPU, "tensor_parallel_size": 2, "worker_start_timeout": 150.0, "step_timeout": 20.0}
# name -> options, and whether steps are replayed
RANKS: dict[str, tuple[dict[str, Any], bool]] = {
    "graphs": ({}, True),
    "graphs, NCCL": ({"custom_all_reduce": False}, True),
    "eager": ({"enforce_eager": True}, False),
    "graphs, sums read": ({"kernels": {"sums_pushed": False}}, True),
}
PRESSURE: dict[str, Any] = {"num_gpu_blocks_override": 40, "max_num_batched_tokens": 24}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    @cache
    def make(kind: str) -> Pair:
        folder = tiny.write(kind, tmp_path_factory.mktemp("tiny"))
        return folder, tiny.reference(folder)

    return make


@pytest.mark.parametrize(("kind", "ways"), [("llama", list(RANKS)), ("qwen3 tied", ["graphs"])])
def test_float32(pair: Callable[[str], Pair], kind: str, ways: list[str]) -> None:
    """Greedy and seeded, what the captured tail serves and what it does not, chunked, preempted, from the cache."""
    folder, model = pair(kind)
    asked = tiny.prompts(24, shared=22, longest=20)
    plain = [
        SamplingParams(temperature=i % 3 * 0.6, seed=i, max_tokens=on_cpu.COUNT, ignore_eos=True) for i in range(24)
    ]
    for way in ways:
        options, replayed = RANKS[way]
        with tiny.llm(folder, **{**TWO, **need("triton"), **PRESSURE, **options, "dtype": "float32"}) as llm:
            for params in (on_cpu.GREEDY, plain, on_cpu.seeded(24)):
                before = llm.stats()
                outputs = llm.generate(asked, params, use_tqdm=False)
                after = llm.stats()
                report = compare(model, outputs, params)
                assert report.positions == on_cpu.COUNT * 24
                assert report.decided >= 0.95 * report.positions
                for counter in ("preemptions", "chunks", "prefix_hit_tokens", "mixed_steps"):
                    assert getattr(after, counter) > getattr(before, counter), (way, counter)
                assert (after.graph_steps > before.graph_steps) == replayed, way
                if params is plain:
                    assert (after.graph_tails > before.graph_tails) == replayed, way
            assert after.free_blocks == after.num_blocks


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_bf16_error_is_that_of_the_format(kind: str, tmp_path: Path) -> None:
    folder = write_wide(kind, tmp_path)
    model = tiny.reference(folder).to("cuda")
    small = {"max_model_len": 512, "max_num_batched_tokens": 160, "max_num_seqs": 4, "dtype": "bfloat16"}
    found = forced.measure(folder, model, 64, longest=300, **{**TWO, **need("triton"), **small})
    print(f"\n{kind}: {found.ours:.6f} against {found.theirs:.6f}; {found.decided} decided")
    assert found.ours <= 1.25 * found.theirs
    assert found.decided > 300
    assert found.flipped == 0
    assert found.stats.graph_steps > 0


@pytest.mark.parametrize("eager", [False, True])
def test_bf16_of_products_that_end_with_their_sum(eager: bool, tmp_path: Path) -> None:
    """Of a hidden size at which those of 33 rows and more do so by copies: prompts of up to 160 rows, 3 requests, whose
    sums are read, and 1 at the end, by turns."""
    for rows in (33, 160):
        assert tile_over_ranks(rows, 2048, 1024, itemsize=2) is not None
    sizes = {"hidden_size": 2048, "intermediate_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4}
    folder = tiny_llama(tmp_path, seed=5, head_dim=64, max_position_embeddings=1024, std=0.02, **sizes)
    model = tiny.reference(folder).to("cuda")
    small = {"max_model_len": 512, "max_num_batched_tokens": 160, "max_num_seqs": 3, "dtype": "bfloat16"}
    mode = {**TWO, **need("triton"), **small, "enforce_eager": eager}
    found = forced.measure(folder, model, 64, longest=300, **mode)
    print(f"\n{found.ours:.6f} against {found.theirs:.6f}; {found.decided} decided")
    assert found.ours <= 1.25 * found.theirs
    assert found.decided > 300
    assert found.flipped == 0
    assert (found.stats.graph_steps > 0) is not eager


def test_a_rank_that_dies_ends_the_engine_with_its_name(tmp_path: Path) -> None:
    folder = tiny.write("llama", tmp_path)
    with tiny.llm(folder, **{**TWO, **need("triton"), "dtype": "float32"}) as llm:
        params = SamplingParams(max_tokens=60, ignore_eos=True)
        victim = llm.engine._executor._ranks[1].process.pid  # type: ignore[attr-defined]
        stream = llm.stream([1, 2, 3], params)
        next(stream)
        os.kill(victim, signal.SIGKILL)
        with pytest.raises(WorkerError, match="rank 1"):
            for _ in stream:
                pass


def test_too_many_ranks_are_refused_with_the_numbers(tmp_path: Path) -> None:
    import torch

    many = torch.cuda.device_count() + 1
    with pytest.raises(Exception, match=f"{many}.*{many - 1}|{many - 1}.*{many}"):
        LLM(tiny.write("llama", tmp_path), device="cuda", tensor_parallel_size=many)
