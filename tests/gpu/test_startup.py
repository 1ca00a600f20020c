"""What a start does on a GPU: weights are complete, kernels compile in parallel, and each phase is reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoengine.api.parallel import SingleRank
from nanoengine.plugins.models.qwen3 import Qwen3
from nanoengine.setup.start.build_model import build_model
from nanoengine.setup.start.mxfp4 import dequantised
from nanoengine.setup.start.weights import load_weights

from .support import need, write_wide

pytestmark = [pytest.mark.gpu, pytest.mark.alone]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_on_the_gpu_are_those_of_the_file(dtype: torch.dtype, tmp_path: Path) -> None:
    path = write_wide("qwen3", tmp_path / "model")
    hf = json.loads((path / "config.json").read_text())

    def loaded(device: str) -> list[torch.Tensor]:
        built = build_model(Qwen3, hf, tp=SingleRank(), dtype=dtype, device=device)
        load_weights(built.model, built.config, path, SingleRank())
        return list(built.model.parameters())

    for there, here in zip(loaded("cuda"), loaded("cpu"), strict=True):
        assert there.is_cuda
        assert torch.equal(there.cpu(), here)


def test_mxfp4_is_dequantised_on_the_gpu_to_the_same_bits() -> None:
    """Powers of two and numbers below the normal ones too; the last exponent is beyond bfloat16."""
    blocks, scales = torch.arange(256).repeat(256, 1).to(torch.uint8), torch.arange(256).to(torch.uint8)
    pieces = blocks.view(1, 256, 16, 16), scales.view(1, 256, 1).repeat(1, 1, 16)
    here, there = dequantised(*pieces), dequantised(*(each.cuda() for each in pieces)).cpu()
    assert torch.equal(there.view(torch.int16), here.view(torch.int16))


PROGRAM = """
import json, sys, threading
from triton import knobs

compiled = []

def listen(*, src, metadata, metadata_group, times, cache_hit):
    compiled.append((threading.current_thread().name, cache_hit))

knobs.compilation.listener = listen
from nanoengine import LLM, SamplingParams

if __name__ == "__main__":
    model, given = sys.argv[1], json.loads(sys.argv[2])
    prompts = [list(range(n, n + 20)) for n in range(5)]
    with LLM(model, attention="triton", device="cuda", max_num_batched_tokens=512, dtype="float32", **given) as llm:
        started = len(compiled)
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        stats, phases = llm.stats(), llm.start_report.as_dict()
    print(json.dumps(dict(
        tokens=tokens, started=started, graph_steps=stats.graph_steps, phases=phases, compiled=compiled)))
"""


def test_cold_starts_compile_in_parallel_and_serve_what_an_eager_engine_serves(tmp_path: Path) -> None:
    """Two at a time. Without a profile run (blocks are given) nothing is launched before the dry run: no write of the
    host's may be lost."""
    need("triton")
    model = write_wide("qwen3", tmp_path / "model")
    (tmp_path / "program.py").write_text(PROGRAM)

    def start(cache: str, **given: object) -> subprocess.Popen[str]:
        paths = {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(tmp_path / cache)}
        return subprocess.Popen(
            [sys.executable, str(tmp_path / "program.py"), str(model), json.dumps(given)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **paths},
        )  # fmt: skip

    def found(process: subprocess.Popen[str]) -> dict[str, Any]:
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err[-3000:]
        answer: dict[str, Any] = json.loads(out.splitlines()[-1])
        return answer

    share = {"gpu_memory_utilization": 0.3}
    both = start("cache", **share), start("other cache", num_gpu_blocks_override=200)
    cold, of_blocks = map(found, both)
    both = start("cache", **share), start("cache", **share, enforce_eager=True)
    warm, eager = map(found, both)
    assert cold["tokens"] == of_blocks["tokens"] == warm["tokens"] == eager["tokens"]
    assert not [hit for _, hit in warm["compiled"] if not hit]
    for each in (cold, of_blocks):
        assert each["graph_steps"] > 0
        at_start = each["compiled"][: each["started"]]
        in_pool = [name for name, _ in at_start if name.startswith("ThreadPoolExecutor")]  # by it or its processes
        in_turn = [name for name, hit in at_start if not name.startswith("ThreadPoolExecutor") and not hit]
        print(f"compiled at the start: {len(in_pool)} in parallel, {len(in_turn)} in turn; {each['phases']}")
        assert len(in_pool) > 20
        assert len(in_turn) < len(in_pool), in_turn
        assert {"device", "weights", "buffers", "kv cache", "capture"} <= each["phases"].keys()
        assert ("profile" in each["phases"]) == (each is cold)
