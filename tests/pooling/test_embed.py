"""`LLM.embed` and `LLM.score` against transformers and against the mock model's formula, in every way of running."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from engine import chain_plugin
from parity import tiny
from transformers import PreTrainedModel

from nanoengine import LLM, EmbeddingOutput, ParamsError, RequestError, SamplingParams
from nanoengine.api.stats import EngineStats
from nanoengine.core.execution import finish_step, runner
from nanoengine.core.request import Request
from nanoengine.core.scheduling import commit
from nanoengine.params.pooling import PoolingChoice

Pooling = Literal["mean", "last"]
POOLINGS: tuple[Pooling, ...] = ("mean", "last")
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
KIND = "qwen3 tied"

Happened = Callable[[EngineStats], bool]
LONG = tiny.prompts(10, shortest=20, longest=60)
SHARED = tiny.prompts(8, shared=22, longest=10)
# name -> engine options, prompts, what must have happened
WAYS: dict[str, tuple[dict[str, Any], list[list[int]], Happened]] = {
    "whole": ({}, LONG, lambda s: s.chunks == 0),
    "one by one": ({"max_num_seqs": 1, "overlap": False}, LONG[:3], lambda s: s.steps >= 3),
    "chunked": ({"max_num_batched_tokens": 16}, LONG, lambda s: s.chunks > 10),
    "preempted, chunked": (
        {"num_gpu_blocks_override": 26, "max_num_batched_tokens": 16},
        LONG,
        lambda s: s.preemptions > 0 and s.chunks > 10,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(KIND, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return tiny.reference(folder)


def expected(model: PreTrainedModel, prompt: Sequence[int], pooling: Pooling) -> torch.Tensor:
    """Of transformers' hidden states after the last norm."""
    with torch.no_grad():
        hidden = model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0]
    return hidden.mean(0) if pooling == "mean" else hidden[-1]


def worst(model: PreTrainedModel, outputs: Sequence[EmbeddingOutput], pooling: Pooling) -> float:
    """The largest difference of any value from transformers', relative to the largest value."""
    found = []
    for output in outputs:
        assert output.error is None
        assert output.embedding is not None
        assert output.embedding.dtype == np.float32
        want = expected(model, output.prompt_token_ids, pooling)
        found.append(float((torch.tensor(output.embedding) - want).abs().max() / want.abs().max()))
    return max(found)


@pytest.mark.parametrize("way", WAYS)
def test_vectors_are_those_of_transformers(way: str, folder: Path, model: PreTrainedModel) -> None:
    options, prompts, happened = WAYS[way]
    with tiny.llm(folder, **options) as llm:
        for pooling in POOLINGS:
            outputs = embed_beside_others(llm, prompts, pooling) if "preempted" in way else plain(llm, prompts, pooling)
            assert [list(output.prompt_token_ids) for output in outputs] == prompts
            assert worst(model, outputs, pooling) < 1e-5
        stats = llm.stats()
        assert happened(stats), stats
        assert stats.free_blocks == stats.num_blocks


def plain(llm: LLM, prompts: Any, pooling: Pooling) -> list[EmbeddingOutput]:
    return llm.embed(prompts, pooling, normalize=False, use_tqdm=False)


def embed_beside_others(
    llm: LLM, prompts: Sequence[Sequence[int]], pooling: Pooling, params: SamplingParams = GREEDY
) -> list[EmbeddingOutput]:
    """While as many prompts generate: their tokens are those that they have without company."""
    alone = [output.outputs[0].token_ids for output in llm.generate(list(prompts), params, use_tqdm=False)]
    found: dict[str, tuple[int, ...]] = {}
    for i, prompt in enumerate(prompts):
        llm.text_engine.add_request(
            f"text {i}", prompt, params, final_only=True,
            sink=lambda output: found.update({output.request_id: output.outputs[0].token_ids}),
        )  # fmt: skip
    outputs = plain(llm, prompts, pooling)
    while llm.engine.has_unfinished_requests():
        llm.engine.step()
    assert [found[f"text {i}"] for i in range(len(prompts))] == alone
    return outputs


def test_beside_requests_that_generate(folder: Path, model: PreTrainedModel) -> None:
    with tiny.llm(folder, max_num_batched_tokens=24) as llm:
        for pooling in POOLINGS:
            assert worst(model, embed_beside_others(llm, LONG, pooling), pooling) < 1e-5
        assert llm.stats().mixed_steps > 3


def test_in_steps_that_wait_for_columns(folder: Path, model: PreTrainedModel) -> None:
    """A grammar's, say: their forward pass is launched long before their draws."""
    with tiny.llm(folder, max_num_batched_tokens=24, plugins=[chain_plugin.__file__]) as llm:
        steps, schedule = [], llm.engine.scheduler.schedule
        llm.engine.scheduler.schedule = lambda: steps.append(schedule()) or steps[-1]  # type: ignore
        for pooling in POOLINGS:
            outputs = embed_beside_others(llm, LONG, pooling, GREEDY.replace(chain=3))
            assert worst(model, outputs, pooling) < 1e-5
        assert sum(step is not None and step.plan.late and len(step.plan.pooled) > 0 for step in steps) > 3


