"""The mock model on a GPU, bit for bit: every way of running, step by step and by graphs; mutants are seen to fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from engine import test_same_tokens as on_cpu
from engine.support import greedy, mock_llm, prompts, tokens_of

from nanoengine import SamplingParams
from nanoengine.api.stats import EngineStats

from .support import ON_GPU

pytestmark = pytest.mark.gpu
COUNT = on_cpu.COUNT
Tokens = list[tuple[int, ...]]

# 40 requests over eight slots, so that they end and begin at different steps: few prefill rows beside decode rows.
CHURN: tuple[dict[str, Any], list[list[int]], on_cpu.Check] = (
    {"max_num_batched_tokens": 256, "max_num_seqs": 8},
    prompts(40, shortest=5, longest=40),
    lambda s: s.mixed_steps > 10,
)
WAYS = {**on_cpu.WAYS, "churn": CHURN}

MODES: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True},
    "eager, torch operations": {"enforce_eager": True, "fuse_kernels": False, "overlap": False},
    "graphs": {"lazy_graphs": False},
    "graphs, in turn": {"lazy_graphs": False, "overlap": False},
    "graphs, when they are wanted": {"lazy_graphs": True},
    "graphs, mixed steps eager": {"lazy_graphs": False, "graph_mixed_steps": False},
    "graphs, torch operations": {"lazy_graphs": False, "fuse_kernels": False},
}


def standard(count: int) -> list[SamplingParams]:
    """What the captured tail serves: a different recipe a request, and different lengths."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.3},
        {"temperature": 0.8, "top_k": 11},
        {"temperature": 1.5, "top_p": 0.7},
        {"temperature": 0},
        {"temperature": 2.0, "min_p": 0.02, "top_p": 0.9, "top_k": 40},
    ]
    return [SamplingParams(max_tokens=COUNT - i % 7, seed=i, **kinds[i % len(kinds)]) for i in range(count)]


def everything(count: int) -> list[SamplingParams]:
    """Penalties, biases, allowed tokens and plain draws beside each other, which end in the eager tail."""
    return on_cpu.seeded(count)


@cache
def expected(way: str) -> tuple[Tokens, Tokens]:
    """The answers to `standard` and to `everything`, by a CPU engine; greedy ones by no engine at all."""
    asked = WAYS[way][1]
    with TemporaryDirectory() as folder, mock_llm(Path(folder), device="cpu", overlap=False) as llm:
        answers = tuple(
            tokens_of(llm.generate(asked, params(len(asked)), use_tqdm=False)) for params in (standard, everything)
        )
    for i, (prompt, params) in enumerate(zip(asked, standard(len(asked)), strict=True)):
        if params.processor_fields.get("temperature") == 0:
            assert answers[0][i] == greedy(prompt, COUNT - i % 7)
    return answers  # type: ignore[return-value]


def run(folder: Path, way: str, **more: Any) -> tuple[Tokens, Tokens, EngineStats, EngineStats]:
    """Answers to `standard`, then to `everything` by the same engine with nothing cached, and the counts after each."""
    options, asked, _ = WAYS[way]
    with mock_llm(folder, **{**ON_GPU, **options, **more}) as llm:
        first = tokens_of(llm.generate(asked, standard(len(asked)), use_tqdm=False))
        stats = llm.stats()
        llm.reset_prefix_cache()
        second = tokens_of(llm.generate(asked, everything(len(asked)), use_tqdm=False))
        return first, second, stats, llm.stats()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_the_history(tmp_path: Path, way: str, mode: str) -> None:
    first, second, early, late = run(tmp_path, way, **MODES[mode])
    assert (first, second) == expected(way)
    assert WAYS[way][2](late), late
    assert late.free_blocks == late.num_blocks
    graphs, fused, mixed = mode.startswith("graphs"), "torch operations" not in mode, "mixed steps eager" not in mode
    assert (early.graph_steps > 0) == (late.graph_steps > early.graph_steps) == graphs, late
    assert (early.graph_tails > 0) == (graphs and fused), early
    if way == "churn":
        assert (early.mixed_graph_steps > 0) == (graphs and fused and mixed), early
    elif not (graphs and fused):
        assert late.mixed_graph_steps == late.graph_tails == 0, late


