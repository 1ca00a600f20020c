"""All models through the engine against transformers, float32, every way of running; mutants must be caught."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoengine import RequestOutput, SamplingParams
from nanoengine.api.stats import EngineStats

from . import tiny
from .compare import Mismatch, Report, compare
from .conftest import Pair

COUNT = 24  # output tokens
GREEDY = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, logprobs=3)
WITH_PROMPT = GREEDY.replace(prompt_logprobs=2)

Happened = Callable[[EngineStats], bool]

# name -> (engine options, prompts, what must have happened)
WAYS: dict[str, tuple[dict[str, Any], list[list[int]], Happened]] = {
    "plain": ({}, tiny.prompts(8), lambda s: s.preemptions == 0 and s.prefix_hit_tokens == 0),
    "batch 1": ({"max_num_seqs": 1}, tiny.prompts(3), lambda s: s.steps > 3 * COUNT - 6),
    "batch 32": ({}, tiny.prompts(32, longest=20), lambda s: s.steps < 3 * COUNT),
    "no overlap": ({"overlap": False}, tiny.prompts(6), lambda s: s.steps > 0),
    "chunked": ({"max_num_batched_tokens": 16}, tiny.prompts(8, shortest=20, longest=60), lambda s: s.chunks > 8),
    "mixed": ({"max_num_batched_tokens": 24}, tiny.prompts(12, longest=50), lambda s: s.mixed_steps > 3),
    "cached": ({}, tiny.prompts(6, shared=21, longest=9) * 2, lambda s: s.prefix_hit_tokens >= 20 * 6),
    "preempted": (
        {"num_gpu_blocks_override": 26},
        tiny.prompts(8, shortest=6, longest=14),
        lambda s: s.preemptions > 2,
    ),
    "preempted, chunked, cached": (
        {"num_gpu_blocks_override": 26, "max_num_batched_tokens": 16},
        tiny.prompts(10, shared=22, longest=10),
        lambda s: s.preemptions > 0 and s.chunks > 0 and s.prefix_hit_tokens > 0,
    ),
    "one-token blocks": (
        {"block_size": 1, "num_gpu_blocks_override": 2048},
        tiny.prompts(4),
        lambda s: s.num_blocks == 2048,
    ),
    "auto-sized blocks": ({"block_size": None}, tiny.prompts(6), lambda s: s.num_blocks == 512),
}


def run(
    folder: Path, options: dict[str, Any], asked: Sequence[Sequence[int]], params: Any
) -> tuple[list[RequestOutput], EngineStats]:
    with tiny.llm(folder, **options) as llm:
        outputs = llm.generate(asked, params, use_tqdm=False)
        return outputs, llm.stats()


@pytest.mark.parametrize("kind", tiny.KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_greedy(pair: Callable[[str], Pair], kind: str, way: str) -> None:
    folder, model = pair(kind)
    options, asked, happened = WAYS[way]
    outputs, stats = run(folder, options, asked, GREEDY)
    report = compare(model, outputs, GREEDY)
    assert happened(stats), stats
    assert stats.free_blocks == stats.num_blocks
    assert report.positions == COUNT * len(asked)
    assert report.decided >= 0.97 * report.positions
    assert report.logprobs >= 3 * report.positions
    assert_outputs_vary(outputs)


def assert_outputs_vary(outputs: Sequence[RequestOutput]) -> None:
    """A model that says the same whatever it is asked would hide much."""
    answers = {o.prompt_token_ids: o.outputs[0].token_ids for o in outputs}
    assert len(set(answers.values())) == len(answers)
    assert len({t for answer in answers.values() for t in answer}) > 10


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_prompt_logprobs(pair: Callable[[str], Pair], kind: str) -> None:
    """In chunks, beside requests that ask for none, and although the prefix is in the cache by then."""
    folder, model = pair(kind)
    asked = tiny.prompts(8, shared=18, shortest=2, longest=20)
    params = [WITH_PROMPT if i % 3 else GREEDY for i in range(8)]
    with tiny.llm(folder, max_num_batched_tokens=16) as llm:
        llm.generate(asked[0], GREEDY, use_tqdm=False)
        outputs = llm.generate(asked, params, use_tqdm=False)
        stats = llm.stats()
    report = compare(model, outputs, params)
    assert report.prompt_logprobs >= 2 * sum(len(p) - 1 for i, p in enumerate(asked) if i % 3)
    assert stats.chunks > 8
    assert stats.mixed_steps > 0
    assert stats.prefix_hit_tokens > 0
    assert [o.num_cached_tokens > 0 for o in outputs] == [i % 3 == 0 for i in range(8)]


KINDS_OF_DRAW: list[dict[str, Any]] = [
    {"temperature": 1.3},
    {"temperature": 0.8, "top_k": 11},
    {"temperature": 1.5, "top_p": 0.7},
    {"temperature": 2.0, "min_p": 0.02, "presence_penalty": 0.7},
    {"temperature": 1.0, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"temperature": 0},
    {"temperature": 1.1, "logit_bias": {5: 4.0, 17: -3.0}},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
]


def seeded(count: int) -> list[SamplingParams]:
    """A different recipe a request, so that a row that reads its neighbour's column gives other tokens."""
    common = {"max_tokens": COUNT, "ignore_eos": True}
    return [SamplingParams(**common, seed=i, **KINDS_OF_DRAW[i % len(KINDS_OF_DRAW)]) for i in range(count)]


