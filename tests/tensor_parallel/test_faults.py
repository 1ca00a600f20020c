"""A rank that dies, hangs or raises: the engine says which, where and why within its deadline, and nothing is left."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from nanoengine import EngineClosed, RequestError, WorkerError
from nanoengine.api.errors import ModelError
from nanoengine.distributed.faults import phase_of

from . import faulty
from .support import PARAMS, faulty_llm, generate, pids

LONG = PARAMS.replace(max_tokens=400)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(
    ("token", "rank", "cause", "trace"),
    [
        (faulty.RAISES, 1, "ArithmeticError: one rank alone", 'raise ArithmeticError("one rank alone")'),
        (faulty.DIES, 1, "the process ended: killed by SIGKILL", ""),
        (faulty.HANGS, 1, r"no progress for 2 s: it hangs, or engine.step_timeout", "in stuck_here"),
        (faulty.RAISES_EVERYWHERE, None, r"ArithmeticError: on rank \d too", "in forward"),
    ],
)
def test_in_a_step(token: int, rank: int | None, cause: str, trace: str, tmp_path: Path) -> None:
    """The first request has finished by then; the second is in the middle; the third brings the fault."""
    llm = faulty_llm(tmp_path, step_timeout=2.0 if token == faulty.HANGS else 60.0, max_num_seqs=2)
    processes = pids(llm)
    prompts, lengths = [[1, 2], [3] * 9, [4, token]], (2, 400, 5)
    with pytest.raises(WorkerError, match=rf"rank \d of 2 failed \(step \d\): {cause}") as caught:
        llm.generate(prompts, [PARAMS.replace(max_tokens=n) for n in lengths], use_tqdm=False)
    error = caught.value
    assert rank in (error.rank, None)
    assert trace in error.traceback
    assert all(map(gone, processes))
    first, second, third = error.outputs
    assert (first.error, len(first.outputs[0].token_ids)) == (None, 2)
    for output in (second, third):
        assert output.error is not None
        assert output.error.code == "worker_failed"
        assert str(output.error) == error.summary
    with pytest.raises(EngineClosed, match=error.summary.split(":")[0].replace("(", r"\(").replace(")", r"\)")):
        llm.generate([[1]], PARAMS, use_tqdm=False)
    llm.close()


def test_killed_mid_run_and_streams(tmp_path: Path) -> None:
    """From outside, by signal 9. `step()` callers find the outputs on the error; streams raise theirs."""
    llm = faulty_llm(tmp_path)
    stream = llm.stream([5, 6], LONG)
    next(stream)
    llm.text_engine.add_request("mine", [1, 2, 3], LONG)
    llm.text_engine.step()
    os.kill(pids(llm)[0], signal.SIGKILL)

    def steps() -> None:
        for _ in range(500):
            llm.text_engine.step()

    with pytest.raises(WorkerError, match=r"rank 0 of 2 failed .*killed by SIGKILL") as caught:
        steps()
    (output,) = caught.value.outputs
    assert output.request_id == "mine"
    assert output.finished
    with pytest.raises(RequestError, match="rank 0 of 2 failed") as ended:
        list(stream)
    assert ended.value.code == "worker_failed"
    assert not llm.text_engine.has_unfinished_requests()


def test_killed_while_idle(tmp_path: Path) -> None:
    llm = faulty_llm(tmp_path)
    (answer,) = generate(llm, [[1, 2]])
    assert len(answer) == 12
    shared = llm._built.executor._shared  # type: ignore[attr-defined]
    while phase_of(shared, 1) != "idle":  # rank 0's result is there before rank 1 is done
        time.sleep(0.01)
    os.kill(pids(llm)[1], signal.SIGSEGV)  # as a library's fault; the kernel's SIGKILL leaves no stack
    began = time.monotonic()
    with pytest.raises(WorkerError, match=r"rank 1 of 2 failed \(idle\): .*killed by SIGSEGV") as caught:
        llm.generate([[1, 2]], PARAMS, use_tqdm=False)
    assert "Fatal Python error: Segmentation fault" in caught.value.traceback
    assert "in _serve" in caught.value.traceback
    assert time.monotonic() - began < 50, "detected by the socket, not by a deadline of 60 s"


def test_an_exception_at_the_start(tmp_path: Path) -> None:
    """Of a plugin's class on one rank alone; it is ours to name the class."""
    with pytest.raises(WorkerError, match=r"rank 1 of 2 failed \(weights\): .*ValueError: no good start") as caught:
        faulty_llm(tmp_path, "start")
    assert isinstance(caught.value.__cause__, ModelError)
    assert 'raise ValueError("no good start")' in caught.value.traceback
