"""Two thousand mixed, aborted and bad requests: all accounted for, all blocks back, memory flat, no buffer rebuilt."""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoengine import LLM, SamplingParams
from nanoengine.core.execution.slots import MaskTable, RaggedTable
from nanoengine.core.execution.step_inputs import StepBuffers
from nanoengine.testing.checkpoints import tiny_llama
from nanoengine.testing.invariants import check_scheduler

from .support import VOCAB, greedy, mock_llm

REQUESTS = 2000


def request(rng: random.Random, shared: list[list[int]]) -> tuple[list[int], dict[str, Any], bool]:
    """A prompt, its parameters, and whether it is bad."""
    if rng.random() < 0.04:
        return rng.choice([[], [VOCAB], [1] * 600, [-3]]), {}, True
    prompt = rng.choice(shared) + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 12))]
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": rng.randint(1, 14)}
    if rng.random() < 0.5:
        fields |= {
            "temperature": 1.2,
            "top_k": rng.choice([0, 5]),
            "top_p": rng.choice([1.0, 0.8]),
            "n": rng.choice([1, 1, 2]),
        }
    if rng.random() < 0.1:
        fields |= {"logprobs": 2, "presence_penalty": 0.5, "prompt_logprobs": 1}
    return prompt, fields, False


def drive(llm: LLM, count: int, rng: random.Random, tag: str) -> dict[str, int]:
    shared = [[rng.randrange(VOCAB) for _ in range(n)] for n in (0, 8, 17)]
    live: list[str] = []
    ended: set[str] = set()
    seen = {"finished": 0, "aborted": 0, "refused": 0, "checked": 0}
    expected: dict[str, tuple[int, ...]] = {}
    added = 0
    while added < count or llm.text_engine.has_unfinished_requests():
        for _ in range(rng.randint(0, 6)):
            if added == count:
                break
            prompt, fields, bad = request(rng, shared)
            name = f"{tag}{added}"
            llm.text_engine.add_request(name, prompt, SamplingParams(**fields), rng.randint(0, 2))
            if not bad and fields["temperature"] == 0 and "logprobs" not in fields and added % 10 == 0:
                expected[name] = greedy(prompt, fields["max_tokens"])
            live.append(name)
            added += 1
        if live and rng.random() < 0.15:
            llm.engine.abort_request(rng.choice(live))
        for output in llm.text_engine.step():
            if not output.finished:
                continue
            assert output.request_id not in ended
            ended.add(output.request_id)
            live.remove(output.request_id)
            if output.error is not None:
                seen["refused"] += 1
            elif any(o.finish_reason == "abort" for o in output.outputs):
                seen["aborted"] += 1
            else:
                seen["finished"] += 1
                if output.request_id in expected:
                    assert output.outputs[0].token_ids == expected[output.request_id]
                    seen["checked"] += 1
    assert len(ended) == count
    return seen


def measure() -> tuple[int, int]:
    """Live container objects, and the process's bytes of its own; what the system swaps out of them is counted, too."""
    gc.collect()
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kilobytes = sum(int(fields[name].split()[0]) for name in ("RssAnon", "VmSwap"))
    return len(gc.get_objects()), kilobytes << 10


