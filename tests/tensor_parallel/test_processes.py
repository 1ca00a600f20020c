"""Ranks as processes: how they start, sleep and end, what goes over their channel, and what is refused before."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import chain_plugin, processors_plugin
from engine.support import greedy
from engine.test_host_states import chained

from nanoengine import (
    LLM,
    ConfigError,
    ModelError,
    NanoEngineError,
    PluginError,
    SamplingParams,
    WorkerError,
    build_engine,
)
from nanoengine.api import AttentionBackend
from nanoengine.distributed.executor import WorkersExecutor
from nanoengine.distributed.faults import phase_of
from nanoengine.distributed.process import RankProcess
from nanoengine.testing import mock_model
from nanoengine.testing.checkpoints import tiny_llama
from nanoengine.testing.mock_model import MockAttention, write_mock_checkpoint

from . import faulty
from .conftest import children
from .support import PARAMS, SMALL, generate, pids

PROMPTS = [[1, 2, 3], [5] * 40, [8], [13, 21] * 9]
ANSWERS = [greedy(prompt, 12) for prompt in PROMPTS]


def mock_llm(folder: Path, **options: Any) -> LLM:
    path = write_mock_checkpoint(folder)
    plugins = [mock_model, processors_plugin.__file__, chain_plugin.__file__]
    return LLM(path, attention="mock", plugins=plugins, **{**SMALL, "tensor_parallel_size": 2, **options})


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LLM, LLM]]:
    """Two engines at once. The first one's rings hold 256 bytes a step."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_engine, "WorkersExecutor", partial(WorkersExecutor, slot_bytes=256))
        narrow = mock_llm(folder / "narrow", max_num_batched_tokens=16)
    with narrow, mock_llm(folder / "wide") as wide:
        yield narrow, wide


def executor(llm: LLM) -> WorkersExecutor:
    found = llm._built.executor
    assert isinstance(found, WorkersExecutor)
    return found


def test_two_engines_answer_side_by_side(two: tuple[LLM, LLM]) -> None:
    streams = [llm.stream(prompt, PARAMS) for prompt in PROMPTS for llm in two]
    last: list[Any] = [None] * len(streams)
    while any(output is None or not output.finished for output in last):
        for i, stream in enumerate(streams):
            last[i] = next(stream, last[i])
    assert [output.outputs[0].token_ids for output in last] == [answer for answer in ANSWERS for _ in two]


def test_steps_too_large_for_the_ring(two: tuple[LLM, LLM]) -> None:
    narrow, wide = two
    before = executor(narrow).parcels_sent
    params = [PARAMS.replace(logprobs=5, prompt_logprobs=i % 2 or None) for i in range(4)]
    assert generate(narrow, PROMPTS, params) == generate(wide, PROMPTS, params) == ANSWERS
    assert executor(narrow).parcels_sent > before + 5
    assert executor(wide).parcels_sent == 0
    assert not executor(narrow)._results, "results that travelled by themselves are dropped when read"


def test_processors_of_a_plugin_file(two: tuple[LLM, LLM], tmp_path: Path) -> None:
    """One with columns that a Python function makes of each token, on every rank the same."""
    params = [PARAMS.replace(forbid_last=4, temperature=i * 0.5, seed=i) for i in range(4)]
    with mock_llm(tmp_path / "one", tensor_parallel_size=1) as one:
        expected = generate(one, PROMPTS, params)
    assert generate(two[1], PROMPTS, params) == expected
    assert expected != ANSWERS