@pytest.mark.parametrize("kind", ["llama", "qwen3 tied"])
@pytest.mark.parametrize("way", WAYS)
def test_seeded(pair: Callable[[str], Pair], kind: str, way: str) -> None:
    """The very tokens that the pinned draw takes from transformers' logits."""
    folder, model = pair(kind)
    options, asked, happened = WAYS[way]
    outputs, stats = run(folder, options, asked, seeded(len(asked)))
    report = compare(model, outputs, seeded(len(asked)))
    assert happened(stats), stats
    assert report.positions == COUNT * len(asked)
    assert report.decided >= 0.95 * report.positions


def test_samples_of_one_request(pair: Callable[[str], Pair]) -> None:
    folder, model = pair("llama")
    params = SamplingParams(n=4, temperature=1.0, seed=9, max_tokens=COUNT, ignore_eos=True, logprobs=0)
    outputs, _ = run(folder, {}, tiny.prompts(3, shortest=9), params)
    report = compare(model, outputs, params)
    assert report.positions == 3 * 4 * COUNT
    assert all(len({s.token_ids for s in o.outputs}) == 4 for o in outputs)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("blocks", [512, 34])
def test_staggered_arrival_and_aborts_beside(pair: Callable[[str], Pair], overlap: bool, blocks: int) -> None:
    folder, model = pair("qwen3")
    asked, abort, every = tiny.prompts(12, shared=5, longest=20), [2, 5, 9], 3
    done: dict[str, RequestOutput] = {}
    with tiny.llm(folder, overlap=overlap, num_gpu_blocks_override=blocks) as llm:
        step = 0
        while step < every * len(asked) or llm.text_engine.has_unfinished_requests():
            number, rest = divmod(step, every)
            if rest == 0 and number < len(asked):
                llm.text_engine.add_request(str(number), asked[number], GREEDY)
            for i in abort:
                if step == i * every + 4:
                    llm.engine.abort_request(str(i))
            done |= {o.request_id: o for o in llm.text_engine.step() if o.finished}
            step += 1
        stats = llm.stats()
    report = compare(model, list(done.values()), GREEDY)
    assert {int(i) for i, o in done.items() if o.outputs[0].finish_reason == "abort"} == set(abort)
    assert report.positions > COUNT * (len(asked) - len(abort))
    assert stats.prefix_hit_tokens > 0
    assert (stats.preemptions > 0) == (blocks == 34)


# -- mutants: each breaks one thing in the engine, and the comparison must see it -------------------------------------

Patch = Callable[[pytest.MonkeyPatch], None]


def _rope(**changes: Any) -> Patch:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        from nanoengine.layers import decoder_config, rope_config
        from nanoengine.plugins.models import gemma3

        monkeypatch.setattr(decoder_config, "read_rope", lambda hf: replace(rope_config.read_rope(hf), **changes))
        monkeypatch.setattr(gemma3, "rope_of", lambda *args: replace(rope_config.rope_of(*args), **changes))

    return patch


def _mask(shift: int) -> Patch:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        from nanoengine.plugins.attention_backends.torch_paged import TorchPaged

        original = TorchPaged._mask
        monkeypatch.setattr(TorchPaged, "_mask", lambda self, ahead, *rest: original(self, ahead + shift, *rest))

    return patch


