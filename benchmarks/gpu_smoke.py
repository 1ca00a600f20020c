"""What a change of the GPU path must show before it is measured: it answers, the same tokens every way, no waits.

Runs on one CUDA device with made-up weights; prints one line a check.  python benchmarks/gpu_smoke.py
"""

from __future__ import annotations

import random
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nanoengine import LLM, SamplingParams
from nanoengine.bench.shapes import Shape
from nanoengine.plugins.attention_backends.triton_paged import TritonPaged

SMALL = Shape(
    name="small", architecture="Qwen3ForCausalLM", hidden=256, layers=3, heads=4, kv_heads=2, head_size=64,
    intermediate=512, vocab=4099, tied=True,
)  # fmt: skip


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(4000) for _ in range(rng.randint(3, 90))] for _ in range(count)]


def tokens(folder: Path, params: SamplingParams, **options: Any) -> list[tuple[int, ...]]:
    given: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 64, "num_gpu_blocks_override": 4000, **options}
    with LLM(folder, load_format="dummy", **given) as llm:
        print(
            "   ",
            llm._built.assembly.plan.attention_name,
            "graphs:",
            llm._built.executor.runner.graphs.decode is not None,
        )
        outputs = llm.generate(prompts(24), params, use_tqdm=False)
        print("   ", llm.stats())
    return [o.outputs[0].token_ids for o in outputs]


def same(a: list[tuple[int, ...]], b: list[tuple[int, ...]]) -> str:
    equal = sum(x == y for x, y in zip(a, b, strict=True))
    return f"{equal} of {len(a)} requests equal"


def check(name: str, run: Callable[[], Any]) -> None:
    start = time.perf_counter()
    try:
        print(f"{name}: {run()} ({time.perf_counter() - start:.1f} s)", flush=True)
    except Exception:  # noqa: BLE001 - the other checks still tell something
        print(f"{name}: FAILED", flush=True)
        traceback.print_exc()


def no_wait(folder: Path) -> str:
    """Steps, some of which admit, under torch's synchronisation alarm; then a launch that returns before the GPU."""
    params = SamplingParams(temperature=0.8, max_tokens=200, ignore_eos=True)
    with LLM(folder, load_format="dummy", attention=TritonPaged, dtype="bfloat16", max_num_seqs=64) as llm:
        for i, prompt in enumerate(prompts(16)):
            llm.engine.add_request(str(i), prompt, params)
        for _ in range(10):
            llm.engine.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for i in range(20):
                if i % 5 == 0:
                    llm.engine.add_request(f"late {i}", prompts(16)[i // 5], params)
                llm.engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda._sleep(int(50e-3 * 1.98e9))
        begun = time.perf_counter()
        llm.engine._launch_ahead()
        return f"launch returned after {(time.perf_counter() - begun) * 1e3:.2f} ms under a sleep of about 50 ms"


def main() -> None:
    print(torch.cuda.get_device_name(), torch.__version__)
    with tempfile.TemporaryDirectory() as name:
        folder = SMALL.write(Path(name), 512)
        greedy = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
        seeded = SamplingParams(temperature=0.9, top_p=0.9, seed=3, max_tokens=40, ignore_eos=True)
        reference: dict[str, list[tuple[int, ...]]] = {}

        def cpu() -> str:
            reference["greedy"] = tokens(folder, greedy, device="cpu", attention="torch")
            reference["seeded"] = tokens(folder, seeded, device="cpu", attention="torch")
            return "done"

        def against(params: SamplingParams, key: str, **options: Any) -> Callable[[], str]:
            return lambda: same(reference[key], tokens(folder, params, device="cuda", **options))

        check("cpu", cpu)
        for kind, params in (("greedy", greedy), ("seeded", seeded)):
            check(f"{kind}, torch attention", against(params, kind, attention="torch", fuse_kernels=False))
            for options in (
                {"enforce_eager": True, "fuse_kernels": False},
                {"enforce_eager": True},
                {},
                {"overlap": False},
                {"max_num_batched_tokens": 64},
                {"max_num_batched_tokens": 300},  # prefill beside decode, by a graph
                {"num_gpu_blocks_override": 90},
            ):
                check(f"{kind}, triton, {options}", against(params, kind, **{"attention": TritonPaged, **options}))
        check("no waits", lambda: no_wait(folder))
        free = torch.cuda.mem_get_info()[0]
        check(
            "defaults",
            lambda: (
                tokens(folder, greedy, attention=TritonPaged, dtype="bfloat16", num_gpu_blocks_override=None) and "done"
            ),
        )
        torch.cuda.empty_cache()
        print("memory back to within", (free - torch.cuda.mem_get_info()[0]) >> 20, "MiB")


if __name__ == "__main__":
    main()
