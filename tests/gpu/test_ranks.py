"""Ranks on GPUs as processes: the engine's own holds no context, and what a GPU adds to the ways a rank may fail."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tensor_parallel import faulty
from tensor_parallel.support import PARAMS, faulty_llm, generate, pids

from nanoengine import WorkerError

pytestmark = pytest.mark.multi_gpu
# Nothing is compiled before the first step, which may take some seconds.
GPU = {"device": "cuda", "worker_start_timeout": 120.0, "step_timeout": 20.0, "enforce_eager": True}

NO_CONTEXT = """
import ctypes, sys
from nanoengine import LLM, SamplingParams

llm = LLM(sys.argv[1], tensor_parallel_size=2, device="cuda", max_num_batched_tokens=512, max_num_seqs=8)
llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
cuda, flags, active = ctypes.CDLL("libcuda.so.1"), ctypes.c_uint(), ctypes.c_int()
for device in range(2):
    status = cuda.cuDevicePrimaryCtxGetState(device, ctypes.byref(flags), ctypes.byref(active))
    print("context", device, status in (0, 3) and active.value)  # 3: the driver was not even initialised
"""


def test_the_engines_process_holds_no_context(tmp_path: Path) -> None:
    from nanoengine.testing.checkpoints import tiny_llama

    (tmp_path / "script.py").write_text(NO_CONTEXT)
    folder = tiny_llama(tmp_path / "model", head_dim=64)
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py", folder],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.split("\n")[:2] == ["context 0 0", "context 1 0"], done.stderr


@pytest.mark.parametrize(
    ("token", "cause", "trace"),
    [
        (faulty.RAISES, "ArithmeticError: one rank alone", "in forward"),
        (faulty.HANGS, "no progress for 20 s", "in stuck_here"),
        (faulty.DIES, "the process ended: killed by SIGKILL", ""),
    ],
)
def test_one_rank_fails_while_the_other_waits_in_a_collective(
    token: int, cause: str, trace: str, tmp_path: Path
) -> None:
    """On a GPU the other one's kernel never ends: it is killed with the rest, and its GPU can be used again."""
    llm = faulty_llm(tmp_path, **GPU)
    with pytest.raises(WorkerError, match=rf"rank 1 of 2 failed \(step \d+\): {cause}") as caught:
        llm.generate([[1, 2], [3] * 9 + [token]], PARAMS, use_tqdm=False)
    assert trace in caught.value.traceback
    with faulty_llm(tmp_path, **GPU) as again:
        (output,) = again.generate([[1, 2]], PARAMS, use_tqdm=False)
        assert output.error is None


def test_a_rank_that_runs_out_of_memory_lives_on(tmp_path: Path) -> None:
    """No rank waits for it in a collective; the request for which it has no memory fails alone, with figures."""
    with faulty_llm(tmp_path, **GPU) as llm:
        processes = pids(llm)
        (alone,) = generate(llm, [[1, 2]])
        for _ in range(3):
            one, other = llm.generate([[1, 2], [3] * 9 + [faulty.RUNS_OUT]], PARAMS, use_tqdm=False)
            assert one.outputs[0].token_ids == alone
            assert other.error is not None
            assert other.error.code == "out_of_memory"
            assert re.search(r"rank 1 of 2: OutOfMemoryError: .* \[GPU 1: .* GiB in use by torch, ", str(other.error))
        stats = llm.stats()
        assert stats.steps_withdrawn > 3
        assert stats.preemptions == 0
        assert stats.free_blocks == stats.num_blocks
        assert pids(llm) == processes