def test_requests_begin_with_generated_tokens(two: tuple[LLM, LLM]) -> None:
    """Of another engine: in one step, or in chunks."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0, "presence_penalty": 1.5},
        {"temperature": 1.3, "frequency_penalty": 0.7},
        {"temperature": 1.5, "top_p": 0.8},
        {"temperature": 1.1, "chain": 4},
    ]
    params = [SamplingParams(max_tokens=12, seed=i, ignore_eos=True, **kind) for i, kind in enumerate(kinds)]
    whole = generate(two[0], PROMPTS, params)
    given = [{"prompt_token_ids": p, "generated_token_ids": ids[:9]} for p, ids in zip(PROMPTS, whole, strict=True)]
    for llm in two:
        outputs = llm.generate(given, params, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in outputs] == whole
        assert [output.metrics.num_generated for output in outputs] == [3] * 4


def test_host_states_live_in_the_engine(two: tuple[LLM, LLM]) -> None:
    """Their columns reach the ranks behind the plan, through the ring or as a parcel."""
    narrow, wide = two
    params = [PARAMS.replace(chain=3), PARAMS, PARAMS.replace(chain=1), PARAMS.replace(chain=3, wrong="columns")]
    before = executor(narrow).parcels_sent
    for llm in two:
        *fine, failed = llm.generate([*PROMPTS[:3], [7]], params, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in fine] == [
            chained(PROMPTS[0]),
            ANSWERS[1],
            chained(PROMPTS[2], chain=1),
        ]
        assert failed.error is not None
        assert failed.error.code == "processor_failed"
    generate(narrow, [PROMPTS[0]] * 16, PARAMS.replace(chain=3, prompt_logprobs=None))
    assert executor(narrow).parcels_sent > before
    assert executor(wide).parcels_sent == 0
    generate(narrow, PROMPTS)  # plans that fit: the engine closes the parcels that the ranks have read


def test_idle_ranks_burn_no_core(two: tuple[LLM, LLM]) -> None:
    def cpu_seconds() -> float:
        ticks = 0
        for llm in two:
            for pid in pids(llm):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    generate(two[0], PROMPTS)
    for llm in two:
        while any(phase_of(executor(llm)._shared, rank) != "idle" for rank in range(2)):  # type: ignore[arg-type]
            time.sleep(0.01)
    before = cpu_seconds()
    time.sleep(1.0)
    assert cpu_seconds() - before <= 0.15, "four ranks, 1 s"
    while cpu_seconds() <= before:  # and the measure measures
        generate(two[1], PROMPTS)


def test_a_call_reaches_all_ranks(two: tuple[LLM, LLM]) -> None:
    for llm in two:
        assert executor(llm).call("nanoengine.observe.taps:stop_capture") == [{}, {}]
    with pytest.raises(NanoEngineError, match=r"LLM\.model needs tensor_parallel_size=1"):
        _ = two[0].model


def test_ctrl_c_while_a_step_runs_leaves_the_engine_usable(
    two: tuple[LLM, LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupts at every wait and send of the engine: a rank runs a plan once, also if it is announced twice. Columns
    that reached one rank alone before it reach the other; columns that reached none are missed by none."""
    wide, calls = two[1], [0]
    receive, announce, send = WorkersExecutor._receive, WorkersExecutor._announce, RankProcess.send

    def interrupted(original: Any, every: int, self: Any, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] % every == 0:
            raise KeyboardInterrupt
        return original(self, *args)

    places = [(WorkersExecutor, "_receive", receive), (WorkersExecutor, "_announce", announce)]
    places += [(RankProcess, "send", send), (WorkersExecutor, "_supply", WorkersExecutor._supply)]
    chain = PARAMS.replace(chain=3)
    for (owner, target, original), every in product(places, (4, 5, 7)):
        calls[0] = 0
        patched = partial(interrupted, original, every)
        monkeypatch.setattr(owner, target, lambda self, *args, patched=patched: patched(self, *args))
        with pytest.raises(KeyboardInterrupt):
            wide.generate(PROMPTS, [PARAMS, PARAMS, chain, chain], use_tqdm=False)
        monkeypatch.setattr(owner, target, original)
        assert generate(wide, PROMPTS) == ANSWERS
        assert generate(wide, PROMPTS[:1], chain) == [chained(PROMPTS[0])]


def test_many_starts_and_stops(tmp_path: Path, started: None) -> None:
    """Two that answer, after two that are given up at several moments of their start. The fixture looks at what is
    left; files of shared memory there are none at any time."""
    before, shm = children(), set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    for seconds in (0.01, 0.13):
        with pytest.raises(WorkerError, match=r"rank \d of 2 failed \((spawn|import)\): .*worker_start_timeout"):
            mock_llm(tmp_path / "mock", worker_start_timeout=seconds)
        assert children() == before
    for _ in range(2):
        llm = mock_llm(tmp_path / "mock")
        assert generate(llm, PROMPTS[:2]) == ANSWERS[:2]
        mine = {str(pid) for pid in (os.getpid(), *pids(llm))}
        new = set(os.listdir("/dev/shm")) - shm if shm else set()
        assert not [name for name in new if "nanoengine" in name or any(pid in name for pid in mine)]
        llm.close()
        llm.close()
        assert children() == before


SCRIPT = """
import sys
from nanoengine import LLM, SamplingParams
from nanoengine.testing import mock_model
folder, plugin, token, count = sys.argv[1:]
llm = LLM(folder, attention="mock", load_format="dummy", plugins=[mock_model, plugin], tensor_parallel_size=2,
          max_num_seqs=4, block_size=4, num_gpu_blocks_override=256)
print("ranks", *[rank.process.pid for rank in llm._built.executor._ranks], flush=True)
params = SamplingParams(temperature=0, max_tokens=int(count) or 1000, ignore_eos=True)
for number, output in enumerate(llm.stream([1, 2, 3], params)):
    if number == 3:
        print("running", flush=True)
        while int(token) or not int(count):
            llm.generate([[int(token)]], params, use_tqdm=False)
print("tokens", *output.outputs[0].token_ids)
"""


