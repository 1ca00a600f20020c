"""Python functions of the user's that change logits: what they get, and that nothing else changes."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanoengine import LLM, ParamsError, SamplingParams
from nanoengine.plugins.samplers.function_state import FunctionParams, running
from nanoengine.testing.mock_model import reference_logits

from . import replay_drafter
from .support import VOCAB, greedy, mock_llm, prompts, tokens_of
from .test_drafts import with_drafts
from .test_same_tokens import WAYS

COUNT = 12
GREEDY = SamplingParams(temperature=0, max_tokens=COUNT)


def shifted(ids: Sequence[int], logits: Tensor) -> Tensor:
    """All that it is given decides."""
    return logits.roll(1 + sum(ids) % 7 + len(ids))


def expected(prompt: Sequence[int], count: int = COUNT) -> tuple[int, ...]:
    output: list[int] = []
    for _ in range(count):
        output.append(int(shifted(output, reference_logits([*prompt, *output], VOCAB)).argmax()))
    return tuple(output)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    with mock_llm(tmp_path_factory.mktemp("functions")) as made:
        yield made


@pytest.mark.parametrize("name", ["plain", "no overlap", "chunked", "preempted", "cached"])
def test_a_function_gets_each_token_in_time(tmp_path: Path, name: str) -> None:
    options, asked, happened = WAYS[name]
    params = [GREEDY.replace(logits_processors=[shifted], max_tokens=24), GREEDY.replace(max_tokens=24)]
    with mock_llm(tmp_path, **options) as llm:
        found = tokens_of(llm.generate(asked, [params[i % 4 == 3] for i in range(len(asked))], use_tqdm=False))
        assert happened(llm.stats()), llm.stats()
    assert found == [greedy(p, 24) if i % 4 == 3 else expected(p, 24) for i, p in enumerate(asked)]


@pytest.mark.parametrize("accuracy", [0.5, 1.0])
def test_a_function_sees_the_drafts_before_a_draw(tmp_path: Path, accuracy: float) -> None:
    asked = prompts(4)
    want = [expected(prompt) for prompt in asked]
    with mock_llm(tmp_path) as llm:
        oracle = with_drafts(llm, asked, want, tokens=4, accuracy=accuracy)
        assert tokens_of(llm.generate(asked, GREEDY.replace(logits_processors=[shifted]), use_tqdm=False)) == want
    assert oracle.accepted > 0


def test_functions_run_in_their_order_and_may_take_the_prompt(llm: LLM) -> None:
    calls: list[tuple[list[int], list[int]]] = []

    def watch(prompt: list[int], output: list[int], logits: Tensor) -> Tensor:
        calls.append((prompt, output))
        assert logits.shape == (VOCAB,)
        assert logits.dtype == torch.float32
        return logits.fill_(0.0)  # in place

    class Chooses:
        """A callable object, which is not copied."""

        def __init__(self) -> None:
            self.calls = 0

        def __call__(self, output: list[int], logits: Tensor, step: int = 1) -> Tensor:
            assert not logits.any()
            self.calls += step  # its own argument: one that has a default is not given
            logits[10 + len(output)] = 1.0
            return logits

    chooses = Chooses()
    params = GREEDY.replace(logits_processors=[watch, chooses], max_tokens=4)
    assert tokens_of(llm.generate([[1, 2]], params, use_tqdm=False)) == [(10, 11, 12, 13)]
    assert calls == [([1, 2], list(range(10, 10 + n))) for n in range(4)]
    assert chooses.calls == 4


def test_a_batched_function_is_called_once_a_step(llm: LLM) -> None:
    calls: list[tuple[list[list[int]], list[list[int]]]] = []

    def mean(prompts: list[list[int]], outputs: list[list[int]], logits: Tensor) -> Tensor:
        calls.append((prompts, outputs))
        return logits.mean(0, keepdim=True).expand_as(logits)

    asked = [[1, 2, 3], [4, 5], [7]]
    params = GREEDY.replace(batch_logits_processor=mean, max_tokens=5)
    a, b, plain = tokens_of(llm.generate(asked, [params, params, GREEDY], use_tqdm=False))
    output: list[int] = []
    for _ in range(5):
        both = torch.stack([reference_logits([*prompt, *output], VOCAB) for prompt in asked[:2]])
        output.append(int(both.mean(0).argmax()))
    assert a == b == tuple(output)
    assert plain == greedy([7], COUNT)
    assert [len(prompts) for prompts, _ in calls] == [2] * 5
    assert sorted(calls[3][0]) == [[1, 2, 3], [4, 5]]
    assert calls[3][1] == [output[:3]] * 2


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda ids, logits: logits[:-1], r"must return logits, floats of shape \(97,\), not torch.float32 \(96,\)"),
        (lambda ids, logits: None, r"must return logits, floats of shape \(97,\), not NoneType"),
        (lambda ids, logits: logits > 3, r"not torch.bool \(97,\)"),  # a mask is no logits
        (
            lambda ids, logits: 1 / 0,
            r"ZeroDivisionError: division by zero \(in <lambda>\(\)\) \(.*functions\.py, line \d+",
        ),
        (lambda logits: logits, "TypeError"),
    ],
)
def test_a_function_that_fails_ends_its_request_alone(llm: LLM, function: Any, said: str) -> None:
    params = [GREEDY, GREEDY.replace(logits_processors=[function])]
    fine, failed = llm.generate([[1], [2]], params, use_tqdm=False)
    assert tokens_of([fine]) == [greedy([1], COUNT)]
    assert failed.error is not None
    assert failed.error.code == "step_failed"
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(str(failed.error))


def test_a_batched_function_that_returns_a_wrong_form_fails_all_its_requests(llm: LLM) -> None:
    """Each is retried alone, where what it returns would have the right form."""

    def first(prompts: list[list[int]], outputs: list[list[int]], logits: Tensor) -> Tensor:
        return logits[:1]

    params = GREEDY.replace(batch_logits_processor=first)
    one, two, plain = llm.generate([[1], [2], [7]], [params, params, GREEDY], use_tqdm=False)
    assert tokens_of([plain]) == [greedy([7], COUNT)]
    for failed in (one, two):
        assert failed.error is not None
        assert "(2, 97), not torch.float32 (1, 97)" in str(failed.error)


def test_states_go_with_their_requests(llm: LLM) -> None:
    llm.generate([[1], [2]], GREEDY.replace(logits_processors=[shifted], n=2), use_tqdm=False)
    gc.collect()
    assert not running().states


@pytest.mark.parametrize("value", [3, [3], "f", [["f"]], {"f": print}])
def test_what_is_no_function_is_refused(llm: LLM, value: Any) -> None:
    with pytest.raises(ParamsError, match="logits_processors must be a list of functions"):
        llm.generate([[1]], SamplingParams(logits_processors=value), use_tqdm=False)


def test_several_ranks_refuse_functions() -> None:
    class Ranks:
        in_process = False

    ctx: Any = Ranks()
    for params in (FunctionParams(logits_processors=[shifted]), FunctionParams(batch_logits_processor=shifted)):
        with pytest.raises(ParamsError, match="functions of this process, and with several ranks"):
            params.pack(ctx)


def test_what_a_step_calls_cannot_run_the_engine_and_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function would wait for the step that waits for it, and a drafter's call would find half an update."""
    asked, drafted = prompts(3), GREEDY.replace(speculate=True)

    def asks_again(ids: Sequence[int], logits: Tensor) -> Tensor:
        llm.generate([[1]], GREEDY, use_tqdm=False)
        return logits

    def counts(ids: Sequence[int], logits: Tensor) -> Tensor:
        assert llm.stats().running
        return shifted(ids, logits)

    def draft(self: Any, most: int) -> list[int]:
        llm.generate([[1]], GREEDY, use_tqdm=False)
        return []

    monkeypatch.setattr(replay_drafter.ReplayState, "draft", draft)
    plain = GREEDY.replace(speculate=False)
    with mock_llm(tmp_path, plugins=[replay_drafter], speculation="replay") as llm:
        each = [plain.replace(logits_processors=[asks_again]), plain.replace(logits_processors=[counts]), drafted]
        one, two, three = llm.generate(asked, each, use_tqdm=False)
        assert tokens_of(llm.generate(asked, plain, use_tqdm=False)) == [greedy(p, COUNT) for p in asked]
    assert tokens_of([two]) == [expected(asked[1])]
    assert ["cannot run the engine" in str(failed.error) for failed in (one, three)] == [True, True]