def _wrong_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second block of every row is read from the row's first one."""
    from nanoengine.plugins.attention_backends.torch_paged import TorchPaged

    original = TorchPaged.fill

    def fill(self: TorchPaged, inputs: Any) -> None:
        inputs.block_tables[:, 1] = inputs.block_tables[:, 0]
        original(self, inputs)

    monkeypatch.setattr(TorchPaged, "fill", fill)


def _no_qk_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoengine.layers.decoder import DecoderAttention

    original = DecoderAttention.__init__

    def init(self: DecoderAttention, *args: Any, **rest: Any) -> None:
        original(self, *args, **rest)
        self.qk_norm = False

    monkeypatch.setattr(DecoderAttention, "__init__", init)


def _rows_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoengine.core.execution.finish_step import FinishStep

    original = FinishStep._logits
    monkeypatch.setattr(FinishStep, "_logits", lambda self, step, which: original(self, step, which).roll(1, 0))


def _late_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only decode rows: prefill stays right."""
    from nanoengine.layers.rope import RotaryEmbedding

    original = RotaryEmbedding.forward

    def forward(self: RotaryEmbedding, positions: torch.Tensor) -> Any:
        return original(self, positions + 1 if len(positions) <= 8 else positions)

    monkeypatch.setattr(RotaryEmbedding, "forward", forward)


def _eps(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoengine.layers.norm import RMSNorm

    original = RMSNorm.__init__
    monkeypatch.setattr(RMSNorm, "__init__", lambda self, dim, eps, **rest: original(self, dim, 1e-6, **rest))


def _wrong_kv_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries take KV heads in turn instead of by groups."""
    from nanoengine.plugins.attention_backends.torch_paged import TorchPaged

    original = TorchPaged.forward

    def forward(self: TorchPaged, layer: int, spec: Any, q: torch.Tensor, k: Any, v: Any) -> torch.Tensor:
        order = torch.arange(spec.num_heads).view(-1, spec.num_kv_heads).t().flatten()
        return original(self, layer, spec, q[:, order].contiguous(), k, v)[:, order.argsort()]

    monkeypatch.setattr(TorchPaged, "forward", forward)


def _token_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first token of a prompt is taken for computed: its K and V are never written."""
    from nanoengine.core.execution.slots import SlotTables

    original = SlotTables._admit

    def admit(self: SlotTables, new: Any) -> None:
        original(self, replace(new, num_computed=new.num_computed + 1))

    monkeypatch.setattr(SlotTables, "_admit", admit)


def _stale_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoengine.core.execution.slots import FixedTable

    monkeypatch.setattr(FixedTable, "gather", lambda self, slots: self.values.index_select(0, slots).roll(1, 0))


def _config(**changes: Any) -> Patch:
    """The model is built with another trait than its config.json asks for."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        from nanoengine.layers import decoder

        original = decoder.DecoderLM.__init__
        monkeypatch.setattr(
            decoder.DecoderLM, "__init__", lambda self, config, ctx: original(self, replace(config, **changes), ctx)
        )

    return patch


def _window(shift: int) -> Patch:
    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        from nanoengine.layers import decoder

        original = decoder.DecoderAttention.__init__

        def init(self: Any, name: str, config: Any, ctx: Any, window: int | None, **rest: Any) -> None:
            original(self, name, config, ctx, None if window is None else window + shift, **rest)

        monkeypatch.setattr(decoder.DecoderAttention, "__init__", init)

    return patch


def _bias_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoengine.layers.linear import Unquantised

    original = Unquantised.apply_normed
    monkeypatch.setattr(
        Unquantised,
        "apply_normed",
        lambda self, layer, norm, x, residual, bias, gate: original(self, layer, norm, x, residual, None, gate),
    )


def _no_post_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoengine.layers import mlp

    original = mlp.finished
    monkeypatch.setattr(mlp, "finished", lambda layer, x, residual, after: original(layer, x, residual, None))


def _ones_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    from nanoengine.api import WeightLayer
    from nanoengine.layers.norm import RMSNorm

    monkeypatch.setattr(RMSNorm, "load_shard", WeightLayer.load_shard)