class Script:
    """A program as users first write it: no guard around its main part, no `with`, nothing closed. With a count of 0 it
    generates for ever."""

    def __init__(self, folder: Path, token: int = 0, count: int = 12) -> None:
        (folder / "script.py").write_text(SCRIPT)
        path = faulty.write_faulty(folder / "model")
        self.process = subprocess.Popen(
            [sys.executable, folder / "script.py", path, faulty.__file__, str(token), str(count)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self.ranks = [int(pid) for pid in self.line("ranks").split()]
        self.line("running")

    def line(self, word: str) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith(word):
            pytest.fail(f"no {word!r} but {line!r}: {self.process.communicate()[1]}")
        return line.removeprefix(word)

    def end(self) -> tuple[str, str]:
        """What it wrote from now on; its ranks are gone, at the latest a moment after it."""
        out, err = self.process.communicate(timeout=100)
        deadline = time.monotonic() + 60
        while any(map(_runs, self.ranks)):
            assert time.monotonic() < deadline, "ranks outlived their engine"
            time.sleep(0.02)
        return out, err


def _runs(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def test_an_unguarded_script(tmp_path: Path) -> None:
    script = Script(tmp_path)
    out, err = script.end()
    assert out.split() == ["tokens", *map(str, greedy([1, 2, 3], 12))]
    assert err == ""
    assert script.process.returncode == 0


def test_ctrl_c(tmp_path: Path) -> None:
    """As a terminal sends it, to the whole group; and to the ranks, which do not mind."""
    script = Script(tmp_path, count=0)
    for rank in script.ranks:
        os.kill(rank, signal.SIGINT)
    time.sleep(0.1)
    assert all(map(_runs, script.ranks))
    os.killpg(script.process.pid, signal.SIGINT)
    out, err = script.end()
    assert "tokens" not in out
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert not re.search(r"rank \d", err), err
    assert script.process.returncode == -signal.SIGINT


def test_the_engine_is_killed(tmp_path: Path) -> None:
    """While rank 1 hangs and rank 0 waits for it in a collective."""
    script = Script(tmp_path, token=faulty.HANGS, count=30)
    time.sleep(0.3)
    script.process.kill()
    script.end()


def test_what_is_refused_before_any_rank_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(kind: type[Exception], message: str, folder: Path, **options: Any) -> None:
        with pytest.raises(kind, match=message):
            LLM(folder, plugins=[mock_model], **{**SMALL, **options})

    def no_process(*_: object, **__: object) -> None:
        pytest.fail("a process was started")

    monkeypatch.setattr(subprocess, "Popen", no_process)
    mock, llama = write_mock_checkpoint(tmp_path / "mock"), tiny_llama(tmp_path / "llama")
    heads = "6 attention heads cannot be divided over tensor_parallel_size=4"
    refused(ModelError, heads, llama, attention="torch", tensor_parallel_size=4)
    refused(ConfigError, "tensor_parallel_size must be at least 1, not 0", mock, tensor_parallel_size=0)
    for option in ("step_timeout", "worker_start_timeout"):
        refused(ConfigError, rf"engine.{option} is in seconds .* above 0, not 0", mock, **{option: 0.0})

    class Here(MockAttention):
        pass

    main: type[AttentionBackend] = type("InNotebook", (MockAttention,), {"__module__": "__main__"})
    for cls, place in ((Here, "only in this process"), (main, "main script or a notebook")):
        message = rf"attention backend .*{cls.__name__} is defined in .*{place}.* 2 worker processes .*--plugin"
        refused(PluginError, message, mock, attention=cls, tensor_parallel_size=2)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    gpus = {"attention": "mock", "tensor_parallel_size": 2}
    refused(ConfigError, "tensor_parallel_size is 2, one GPU per rank, but .* sees 1", mock, device="cuda", **gpus)
    refused(ConfigError, "rank r runs on cuda:r", mock, device="cuda:1", **gpus)


def test_sampling_params_are_checked_as_ever(two: tuple[LLM, LLM]) -> None:
    with pytest.raises(NanoEngineError, match="temperatur"):
        two[0].generate([[1]], SamplingParams(temperatur=1.0), use_tqdm=False)


def test_start_phases_are_told(two: tuple[LLM, LLM]) -> None:
    report = two[1].start_report
    names = [phase.name for phase in report.phases]
    assert names.index("import") < names.index("weights") < names.index("workers")
    assert report.of("import") > 0