def test_from_the_prefix_cache(folder: Path, model: PreTrainedModel) -> None:
    """The last token's vector may use what others computed, a mean may not; both can be used by others."""
    with tiny.llm(folder) as llm:
        for pooling, cached in (("mean", False), ("last", True), ("mean", False)):
            outputs = plain(llm, SHARED, pooling)  # type: ignore[arg-type]
            assert worst(model, outputs, pooling) < 1e-5  # type: ignore[arg-type]
            assert [output.num_cached_tokens >= 20 for output in outputs] == [cached] * len(SHARED)
        [output] = llm.generate([SHARED[0]], GREEDY, use_tqdm=False)
        assert output.num_cached_tokens >= 20


def mean_of_the_last_chunk(patch: pytest.MonkeyPatch) -> None:
    pool = commit._pool
    patch.setattr(commit, "_pool", lambda request, row, *rest: pool(request, row._replace(start=0), *rest))


def last_token_of_the_step(patch: pytest.MonkeyPatch) -> None:
    """As if rows were padded to the longest one."""
    sums = finish_step.span_sums

    def broken(hidden: torch.Tensor, last: torch.Tensor, spans: Sequence[tuple[int, int]]) -> torch.Tensor:
        end = len(hidden) - 1
        return sums(hidden, torch.full_like(last, end), [(end, end) for _ in spans])

    patch.setattr(finish_step, "span_sums", broken)


def mean_from_the_cache(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Request, "may_read_cache", property(lambda request: True))


def hidden_states_before_the_norm(patch: pytest.MonkeyPatch) -> None:
    pool = runner.pool
    patch.setattr(runner, "pool", lambda plan, hidden: pool(plan, hidden * 1.01))


MUTANTS: list[tuple[Callable[[pytest.MonkeyPatch], None], Pooling]] = [
    (mean_of_the_last_chunk, "mean"),
    (last_token_of_the_step, "last"),
    (mean_from_the_cache, "mean"),
    (hidden_states_before_the_norm, "mean"),
]


@pytest.mark.parametrize(("mutant", "pooling"), MUTANTS, ids=lambda value: getattr(value, "__name__", value))
def test_mutants_are_caught(
    mutant: Any, pooling: Pooling, folder: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)
    with tiny.llm(folder, max_num_batched_tokens=32) as llm:
        outputs = [*plain(llm, LONG, pooling), *plain(llm, SHARED, pooling), *plain(llm, SHARED, pooling)]
    assert worst(model, outputs, pooling) > 1e-3


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with tiny.llm(folder) as llm:
        yield llm


def test_by_default_vectors_have_length_1_and_are_of_the_last_token(llm: LLM, model: PreTrainedModel) -> None:
    outputs = llm.embed(LONG, use_tqdm=False)
    for output, bare in zip(outputs, plain(llm, LONG, "last"), strict=True):
        assert output.embedding is not None
        assert bare.embedding is not None
        assert np.linalg.norm(output.embedding) == pytest.approx(1, abs=1e-6)
        assert np.allclose(output.embedding, bare.embedding / np.linalg.norm(bare.embedding), atol=1e-6)
        assert not output.embedding.flags.writeable
    assert plain(llm, LONG[0], "last")[0].prompt_token_ids == tuple(LONG[0])  # one prompt: a list of one output


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_prompt_may_be_as_long_as_max_model_len(llm: LLM, model: PreTrainedModel, pooling: Pooling) -> None:
    longest = [(7 * i) % 100 for i in range(128)]
    fine, wrong = plain(llm, [longest, [*longest, 1]], pooling)
    assert worst(model, [fine], pooling) < 1e-5
    assert wrong.embedding is None
    assert wrong.error is not None
    assert wrong.error.code == "too_long"
    assert "129 tokens and max_model_len is 128: shorten the prompt to 128 tokens" in str(wrong.error)
    [drawn] = llm.generate([longest], GREEDY, use_tqdm=False)
    assert drawn.error is not None
    assert "must leave room for one new token: shorten the prompt to 127" in str(drawn.error)


