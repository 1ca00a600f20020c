"""The float32 class on a GPU: real models against transformers, every way of running, on each backend that has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from parity import test_tiny_models as on_cpu
from parity import tiny
from parity.compare import Mismatch, compare

from nanoengine import SamplingParams

from .float32 import WAYS, Pair, greedy, pairs, true_float32  # noqa: F401 - a fixture for all tests here
from .support import ON_GPU, assert_graphs, need

pytestmark = pytest.mark.gpu
KINDS = ["llama3 tied", "qwen3"]
GREEDY = on_cpu.GREEDY


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    return pairs(tiny.write, tmp_path_factory)


@pytest.mark.parametrize("mode", ["torch", "triton eager", "triton"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_greedy(pair: Callable[[str], Pair], way: str, kind: str, mode: str) -> None:
    on_cpu.assert_outputs_vary(greedy(pair(kind), way, mode, overlap=kind == "qwen3"))


@pytest.mark.parametrize("mode", ["torch", "triton"])
@pytest.mark.parametrize("kind", KINDS)
def test_seeded_by_the_captured_tail(pair: Callable[[str], Pair], kind: str, mode: str) -> None:
    """The very tokens that the pinned draw takes from transformers' logits; no row asks more than the tail has."""
    folder, model = pair(kind)
    asked = tiny.prompts(30, shortest=5, longest=40)
    fits = [p for p in on_cpu.seeded(8) if p.processor_fields.keys() <= {"temperature", "top_k", "top_p", "min_p"}]
    params = [fits[i % len(fits)].replace(seed=i) for i in range(len(asked))]
    outputs, stats = on_cpu.run(folder, {**ON_GPU, **need(mode), "dtype": "float32"}, asked, params)
    report = compare(model, outputs, params)
    assert report.positions == on_cpu.COUNT * len(asked)
    assert report.decided >= 0.95 * report.positions
    assert (stats.graph_tails > 0) == (mode == "triton"), stats


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_seeded_with_everything(pair: Callable[[str], Pair], mode: str) -> None:
    folder, model = pair("qwen3")
    asked, params = tiny.prompts(16, longest=40), on_cpu.seeded(16)
    outputs, stats = on_cpu.run(folder, {**ON_GPU, **need(mode), "dtype": "float32"}, asked, params)
    report = compare(model, outputs, params)
    assert report.positions == on_cpu.COUNT * len(asked)
    assert report.decided >= 0.95 * report.positions
    assert_graphs(stats, mode)


@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_prompt_logprobs(pair: Callable[[str], Pair], mode: str) -> None:
    """In chunks, beside requests that ask for none."""
    folder, model = pair("llama3 tied")
    asked = tiny.prompts(8, shared=18, shortest=2, longest=20)
    params = [on_cpu.WITH_PROMPT if i % 3 else GREEDY for i in range(8)]
    options = {**ON_GPU, **need(mode), "dtype": "float32", "max_num_batched_tokens": 16}
    outputs, stats = on_cpu.run(folder, options, asked, params)
    report = compare(model, outputs, params)
    assert report.prompt_logprobs >= 2 * sum(len(p) - 1 for i, p in enumerate(asked) if i % 3)
    assert stats.chunks > 8
    assert_graphs(stats, mode)


def test_tails_after_penalties(pair: Callable[[str], Pair]) -> None:
    """Counts over the vocabulary, once made, do not keep other requests from the captured tail."""
    folder, model = pair("qwen3")
    asked = tiny.prompts(6, shortest=5, longest=40)
    penalised = SamplingParams(max_tokens=on_cpu.COUNT, ignore_eos=True, repetition_penalty=1.3, temperature=0)
    plain = penalised.replace(repetition_penalty=1.0)
    with tiny.llm(folder, **{**ON_GPU, **need("triton"), "dtype": "float32", "max_num_seqs": 4}) as llm:
        tails = []
        for params in (penalised, plain, penalised):
            before = llm.stats().graph_tails
            assert compare(model, llm.generate(asked, params, use_tqdm=False), params).positions > 0
            tails.append(llm.stats().graph_tails - before)
    assert tails[0] == tails[2] == 0
    assert tails[1] > 10


def _one_key_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode rows alone: a prompt's first token would be left without any key."""
    from nanoengine.plugins.attention_backends.triton_paged import TritonPaged

    original = TritonPaged.attend

    def attend(self: TritonPaged, layer: int, spec: Any, q: torch.Tensor) -> torch.Tensor:
        inputs = self._inputs
        assert inputs is not None
        lens, decode = inputs.seq_lens, inputs.num_decode_rows
        self._inputs = replace(inputs, seq_lens=torch.cat(((lens[:decode] - 1).clamp(min=1), lens[decode:])))
        out = original(self, layer, spec, q)
        self._inputs = inputs
        return out

    monkeypatch.setattr(TritonPaged, "attend", attend)


def _tf32(_: pytest.MonkeyPatch) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True  # `true_float32` restores it: monkeypatch would delete the attribute


@pytest.mark.parametrize("mutant", [_one_key_short, _tf32])
@pytest.mark.parametrize("mode", ["triton eager", "triton"])
def test_mutants_are_caught(
    pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch, mode: str, mutant: Callable[..., None]
) -> None:
    folder, model = pair("qwen3")
    mutant(monkeypatch)
    options = {**ON_GPU, **need(mode), "dtype": "float32"}
    outputs, _ = on_cpu.run(folder, options, tiny.prompts(12, shortest=5), GREEDY)
    assert all(output.error is None for output in outputs)  # it answers, and wrongly
    with pytest.raises(Mismatch):
        compare(model, outputs, GREEDY)