@pytest.mark.parametrize("blocks", [1024, 30])
@pytest.mark.parametrize("mode", ["eager", "graphs"])
def test_staggered_arrival_and_aborts_beside(tmp_path: Path, mode: str, blocks: int) -> None:
    asked, abort = prompts(14, shared=5, longest=20), [2, 5, 9]
    with mock_llm(tmp_path, **ON_GPU, **MODES[mode], num_gpu_blocks_override=blocks) as llm:
        done = on_cpu.run_staggered(llm, asked, 3, abort)
        stats = llm.stats()
    for i, prompt in enumerate(asked):
        whole = greedy(prompt, COUNT)
        assert done[str(i)] == (whole[: len(done[str(i)])] if i in abort else whole)
        assert (len(done[str(i)]) < COUNT) == (i in abort)
    assert (stats.preemptions > 0) == (blocks == 30)
    assert (stats.graph_steps > 0) == (stats.mixed_graph_steps > 0) == (mode == "graphs")
    assert stats.free_blocks == stats.num_blocks


# -- mutants: what only graphs can get wrong --------------------------------------------------------------------------

Patch = Callable[[pytest.MonkeyPatch], None]


def _buffer_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Harmless where each step reads what the buffers' owner holds; a graph reads what it was captured with."""
    from nanoengine.core.execution.step_inputs import StepBuffers

    original = StepBuffers.send

    def send(self: StepBuffers, *args: Any) -> Any:
        self.sent = self.sent.clone()
        return original(self, *args)

    monkeypatch.setattr(StepBuffers, "send", send)


def _drawn_from(graphs: Any, size: Any, logits: Any, tail: int | None) -> Any:
    """The tail, step by step, of logits that a mutant has changed."""
    if tail is not None:
        graphs.tail.run(graphs.gathered[size].rows, tail, logits)
    return logits


def _one_replay_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier replay of this size left is taken for this one's logits."""
    from nanoengine.core.execution.graphs import StepGraphs

    original = StepGraphs.replay

    def replay(self: StepGraphs, size: Any, tail: int | None = None) -> Any:
        left = self.logits[size].nan_to_num(0, 0, 0)
        return _drawn_from(self, size, original(self, size).copy_(left), tail)

    monkeypatch.setattr(StepGraphs, "replay", replay)


def _wrong_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoengine.core.execution.graphs import StepGraphs
    from nanoengine.kernels.sampling_triton import Tail

    original, plain = StepGraphs.replay, int(Tail.TEMPERATURE)
    monkeypatch.setattr(
        StepGraphs, "replay", lambda self, size, tail=None: original(self, size, None if tail is None else plain)
    )


def _rows_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    """In mixed steps each row gets the logits in front of it: the first prefill row those of padding."""
    from nanoengine.core.execution.graphs import StepGraphs

    original = StepGraphs.replay

    def replay(self: StepGraphs, size: Any, tail: int | None = None) -> Any:
        if not size.prefill_tokens:
            return original(self, size, tail)
        logits = original(self, size)
        return _drawn_from(self, size, logits.copy_(logits.roll(1, 0)), tail)

    monkeypatch.setattr(StepGraphs, "replay", replay)


@pytest.mark.parametrize("mutant", [_buffer_made_anew, _one_replay_late, _wrong_tail, _rows_shifted])
def test_mutants_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: Patch) -> None:
    """Every request still ends well, with other tokens: a mutant that merely crashes shows nothing. All graphs are
    captured at the start, as mutants would have others read memory that is not theirs any more."""

    def short(answers: Sequence[tuple[int, ...]]) -> list[int]:
        return [len(tokens) for tokens in answers]

    good = expected("churn")
    mutant(monkeypatch)
    first, second, _, _ = run(tmp_path, "churn", lazy_graphs=False)
    assert (short(first), short(second)) == (short(good[0]), short(good[1]))
    assert first != good[0]
