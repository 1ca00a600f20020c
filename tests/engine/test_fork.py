"""A fork of the engine's process has none of its threads and no ranks: its calls raise that, and it ends nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanoengine.testing.mock_model import write_mock_checkpoint
from tests.engine.support import VOCAB, greedy

pytestmark = pytest.mark.usefixtures("forked")

SCRIPT = """
import os, sys
from threading import Event, Thread
from nanoengine import EngineClosed, LLM, SamplingParams
from nanoengine.testing import mock_model
folder, ranks = sys.argv[1:]
llm = LLM(folder, attention="mock", load_format="dummy", plugins=[mock_model], tensor_parallel_size=int(ranks),
          max_num_seqs=4, block_size=4, num_gpu_blocks_override=64)
params = SamplingParams(temperature=0, max_tokens=6)
stream = llm.stream([1, 2, 3], params)
next(stream)
observing = llm.observe(print)
observing.__enter__()
held, forked = Event(), Event()
def step():  # a fork has the locks as they stand, and no thread that will ever give them back
    with llm.engine._step_lock, llm.engine._requests._lock:
        held.set()
        forked.wait()
stepping = Thread(target=step)
stepping.start()
held.wait()
child = os.fork()
if child == 0:
    for call in (lambda: next(stream), lambda: llm.generate([[1]], params), lambda: llm.hidden_states([1]),
                 llm.reset_prefix_cache, llm.engine.step, llm.observe(print).__enter__):
        try:
            call()
        except EngineClosed as error:
            print("child:", error, flush=True)
    observing.__exit__(None, None, None)
    stream.close()
    llm.close()
    sys.exit()  # with all that runs at the end of a process
print("ended", os.waitpid(child, 0)[1], flush=True)
forked.set()
stepping.join()
observing.__exit__(None, None, None)
for output in stream:
    pass
print("parent:", *output.outputs[0].token_ids)
llm.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_fork_gets_errors_and_ends_nothing(tmp_path: Path, ranks: int) -> None:
    folder = write_mock_checkpoint(tmp_path / "mock", vocab_size=VOCAB)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder, str(ranks)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    *errors, ended, answer = done.stdout.splitlines()
    assert len(errors) == 6
    assert all("and this is a fork of it; make an engine in each process" in line for line in errors)
    assert ended == "ended 0"
    assert answer.split() == ["parent:", *map(str, greedy([1, 2, 3], 6))]