def _gelu_without_tanh(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact GELU, which differs by 5e-4 at the most."""
    from torch.nn import functional

    from nanoengine.kernels.ops import CpuOps, Ops

    original = functional.gelu
    monkeypatch.setattr(CpuOps, "act_and_mul", Ops.act_and_mul)
    monkeypatch.setattr(functional, "gelu", lambda x, approximate: original(x))


def _group_of_the_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    """A KV group's layers attend within the window of the other group."""
    from nanoengine.setup.start.build_model import kv_groups

    def swapped(layers: Any) -> Any:
        groups = kv_groups(layers)
        return tuple((groups[1 - i][0], layers) for i, (_, layers) in enumerate(groups))

    monkeypatch.setattr("nanoengine.setup.start.starter.kv_groups", swapped)


MUTANTS: dict[str, tuple[str, Patch]] = {
    "rope theta ignored": ("llama", _rope(theta=10000.0)),
    "rope scaling ignored": ("llama3 tied", _rope(kind="default")),
    "mask lets the future in": ("llama", _mask(-1)),
    "mask hides the token itself": ("qwen3", _mask(1)),
    "wrong block": ("llama", _wrong_block),
    "no qk norm": ("qwen3", _no_qk_norm),
    "rows shifted": ("llama", _rows_shifted),
    "decode one position late": ("llama", _late_positions),
    "eps ignored": ("llama", _eps),
    "wrong KV head": ("qwen3", _wrong_kv_head),
    "first token not computed": ("llama", _token_passed_over),
    "no bias": ("qwen2", _bias_forgotten),
    "a window where there is none": ("qwen2 tied, a window in the last layer", _config(windows=(6, 6, 6))),
    "no window": ("mistral", _config(windows=())),
    "window one short": ("mistral", _window(-1)),
    "window one long": ("mistral", _window(1)),
    "the other group's window": ("gemma3", _group_of_the_neighbour),
    "local window one long": ("gemma3", _window(1)),
    "local layers rotate as global ones": ("gemma3", _config(local_rope=None)),
    "global rope not scaled": ("gemma3", _rope(kind="default")),
    "scores scaled by head size": ("gemma3", _config(score_scale=None)),
    "embedding not scaled": ("gemma3", _config(embedding_scale=1.0)),
    "norm weights without their one": ("gemma3", _ones_forgotten),
    "no norm behind the MLP": ("gemma2", _no_post_norm),
    "scores not capped": ("gemma2", _config(score_cap=None)),
    "logits not capped": ("gemma2", _config(logit_cap=None)),
    "gate is SiLU": ("gemma2", _config(activation="silu")),
    "gate is the exact GELU": ("gemma3", _gelu_without_tanh),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    kind, patch = MUTANTS[mutant]
    folder, model = pair(kind)
    patch(monkeypatch)
    outputs, _ = run(folder, {}, tiny.prompts(6, shortest=5), GREEDY)
    assert all(output.error is None for output in outputs)  # it answers, and wrongly
    with pytest.raises(Mismatch):
        compare(model, outputs, GREEDY)


def test_a_temperature_of_another_row_is_caught(pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, model = pair("llama")
    _stale_temperature(monkeypatch)
    outputs, _ = run(folder, {}, tiny.prompts(8, shortest=5), seeded(8))
    with pytest.raises(Mismatch):
        compare(model, outputs, seeded(8))


def test_prompt_logprobs_of_the_neighbour_are_caught(pair: Callable[[str], Pair]) -> None:
    folder, model = pair("qwen3")
    outputs, _ = run(folder, {}, tiny.prompts(2, shortest=5), WITH_PROMPT)
    compare(model, outputs, WITH_PROMPT)
    first = outputs[0]
    assert first.prompt_logprobs is not None
    moved = replace(first, prompt_logprobs=(None, *first.prompt_logprobs[2:], first.prompt_logprobs[1]))
    with pytest.raises(Mismatch):
        compare(model, [moved], WITH_PROMPT)


def test_report_counts_what_was_compared(pair: Callable[[str], Pair]) -> None:
    folder, model = pair("llama")
    outputs, _ = run(folder, {}, tiny.prompts(1, shortest=5), WITH_PROMPT)
    report = compare(model, outputs, WITH_PROMPT, Report())
    assert (report.positions, report.prompt_logprobs >= 8) == (COUNT, True)
    assert 0 < report.worst < 1e-4
