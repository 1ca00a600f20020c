"""Memory on a GPU: what engines take and give back, several at once, and what happens where it does not suffice."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.support import greedy, mock_llm, prompts, tokens_of

from nanoengine import LLM, RequestOutput, SamplingParams
from nanoengine.api.errors import DeviceMemoryError
from nanoengine.core.execution.graphs import StepGraphs
from nanoengine.core.execution.step_inputs import StepSize
from nanoengine.core.step import num_slots
from nanoengine.setup.start import capture
from nanoengine.testing.invariants import check_scheduler
from nanoengine.testing.mock_model import MockModel

from .support import ON_GPU, need, runner_of, write_wide

pytestmark = [pytest.mark.gpu, pytest.mark.alone]
MIB, GIB = 1 << 20, 1 << 30
GREEDY = SamplingParams(temperature=0, max_tokens=12)
LARGE_CACHE = 50_000  # blocks of 16 tokens: over 1 GiB for the wide checkpoints


def memory() -> tuple[int, int]:
    """Bytes that the device has given away, and those of them that torch's allocator holds.

    cuBLAS's workspaces belong to the process, not to an engine, and go first: none is alive when this is called.
    """
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free, torch.cuda.memory_reserved()


@contextmanager
def room(num_bytes: int) -> Iterator[None]:
    """This process may take so much more of the GPU than it holds."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + num_bytes) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def asked(count: int, longest: int = 60) -> list[list[int]]:
    return [[token % 120 for token in p] for p in prompts(count, shortest=longest // 2, longest=longest)]


@pytest.mark.parametrize("mode", ["torch", "triton eager", "triton", "flash_attn"])
def test_close_gives_everything_back(tmp_path: Path, mode: str) -> None:
    """Within 64 MiB of what the device had given away before; the first engine loads the kernels' code, which stays."""
    options = {**need(mode), **ON_GPU, "dtype": "bfloat16", "num_gpu_blocks_override": LARGE_CACHE}
    if mode == "flash_attn":
        options["num_gpu_blocks_override"] = LARGE_CACHE // 16
    folder = write_wide("qwen3", tmp_path / "qwen3")
    params = SamplingParams(max_tokens=12, seed=1, logprobs=2, prompt_logprobs=1, presence_penalty=0.5, top_k=5)
    seen: list[tuple[int, int]] = []
    for _ in range(2):
        with LLM(folder, **options) as llm:
            llm.generate(asked(8), [GREEDY, params] * 4, use_tqdm=False)
            report, (free, total) = llm.memory_report, torch.cuda.mem_get_info()
            assert report.kv_cache_bytes > 700 * MIB
            assert torch.cuda.memory_reserved() > report.kv_cache_bytes
            assert total - free > report.kv_cache_bytes
        seen.append(memory())
    print(f"\n{mode}: device and allocator after each close: {[(a // MIB, b // MIB) for a, b in seen]} MiB")
    first, *later = seen
    assert first[1] <= 64 * MIB, "torch's allocator keeps memory of a closed engine"
    for used, reserved in later:
        assert reserved <= 64 * MIB
        assert abs(used - first[0]) <= 64 * MIB


def test_close_in_the_middle_of_steps_gives_everything_back(tmp_path: Path) -> None:
    folder = write_wide("llama", tmp_path / "llama")
    seen = []
    for _ in range(2):
        llm = LLM(folder, **need("triton"), **ON_GPU, num_gpu_blocks_override=LARGE_CACHE)
        for i, prompt in enumerate(asked(8)):
            llm.text_engine.add_request(str(i), prompt, SamplingParams(max_tokens=500, ignore_eos=True))
        for _ in range(5):
            llm.text_engine.step()
        llm.close()
        seen.append(memory())
    assert seen[0][1] <= 64 * MIB
    assert seen[1][1] <= 64 * MIB
    assert abs(seen[1][0] - seen[0][0]) <= 64 * MIB


def test_two_engines_at_once(tmp_path: Path) -> None:
    """With graphs, steps of both in turn; what one closes does not touch the other."""
    folder = write_wide("llama", tmp_path / "llama")
    options = {**need("triton"), **ON_GPU, "dtype": "float32", "gpu_memory_utilization": 0.3}
    with LLM(folder, **options) as alone:
        wanted = tokens_of(alone.generate(asked(6), GREEDY, use_tqdm=False))
    one, two = LLM(folder, **options), LLM(folder, **options)
    for engine, tag in ((one.text_engine, "a"), (two.text_engine, "b")):
        for i, prompt in enumerate(asked(6)):
            engine.add_request(f"{tag}{i}", prompt, GREEDY, final_only=True)
    found: dict[str, tuple[int, ...]] = {}
    while one.text_engine.has_unfinished_requests() or two.text_engine.has_unfinished_requests():
        for llm in (one, two):
            if llm.text_engine.has_unfinished_requests():
                found |= {o.request_id: o.outputs[0].token_ids for o in llm.text_engine.step()}
    assert [found[f"a{i}"] for i in range(6)] == wanted
    assert [found[f"b{i}"] for i in range(6)] == wanted
    assert two.stats().graph_steps > 0
    one.close()
    assert tokens_of(two.generate(asked(6), GREEDY, use_tqdm=False)) == wanted
    two.close()


def test_an_engine_starts_in_what_others_leave(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The default utilization where most of the GPU is taken: it says so, takes what is free, and serves."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(free - 6 * GIB, dtype=torch.uint8, device="cuda")
    with caplog.at_level(logging.WARNING), mock_llm(tmp_path, **ON_GPU, num_gpu_blocks_override=None) as llm:
        assert tokens_of(llm.generate(prompts(8), GREEDY, use_tqdm=False)) == [greedy(p, 12) for p in prompts(8)]
        assert llm.memory_report.kv_cache_bytes < 6 * GIB
    del held
    assert any("this engine uses at most 5." in message for message in caplog.messages), caplog.messages


def test_no_room_at_all_is_an_error_with_figures(tmp_path: Path) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(free - 400 * MIB, dtype=torch.uint8, device="cuda")
    folder = write_wide("llama", tmp_path / "llama")
    with pytest.raises(DeviceMemoryError, match=r"GiB") as caught:
        LLM(folder, attention="torch", device="cuda")
    del held
    assert "free" in str(caught.value)
    memory()
    assert torch.cuda.memory_allocated() <= 8 * MIB


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    """Nothing stays allocated, though the error is kept."""
    folder = write_wide("llama", tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 4}
    (folder / "config.json").write_text(json.dumps(config))
    before = torch.cuda.memory_allocated()
    with (
        room(GIB),
        pytest.raises(DeviceMemoryError, match=r"the model's weights take \d\.\d\d GiB and do not") as caught,
    ):
        LLM(folder, device="cuda", dtype="float32", load_format="dummy")
    assert "are free on cuda" in str(caught.value)
    assert torch.cuda.memory_allocated() - before <= 8 * MIB


def test_too_little_memory_at_start_means_a_smaller_batch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The cache of 256 full slots takes over 500 MiB; what the budget does not know is that there are 400."""
    folder = write_wide("llama", tmp_path / "llama")
    options = {**need("triton eager"), "device": "cuda", "dtype": "float32"}
    with LLM(folder, **options) as alone:
        wanted = alone.generate(asked(20), GREEDY.replace(logprobs=2), use_tqdm=False)
        assert alone.memory_report.kv_cache_bytes > 500 * MIB
    with caplog.at_level(logging.WARNING), room(400 * MIB), LLM(folder, **options) as llm:
        report, config = llm.memory_report, llm.engine.scheduler.config
        assert (config.max_num_batched_tokens, config.max_num_seqs) == (256, report.max_num_seqs)
        assert report.max_num_seqs < 256
        assert runner_of(llm).tables.limits.max_slots == num_slots(report.max_num_seqs, 8)
        found = llm.generate(asked(20), GREEDY.replace(logprobs=2), use_tqdm=False)
    assert_same(found, wanted)
    words = "memory is too small for max_num_batched_tokens=8192, max_num_seqs=256"
    assert sum(words in m for m in caplog.messages) == 1


def assert_same(found: Sequence[RequestOutput], wanted: Sequence[RequestOutput]) -> None:
    """The float32 class: equal tokens up to the first near-tie; log-probs, of the prompt too, within 5e-4."""
    for one, other in zip(found, wanted, strict=True):
        assert one.error is None, one.error
        ours, theirs = one.outputs[0], other.outputs[0]
        assert ours.logprobs is not None
        assert theirs.logprobs is not None
        prompt = (output.prompt_logprobs or () for output in (one, other))
        rows: list[tuple[Any, Any]] = list(zip(*(each[1:] for each in prompt), strict=True))
        for a, b, token, want in zip(ours.logprobs, theirs.logprobs, ours.token_ids, theirs.token_ids, strict=True):
            if token != want:
                first, second = sorted((entry.logprob for entry in b.values()), reverse=True)[:2]
                assert first - second < 1e-3
                break
            rows.append((a, b))
        for a, b in rows:
            for token in a.keys() & b.keys():
                assert abs(a[token].logprob - b[token].logprob) < 5e-4


@pytest.mark.parametrize("mode", ["triton eager", "triton"])
def test_a_step_without_room_runs_as_smaller_steps(tmp_path: Path, mode: str) -> None:
    """8,192 tokens in one step, whose activations take more than the room there is."""
    folder = write_wide("llama", tmp_path / "llama")
    params = [GREEDY.replace(logprobs=2, prompt_logprobs=1 if i % 2 else None) for i in range(12)]
    texts = [[token % 120 for token in p] for p in prompts(12, shortest=900, longest=1000)]
    options = {**need(mode), "device": "cuda", "dtype": "float32", "num_gpu_blocks_override": 2048}
    with LLM(folder, **options, enable_prefix_caching=False) as llm:
        wanted = llm.generate(texts, params, use_tqdm=False)
        assert llm.stats().steps_withdrawn == 0
        with room(64 * MIB):
            found = llm.generate(texts, params, use_tqdm=False)
        stats = llm.stats()
        assert stats.steps_withdrawn > 0, stats
        assert stats.preemptions == 0
        assert stats.free_blocks == stats.num_blocks
        again = llm.generate(texts, params, use_tqdm=False)
        assert llm.stats().steps_withdrawn == stats.steps_withdrawn
    assert_same(found, wanted)
    assert_same(again, wanted)


def test_a_capture_without_room_leaves_its_size_eager_and_gives_its_memory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the capture took before it failed is there for others; once there is room, it is captured."""
    run, hungry = StepGraphs.run, [True]

    def hungry_run(self: StepGraphs, size: StepSize) -> torch.Tensor:
        logits = run(self, size)
        if hungry and size.plain and size.decode_rows == 8 and torch.cuda.is_current_stream_capturing():
            kept = [torch.empty(100 * MIB, dtype=torch.uint8, device="cuda") for _ in range(10)]
            logits = logits + len(kept) * 0
        return logits

    monkeypatch.setattr(StepGraphs, "run", hungry_run)
    monkeypatch.setattr(capture._Attempts, "FIRST", 8)
    with mock_llm(tmp_path, **{**ON_GPU, "max_num_batched_tokens": 256}, lazy_graphs=True) as llm:

        def replayed(count: int) -> int:
            texts, before = prompts(count, longest=12), llm.stats().graph_steps
            assert tokens_of(llm.generate(texts, GREEDY, use_tqdm=False)) == [greedy(p, 12) for p in texts]
            return llm.stats().graph_steps - before

        assert replayed(2) > 5
        with room(300 * MIB):
            before = torch.cuda.memory_reserved()
            assert replayed(8) < 3
            assert torch.cuda.memory_reserved() - before < 100 * MIB
            assert replayed(2) > 5
        hungry.clear()
        assert sum(replayed(8) for _ in range(6)) > 5
        stats = llm.stats()
    assert stats.uncaptured_steps > 5
    assert stats.steps_broken == stats.steps_withdrawn == stats.preemptions == 0


def test_an_invalid_capture_leaves_torch_s_allocator_as_it_was() -> None:
    """It ends with an error, and its memory is given back all the same, and other memory once it is short."""
    reserved = memory()[1]

    def waits() -> object:
        return torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda").sum().item()

    for _ in range(2):
        with pytest.raises(RuntimeError):
            capture.captured(waits, torch.cuda.graph_pool_handle(), torch.cuda.Stream())
    assert memory()[1] - reserved <= 4 * MIB
    with room(3 * GIB):
        small = torch.empty(2 * GIB, dtype=torch.uint8, device="cuda")
        del small  # the allocator keeps it, and has no room for the next one but that
        assert torch.empty(5 * GIB // 2, dtype=torch.uint8, device="cuda").is_cuda


def hungry_forward(monkeypatch: pytest.MonkeyPatch, size: Callable[[Any], int]) -> None:
    """An eager forward pass takes `size(input_ids)` bytes of the allocator's beside its own."""
    forward = MockModel.forward

    def hungry(self: MockModel, input_ids: Any, positions: Any, batch: Any) -> Any:
        taken = torch.empty(size(input_ids), dtype=torch.uint8, device="cuda")
        hidden = forward(self, input_ids, positions, batch)
        del taken
        return hidden

    monkeypatch.setattr(MockModel, "forward", hungry)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("eager", [True, False])
def test_smaller_steps_are_bit_for_bit_on_the_mock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool, eager: bool
) -> None:
    """Each eager token takes a MiB of the allocator's, of which there are some 200: beside steps that are graphs."""
    texts = prompts(24, shortest=30, longest=90, shared=10)
    options: dict[str, Any] = {"device": "cuda", "max_num_batched_tokens": 1024, "num_gpu_blocks_override": 2048}
    with mock_llm(tmp_path, overlap=overlap, enforce_eager=eager, **options) as llm:
        hungry_forward(monkeypatch, lambda input_ids: len(input_ids) * MIB)
        with room(200 * MIB):
            outputs = llm.generate(texts, GREEDY, use_tqdm=False)
        stats = llm.stats()
        check_scheduler(llm.engine.scheduler)
    assert tokens_of(outputs) == [greedy(p, 12) for p in texts]
    assert stats.steps_withdrawn > 0
    assert stats.preemptions == stats.steps_broken == 0
    assert stats.free_blocks == stats.num_blocks


@pytest.mark.parametrize("overlap", [True, False])
def test_a_decode_batch_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    """256 rows where memory holds fewer: none is preempted; once there is room again, all run in one step."""
    texts = prompts(256, shortest=2, longest=5)
    options: dict[str, Any] = {"device": "cuda", "max_num_seqs": 256, "num_gpu_blocks_override": 8192}
    params = SamplingParams(temperature=0, max_tokens=24)
    with mock_llm(tmp_path, overlap=overlap, enforce_eager=True, **options) as llm:
        for i, text in enumerate(texts):
            llm.text_engine.add_request(str(i), text, params, final_only=True)
        for _ in range(3):
            llm.text_engine.step()
        hungry_forward(monkeypatch, lambda input_ids: len(input_ids) * MIB)
        done = {}
        with room(200 * MIB):
            while llm.text_engine.has_unfinished_requests():
                done |= {output.request_id: output for output in llm.text_engine.step()}
        stats = llm.stats()
        assert tokens_of([done[str(i)] for i in range(256)]) == [greedy(text, 24) for text in texts]
        assert 0 < stats.steps_withdrawn < 12
        assert stats.preemptions == stats.steps_broken == 0
        assert tokens_of(llm.generate(texts, params, use_tqdm=False)) == [greedy(text, 24) for text in texts]
        assert llm.stats().steps_withdrawn == stats.steps_withdrawn


def test_a_request_that_has_no_room_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token of the poisonous prompt takes more than there is."""
    texts = [p for p in prompts(40, seed=3, longest=14) if 96 not in [*p, *greedy(p, 12)]][:6]
    texts.insert(2, [1, 2, 96, 3])
    with mock_llm(tmp_path, device="cuda", enforce_eager=True) as llm:
        hungry_forward(monkeypatch, lambda input_ids: GIB if bool((input_ids == 96).any()) else MIB)
        with room(200 * MIB):
            outputs = llm.generate(texts, GREEDY, use_tqdm=False)
        stats = llm.stats()
    failed = outputs.pop(2)
    assert tokens_of(outputs) == [greedy(p, 12) for i, p in enumerate(texts) if i != 2]
    assert failed.error is not None
    assert failed.error.code == "out_of_memory"
    assert stats.free_blocks == stats.num_blocks