def test_a_prompt_that_cannot_be_run_has_an_error_in_its_place(llm: LLM) -> None:
    outputs = llm.embed([[1, 2], [], [10_000], [3]], use_tqdm=False)
    assert [output.error and output.error.code for output in outputs] == [
        None,
        "invalid_prompt",
        "invalid_prompt",
        None,
    ]
    assert [output.embedding is None for output in outputs] == [False, True, True, False]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pooling": "cls"}, "pooling must be 'mean' or 'last', not 'cls'"),
        ({"normalize": 1}, "normalize must be True or False"),
        ({"dimensions": 4}, "dimensions is 4, and this model's embeddings have"),
        ({"priority": "high"}, "priority must be a whole number"),
    ],
)
def test_wrong_parameters_are_raised_before_anything_runs(llm: LLM, options: Any, said: str) -> None:
    before = llm.stats().steps
    with pytest.raises(ParamsError, match=said):
        llm.embed([[1, 2]], use_tqdm=False, **options)
    assert llm.stats().steps == before


def test_generated_tokens_have_no_meaning(llm: LLM) -> None:
    with pytest.raises(ParamsError, match="generated_token_ids have no meaning"):
        llm.embed({"prompt_token_ids": [1, 2], "generated_token_ids": [3]}, use_tqdm=False)


def test_the_engine_takes_no_sampling_parameters_for_it(llm: LLM) -> None:
    for given in ({"params": SamplingParams(temperature=0)}, {"params": SamplingParams(), "generated": [3]}):
        with pytest.raises(ParamsError, match="takes cache_salt and priority only, not"):
            llm.engine.add_request("one", [1, 2], pooling="mean", **given)  # type: ignore[arg-type]
    with pytest.raises(ParamsError, match="pooling must be 'mean' or 'last', not 'cls'"):
        llm.engine.add_request("one", [1, 2], SamplingParams(), pooling="cls")  # type: ignore[arg-type]


def test_a_delta_with_a_vector_is_the_only_one(llm: LLM) -> None:
    llm.engine.add_request("one", LONG[0], SamplingParams(cache_salt="own"), pooling="mean")
    deltas = []
    while llm.engine.has_unfinished_requests():
        deltas += llm.engine.step()
    [delta] = deltas
    assert delta.finished
    assert delta.pooled is not None
    assert not any(sample.token_ids for sample in delta.samples)


def test_an_aborted_one_has_no_vector(llm: LLM) -> None:
    found: list[EmbeddingOutput] = []
    llm.text_engine.add_embedding("one", LONG[0], PoolingChoice("mean"), sink=found.append)
    llm.engine.abort_request("one")
    while llm.engine.has_unfinished_requests():
        llm.engine.step()
    assert [(output.embedding, output.error) for output in found] == [(None, None)]


def test_scores_are_cosines(llm: LLM, model: PreTrainedModel) -> None:
    for pooling in POOLINGS:
        vectors = [expected(model, prompt, pooling) for prompt in LONG[:4]]
        one = llm.score(LONG[0], LONG[1:4], pooling, use_tqdm=False)
        each = llm.score(LONG[:2], LONG[2:4], pooling, use_tqdm=False)
        want = [(0, 1), (0, 2), (0, 3), (0, 2), (1, 3)]
        for output, (a, b) in zip(one + each, want, strict=True):
            assert output.error is None
            assert output.prompt_token_ids == (tuple(LONG[a]), tuple(LONG[b]))
            assert output.score == pytest.approx(float(torch.cosine_similarity(vectors[a], vectors[b], 0)), abs=1e-5)


def test_on_error_raise_raises_the_error_of_the_prompt(llm: LLM) -> None:
    for call in (lambda: llm.embed([[1], []], on_error="raise"), lambda: llm.score([1], [[2], []], on_error="raise")):
        with pytest.raises(RequestError, match="the prompt is empty"):
            call()
    assert not llm.text_engine.has_unfinished_requests()
    with pytest.raises(ParamsError, match="on_error must be"):
        llm.embed([[1]], on_error="stop")  # type: ignore[arg-type]
    assert "embedding=<array (" in repr(llm.embed([[1]], use_tqdm=False)[0])


def test_a_pair_with_a_wrong_prompt_has_its_error(llm: LLM) -> None:
    fine, wrong = llm.score([1, 2], [[3], [10_000]], use_tqdm=False)
    assert fine.score is not None
    assert wrong.score is None
    assert wrong.error is not None
    with pytest.raises(ParamsError, match="first has 2 entries and second has 3"):
        llm.score([[1], [2]], [[1], [2], [3]], use_tqdm=False)


def test_vectors_that_are_not_finite_fail_their_requests_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = runner.pool

    def broken(plan: Any, hidden: torch.Tensor) -> torch.Tensor:
        sums = pool(plan, hidden)
        sums[plan.query_lens[plan.pooled > 0] == 5] = float("inf")
        return sums

    monkeypatch.setattr(runner, "pool", broken)
    with tiny.llm(folder) as llm:
        outputs = plain(llm, [[1, 2, 3], [1, 2, 3, 4, 5], [4, 5]], "mean")
        assert [output.error and output.error.code for output in outputs] == [None, "bad_logits", None]