def test_two_thousand_requests(tmp_path: Path) -> None:
    rng = random.Random(5)
    options: dict[str, Any] = {"num_gpu_blocks_override": 60, "max_num_batched_tokens": 48, "max_num_seqs": 16}
    with mock_llm(tmp_path, scheduling_policy="priority", **options) as llm:
        first = drive(llm, REQUESTS // 2, rng, "first")  # bounded caches fill here
        before = measure()
        second = drive(llm, REQUESTS // 2, rng, "second")
        after = measure()
        stats = llm.stats()
        check_scheduler(llm.engine.scheduler)
    seen = {name: first[name] + second[name] for name in first}
    assert sum(seen[k] for k in ("finished", "aborted", "refused")) == REQUESTS
    assert all(seen[k] > 20 for k in seen), seen
    assert stats.free_blocks == stats.num_blocks
    assert stats.running == stats.waiting == 0
    assert stats.preemptions > 10
    assert stats.prefix_hit_tokens > 0
    assert stats.mixed_steps > 100
    assert after[0] - before[0] < 1000, "objects are kept"
    assert after[1] - before[1] < 8 << 20, "memory is kept"


def pointers(llm: LLM) -> dict[str, int]:
    """Addresses of every tensor that the runner's tables, buffers and backends hold, tables of columns included."""
    runner: Any = llm.engine._executor.runner  # type: ignore[attr-defined]
    found = {}
    out = runner.buffers.out
    gathered = {name: getattr(out, name) for name in out.__dataclass_fields__}
    for owner in (runner.tables, runner.buffers, *runner.backends):
        for name, value in (vars(owner) | (gathered if owner is runner.buffers else {})).items():
            if isinstance(value, torch.Tensor):
                found[f"{type(owner).__name__}.{name}"] = value.data_ptr()
    columns = {
        f"{processor}.{name}": t
        for processor, tables in runner.tables.columns.items()
        for name, t in tables.items()
        if not isinstance(t, MaskTable)  # which has no buffer
    }
    for name, table in {"stop_ids": runner.tables.stop_ids, **columns}.items():
        found[name] = table.values.data_ptr()
        if isinstance(table, RaggedTable):
            found[f"{name}.counts"] = table.counts.data_ptr()
    return found


EVERYTHING = SamplingParams(
    temperature=0.9, top_k=20, top_p=0.9, presence_penalty=0.3, logit_bias={5: 1.0}, max_tokens=120, seed=1,
    min_tokens=119, stop_token_ids=[3, 4],
)  # fmt: skip


def over_a_hundred_steps(llm: LLM) -> tuple[dict[str, int], dict[str, int]]:
    """Addresses before and after, with requests that come while others run."""
    for i in range(4):
        llm.text_engine.add_request(str(i), [i + 1, 2, 3], EVERYTHING)
    llm.text_engine.step()
    llm.text_engine.step()
    before, steps = pointers(llm), llm.stats().steps
    for i in range(100):
        if i % 20 == 0:
            llm.text_engine.add_request(f"late {i}", [i + 1, 2, 3, 4], EVERYTHING)
        llm.text_engine.step()
    assert llm.stats().steps >= steps + 99
    return before, pointers(llm)


@pytest.fixture(params=["mock", "torch"])
def an_llm(request: pytest.FixtureRequest, tmp_path: Path) -> LLM:
    """The mock model, and a tiny Llama on the backend that CPUs use."""
    if request.param == "mock":
        return mock_llm(tmp_path)
    return LLM(tiny_llama(tmp_path / "llama"), attention="torch", max_num_seqs=16, num_gpu_blocks_override=256)


def test_no_buffer_is_rebuilt_over_a_hundred_steps(an_llm: LLM) -> None:
    with an_llm as llm:
        before, after = over_a_hundred_steps(llm)
    assert after == before
    assert {"stop_ids", "stop_ids.counts", "temperature.temperature", "SlotTables.token_ids"} <= set(before)
    assert sum(name.endswith(".counts") for name in before) > 2
    assert len(before) > 30


@pytest.mark.parametrize("mutant", ["table", "buffer"])
def test_a_rebuilt_buffer_is_caught(an_llm: LLM, monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    kept: list[torch.Tensor] = []  # old ones live on, so that no address comes back
    gather = StepBuffers.gather

    def widened_at_each_write(self: RaggedTable, width: int) -> None:
        kept.append(self.values)
        self.values = self.values.clone()

    def gathered_anew(self: StepBuffers, *args: Any) -> Any:
        kept.append(self.sent)
        self.sent = self.sent.clone()
        return gather(self, *args)

    if mutant == "table":
        monkeypatch.setattr(RaggedTable, "_widen", widened_at_each_write)
    else:
        monkeypatch.setattr(StepBuffers, "gather", gathered_anew)
    with an_llm as llm:
        before, after = over_a_hundred_steps(llm)
    moved = {name for name in before if before[name] != after[name]}
    assert moved
    assert moved <= ({n for n in before if f"{n}.counts" in before} if mutant == "table" else {"StepBuffers.sent"})
