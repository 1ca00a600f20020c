"""One request harms no other, whatever its values are and whatever the engine's own code raises over it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoengine import LLM, RequestOutput, SamplingParams
from nanoengine.api.errors import (
    ConfigError,
    EngineClosed,
    ParamsError,
    RequestError,
    WorkerError,
)
from nanoengine.core import outputs as output
from nanoengine.core.execution.executor import InProcessExecutor
from nanoengine.core.execution.slots import SlotLimits, SlotTables
from nanoengine.core.scheduling import scheduler
from nanoengine.core.scheduling.block_manager import BlockManager
from nanoengine.core.scheduling.draft import Draft
from nanoengine.core.scheduling.scheduler import Scheduler
from nanoengine.core.step import StepPlan
from nanoengine.testing.invariants import check_scheduler
from nanoengine.testing.mock_model import MockAttention, MockModel
from nanoengine.text import IncrementalDetokenizer

from .pair_text import text_llm
from .support import greedy, mock_llm, tokens_of

GREEDY = SamplingParams(temperature=0, max_tokens=12)
BAD = [9, 9, 9, 9, 9]  # the prompt over which something raises
GOOD = {"a": [1, 2, 3], "b": [7] * 11, "c": [5, 6]}
PanicException = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})


class Wordless(Exception):
    def __str__(self) -> str:
        raise SystemExit


class NoText:
    def __repr__(self) -> str:
        raise ValueError("no words")


RAISED = [
    (ValueError, "x"),
    (RuntimeError, NoText()),
    (SystemExit, 1),
    (PanicException, "out of bounds"),
    (Wordless,),
    (OverflowError, "int"),
]


@pytest.fixture(params=RAISED, ids=lambda made: made[0].__name__)
def error(request: pytest.FixtureRequest) -> BaseException:
    kind, *args = request.param
    raised: BaseException = kind(*args)
    return raised


def run(llm: LLM) -> None:
    while llm.text_engine.has_unfinished_requests():
        llm.engine.advance()


def beside(llm: LLM, params: SamplingParams, prompt: Any = None) -> RequestOutput:
    """Requests run, one enters, more come; all but that one get their own tokens. -> the one's last output."""
    ended: dict[str, RequestOutput] = {}

    def step() -> None:
        ended.update({out.request_id: out for out in llm.text_engine.step() if out.finished})

    llm.text_engine.add_request("a", GOOD["a"], GREEDY)
    step()
    llm.text_engine.add_request("b", GOOD["b"], GREEDY, final_only=True)
    llm.text_engine.add_request("bad", BAD if prompt is None else prompt, params)
    llm.text_engine.add_request("c", GOOD["c"], GREEDY)
    while llm.text_engine.has_unfinished_requests():
        step()
    assert tokens_of([ended[name] for name in GOOD]) == [greedy(GOOD[name], 12) for name in GOOD]
    check_scheduler(llm.engine.scheduler)
    assert llm.stats().free_blocks == llm.stats().num_blocks
    assert llm.stats().running == llm.stats().waiting == 0
    return ended["bad"]


@pytest.mark.parametrize("max_tokens", [None, 2**62])
@pytest.mark.parametrize("min_tokens", [2**31, 2**62])
def test_min_tokens_beyond_what_a_plan_holds(tmp_path: Path, min_tokens: int, max_tokens: int | None) -> None:
    params = SamplingParams(temperature=0, min_tokens=min_tokens, max_tokens=max_tokens, stop_token_ids=[0])
    assert 0 not in greedy(BAD, 35)
    with mock_llm(tmp_path, max_model_len=40) as llm:
        found = beside(llm, params)
    assert tokens_of([found]) == [greedy(BAD, 35)]


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 2**63 - 1},
        {"seed": -(2**63)},
        {"priority": 2**63 - 1},
        {"priority": -(2**63)},
        {"top_k": 2**62},
        {"max_tokens": 2**62, "stop_token_ids": [greedy(BAD, 4)[-1]]},
        {"logit_bias": {5: -1e300}},
        {"temperature": 9e29},
        {"temperature": 1e-320},
        {"top_p": 1e-320},
        {"min_p": 1e-320},
        {"repetition_penalty": 9e29},
        {"repetition_penalty": 1.1e-30},
        {"cache_salt": "\0"},
        {"cache_salt": "s" * 100_000},
    ],
    ids=str,
)
def test_the_utmost_values_of_each_field(tmp_path: Path, fields: dict[str, Any]) -> None:
    with mock_llm(tmp_path, scheduling_policy="priority", max_model_len=200) as llm:
        assert beside(llm, SamplingParams(**{"max_tokens": 12, "seed": 1, **fields})).error is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"request_id": "\ud800"}, "request_id must be a string of valid Unicode"),
        ({"request_id": 5}, "request_id must be a string"),
        ({"request_id": ["x"]}, "request_id must be a string"),
        ({"priority": 2**63}, "priority must be a whole number of 64 bits"),
    ],
)
def test_what_add_request_refuses_is_not_kept(tmp_path: Path, given: dict[str, Any], words: str) -> None:
    with mock_llm(tmp_path) as llm:
        with pytest.raises(ParamsError, match=words):
            llm.text_engine.add_request(**{"request_id": "x", "prompt": BAD, "params": GREEDY, **given})
        assert not llm.text_engine.has_unfinished_requests()


class Ids:
    """A list of ids that is anyone's class."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __iter__(self) -> Any:
        yield 1
        raise self.error


def test_a_prompt_that_raises_when_it_is_read(tmp_path: Path, error: BaseException) -> None:
    with mock_llm(tmp_path) as llm:
        found = beside(llm, GREEDY, Ids(error))
    assert found.error is not None
    assert found.error.code == "invalid_prompt"
    assert type(error).__name__ in str(found.error)


def test_a_text_over_which_the_tokenizer_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def encode(text: str) -> list[int]:
        raise error

    with text_llm(tmp_path) as llm:
        monkeypatch.setattr(llm.text_engine, "_encode", encode)
        found = beside(llm, GREEDY, "A0B1")
    assert found.error is not None
    assert found.error.code == "invalid_prompt"


def over_bad(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: BaseException, of: Callable[..., Any]
) -> None:
    """`owner.name` raises where `of` its arguments is the bad request."""
    original = getattr(owner, name)

    def broken(*args: Any, **kwargs: Any) -> Any:
        if of(*args):
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, broken)


def is_bad(request: Any) -> bool:
    return list(request.prompt_token_ids) == BAD


SEAMS: dict[str, tuple[Any, str, Callable[..., bool]]] = {
    "making its samples": (output.RequestState, "requests", lambda state, *_: is_bad(state.given)),
    "its first state": (output.RequestState, "add_sample", lambda state, *_: is_bad(state.given)),
    "queueing it": (Scheduler, "add", lambda self, request: is_bad(request)),
    "finding its hits": (BlockManager, "match", lambda self, request: is_bad(request)),
    "claiming its blocks": (BlockManager, "claim", lambda self, request, *_: is_bad(request)),
    "giving it blocks": (BlockManager, "grow", lambda self, request, *_: is_bad(request)),
    "building a plan with it": (scheduler, "build_plan", lambda draft: any(map(is_bad, draft.new))),
}


@pytest.mark.parametrize("seam", SEAMS)
def test_what_the_engine_raises_over_a_request_fails_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seam: str, error: BaseException
) -> None:
    over_bad(monkeypatch, *SEAMS[seam][:2], error, SEAMS[seam][2])
    with mock_llm(tmp_path) as llm:
        found = beside(llm, SamplingParams(temperature=0, max_tokens=5, n=2))
    assert found.error is not None
    assert found.error.code == "engine_failed"
    assert type(error).__name__ in str(found.error)
    assert found.error.__cause__ is error


@pytest.mark.parametrize("seam", SEAMS)
def test_an_interrupt_is_no_failure_of_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seam: str) -> None:
    over_bad(monkeypatch, *SEAMS[seam][:2], KeyboardInterrupt(), SEAMS[seam][2])
    with mock_llm(tmp_path) as llm:
        llm.text_engine.add_request("bad", BAD, GREEDY)
        with pytest.raises(KeyboardInterrupt):
            llm.text_engine.step()
        monkeypatch.undo()
        assert tokens_of(llm.generate(GOOD["a"], GREEDY, use_tqdm=False)) == [greedy(GOOD["a"], 12)]


def test_without_a_plan_the_newest_request_fails_until_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While rows of three requests are planned together, in steps of any kind."""
    original = scheduler.build_plan

    def build_plan(draft: Draft) -> StepPlan:
        if len(draft.slots) + len(draft.prefill) > 2 and draft.step >= 8:
            raise OverflowError("no room for a third row")
        return original(draft)

    monkeypatch.setattr(scheduler, "build_plan", build_plan)
    with mock_llm(tmp_path) as llm:
        found = llm.generate([[1, 2], [3, 4], [5, 6], [7, 8]], GREEDY.replace(max_tokens=20), use_tqdm=False)
        check_scheduler(llm.engine.scheduler)
    assert [out.error and out.error.code for out in found] == [None, None, "engine_failed", "engine_failed"]
    assert tokens_of(found[:2]) == [greedy([1, 2], 20), greedy([3, 4], 20)]


def test_scheduling_that_raises_among_running_rows_fails_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing says over which: the others are computed again, and get their tokens."""
    original, calls = Scheduler._pick_running, []

    def pick(self: Scheduler, draft: Any) -> None:
        original(self, draft)
        calls.append(len(self.running))
        if calls.count(3) == 4:
            calls.append(3)
            raise ValueError("half updated")

    monkeypatch.setattr(Scheduler, "_pick_running", pick)
    with mock_llm(tmp_path) as llm:
        found = llm.generate([[1, 2], [3, 4], [5, 6]], GREEDY, use_tqdm=False)
        check_scheduler(llm.engine.scheduler)
        assert llm.stats().preemptions == 3
    assert found[2].error is not None
    assert found[2].error.code == "engine_failed"
    assert tokens_of(found[:2]) == [greedy([1, 2], 12), greedy([3, 4], 12)]


@pytest.mark.parametrize("where", ["push", "finish"])
@pytest.mark.parametrize("final_only", [True, False])
def test_tokens_that_cannot_be_made_text_fail_their_request_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, where: str, final_only: bool
) -> None:
    original, bad = IncrementalDetokenizer.from_params, []

    def from_params(tokenizer: Any, params: Any) -> IncrementalDetokenizer:
        bad.append(original(tokenizer, params))
        return bad[-1]

    monkeypatch.setattr(IncrementalDetokenizer, "from_params", from_params)
    over_bad(monkeypatch, IncrementalDetokenizer, where, error, lambda self, *_: self in bad[2:3])
    with text_llm(tmp_path) as llm:
        found = beside(llm, GREEDY)
        assert found.error is not None
        assert found.error.code == "text_failed"
        llm.text_engine.add_request("again", BAD, GREEDY, final_only=final_only)
        llm.text_engine.step()
        bad[2] = bad[-1]
        llm.engine.abort_request("again")
        while llm.text_engine.has_unfinished_requests():
            out = llm.text_engine.step()
        assert [each.error and each.error.code for each in out] == ["text_failed"]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("where", ["model", "launch"])
def test_whatever_ends_a_step_fails_its_request_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, where: str, overlap: bool
) -> None:
    """`sys.exit()` in a model too."""
    forward, launch = MockModel.forward, InProcessExecutor.launch

    def broken_forward(self: MockModel, input_ids: Any, positions: Any, batch: Any) -> Any:
        if (input_ids == 9).sum() >= len(BAD):
            raise error
        return forward(self, input_ids, positions, batch)

    def broken_launch(self: InProcessExecutor, plan: Any) -> Any:
        if (plan.new.token_ids == 9).sum() >= len(BAD):
            raise error
        return launch(self, plan)

    if where == "model":
        monkeypatch.setattr(MockModel, "forward", broken_forward)
    else:
        monkeypatch.setattr(InProcessExecutor, "launch", broken_launch)
    with mock_llm(tmp_path, overlap=overlap) as llm:
        assert beside(llm, GREEDY).error is not None
        (alone,) = llm.generate(BAD, GREEDY, use_tqdm=False)
    assert alone.error is not None
    assert alone.error.code == "step_failed"
    assert where == "model" or type(error).__name__ in str(alone.error)


class Own(BaseException):
    pass


FOREIGN = [
    asyncio.CancelledError(),
    Own("x"),
    KeyboardInterrupt(),
    GeneratorExit(),
    BaseExceptionGroup("g", [SystemExit(1)]),
    WorkerError(0, 1, "step 3", "x"),
    EngineClosed(),
]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("error", FOREIGN, ids=lambda error: type(error).__name__)
def test_no_exception_of_a_models_ends_the_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, overlap: bool
) -> None:
    """On the step thread nothing means the caller, and one device has no workers."""
    forward = MockModel.forward

    def broken(self: MockModel, input_ids: Any, positions: Any, batch: Any) -> Any:
        if (input_ids == 9).sum() >= len(BAD):
            raise error
        return forward(self, input_ids, positions, batch)

    monkeypatch.setattr(MockModel, "forward", broken)
    with mock_llm(tmp_path, overlap=overlap) as llm:
        found = [beside(llm, GREEDY) for _ in range(2)]
    for each in found:
        assert each.error is not None
        assert each.error.code == "step_failed"
        assert type(error).__name__ in str(each.error)
        assert any(place in str(each.error) for place in (f"{__file__}, line ", "MockModel.forward raised "))


@pytest.mark.parametrize(("given", "words"), [(None, "a NoneType"), ("width", "float32 (5, 1, 1)"), ("f64", "float64")])
def test_what_a_backend_gives_is_looked_at_in_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, words: str
) -> None:
    forward = MockAttention.forward

    def odd(self: MockAttention, layer: int, spec: Any, q: Any, k: Any, v: Any) -> Any:
        out = forward(self, layer, spec, q, k, v)
        if (k[:, 0, 0] == 9).sum() < len(BAD):
            return out
        return None if given is None else out[..., :1] if given == "width" else out.double()

    monkeypatch.setattr(MockAttention, "forward", odd)
    with mock_llm(tmp_path) as llm:
        found = beside(llm, GREEDY)
    assert found.error is not None
    assert "MockAttention.forward returned " in str(found.error)
    assert words in str(found.error)
    assert "MockModel" not in str(found.error)


class ExitsOnLen(list[int]):
    def __len__(self) -> int:
        raise SystemExit


class ExitsOnIter(Mapping[str, Any]):
    def __getitem__(self, key: str) -> Any:
        raise SystemExit

    def __iter__(self) -> Any:
        raise SystemExit

    def __len__(self) -> int:
        return 1


class ExitsOnClass:
    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise SystemExit


class ExitsOnEncode(str):
    def encode(self, *args: Any) -> bytes:
        raise SystemExit


class ExitsOnGet(dict[str, Any]):
    def get(self, *args: Any) -> Any:
        raise SystemExit


ODD: dict[str, Callable[[], Any]] = {
    "len": lambda: ExitsOnLen([1]),
    "iter": ExitsOnIter,
    "class": ExitsOnClass,
    "get": lambda: ExitsOnGet(prompt_token_ids=[1]),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_prompt_whose_class_raises_is_refused_in_its_place(tmp_path: Path, odd: str) -> None:
    prompt = ODD[odd]()
    with mock_llm(tmp_path) as llm:
        one, two = llm.generate([prompt, [1, 2]], GREEDY, use_tqdm=False)
        alone = beside(llm, GREEDY, prompt)
    for each in (one, alone):
        assert each.error is not None
        assert each.error.code == "invalid_prompt"
        assert "reading the prompt raised SystemExit" in str(each.error) or odd == "get"
    assert tokens_of([two]) == [greedy([1, 2], 12)]


def test_texts_of_a_class_of_their_own_are_plain_texts(tmp_path: Path) -> None:
    with text_llm(tmp_path) as llm:
        outputs = llm.generate(
            [ExitsOnEncode("A1"), {"prompt_token_ids": BAD, "prompt": ExitsOnEncode("x")}], GREEDY, use_tqdm=False
        )
    assert [type(each.prompt) for each in outputs] == [str, str]
    assert tokens_of(outputs)[1] == greedy(BAD, 12)


def test_messages_whose_class_raises_are_refused_in_their_place(tmp_path: Path) -> None:
    good = [{"role": "user", "content": "A1"}]
    with text_llm(tmp_path) as llm:
        one, two = llm.chat(
            [[ExitsOnIter()], good],  # type: ignore[list-item]
            GREEDY,
            chat_template="{{ messages[0].content }}",
            use_tqdm=False,
        )
    assert one.error is not None
    assert "reading the messages raised SystemExit" in str(one.error)
    assert two.error is None


def test_prompts_whose_class_raises_are_refused(tmp_path: Path) -> None:
    with mock_llm(tmp_path) as llm, pytest.raises(ParamsError, match="reading the prompts raised SystemExit"):
        llm.generate(ExitsOnLen([1]), GREEDY, use_tqdm=False)


def test_an_observers_stop_iteration_does_not_end_a_stream(tmp_path: Path) -> None:
    def observer(record: Any) -> None:
        raise StopIteration

    with mock_llm(tmp_path) as llm, llm.observe(observer), pytest.raises(RuntimeError, match="StopIteration"):
        list(llm.stream(BAD, GREEDY))


def test_a_sink_that_raises_loses_only_its_output(tmp_path: Path, error: BaseException) -> None:
    def sink(out: RequestOutput) -> None:
        raise error

    kept: list[RequestOutput] = []
    with mock_llm(tmp_path) as llm:
        llm.text_engine.add_request("bad", BAD, GREEDY, final_only=True, sink=sink)
        llm.text_engine.add_request("a", GOOD["a"], GREEDY, final_only=True, sink=kept.append)
        run(llm)
        assert tokens_of(kept) == [greedy(GOOD["a"], 12)]


def test_a_refusal_keeps_its_words(tmp_path: Path) -> None:
    with mock_llm(tmp_path, max_model_len=8) as llm:
        found = beside_error(llm, [1] * 8)
    assert found.code == "too_long"


def beside_error(llm: LLM, prompt: list[int]) -> RequestError:
    (out,) = llm.generate(prompt, GREEDY, use_tqdm=False)
    assert out.error is not None
    return out.error


@pytest.mark.parametrize("text", ["half \ud800", 5, ["x"]])
def test_a_text_beside_ids_that_cannot_be_shown(tmp_path: Path, text: Any) -> None:
    with mock_llm(tmp_path) as llm:
        one, two = llm.generate([{"prompt_token_ids": BAD, "prompt": text}, [1, 2]], GREEDY, use_tqdm=False)
    assert one.error is not None
    assert one.error.code == "invalid_prompt"
    assert "valid Unicode" in str(one.error)
    assert tokens_of([two]) == [greedy([1, 2], 12)]


def test_a_long_salt_costs_each_block_no_more_than_a_short_one(tmp_path: Path) -> None:
    """And keeps prefixes apart all the same."""
    salts = ["a" * 10**6, "a" * 10**6 + "b", "a" * 63, "a" * 64]
    with mock_llm(tmp_path) as llm:
        for salt in [*salts, *salts]:
            llm.text_engine.add_request("x", LONG, GREEDY.replace(cache_salt=salt))
            while llm.text_engine.has_unfinished_requests():
                (*_, last) = llm.text_engine.step() or [None]
            assert last is not None
            salts.append(str(last.num_cached_tokens))
        keys = {entry.parent for entry in llm.engine.scheduler.blocks._pools[0].entries if entry}
    assert salts[4:] == ["0"] * 4 + ["20"] * 4
    assert max(len(key) for key in keys if isinstance(key, bytes)) == 64


def test_tables_that_no_index_reaches_are_refused_before_they_are_made() -> None:
    limits = SlotLimits(max_slots=65_536, max_model_len=100_000, vocab_size=9, num_groups=1, max_blocks=1)
    with pytest.raises(ConfigError, match=r"take more than 8 GiB: lower engine\.max_num_seqs"):
        SlotTables(limits, [], torch.device("cpu"))


LONG = [1 + i % 7 for i in range(21)]  # five blocks, and one token more


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("code", ["bad_logits", "step_failed"])
@pytest.mark.parametrize("at", [0, 7])
def test_a_prompt_that_failed_once_is_right_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, overlap: bool, at: int
) -> None:
    """Nothing of it stays in the prefix index, as nothing says which of its blocks are bad: here all, for good."""
    originals = MockModel.forward, MockModel.compute_logits
    llm = mock_llm(tmp_path, overlap=overlap)
    seen: list[int] = []

    def compute_logits(self: MockModel, hidden: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden))
        logits = originals[1](self, hidden)
        if len(seen) == at + 1:
            for cache in caches(llm):
                cache.fill_(0)  # what it wrote, and what it read
            if code == "step_failed":
                raise RuntimeError("once")
            logits.fill_(float("nan"))
        return logits

    with llm:
        monkeypatch.setattr(MockModel, "compute_logits", compute_logits)
        first, second, third = (llm.generate(LONG, GREEDY, use_tqdm=False)[0] for _ in range(3))
    assert first.error is not None
    assert first.error.code == code
    assert tokens_of([second, third]) == [greedy(LONG, 12)] * 2
    assert second.num_cached_tokens == 0
    assert third.num_cached_tokens == 20


def test_what_it_had_read_of_another_request_is_forgotten_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one published bad blocks, and ended before anything showed it."""
    llm = mock_llm(tmp_path)
    original = MockModel.compute_logits
    bad = [True]

    def compute_logits(self: MockModel, hidden: torch.Tensor) -> torch.Tensor:
        logits = original(self, hidden)
        return logits.fill_(float("nan")) if bad[0] else logits

    with llm:
        wanted = llm.generate(LONG, GREEDY.replace(max_tokens=1), use_tqdm=False)
        assert tokens_of(wanted) == [greedy(LONG, 1)]
        for cache in caches(llm):
            cache.fill_(0)
        monkeypatch.setattr(MockModel, "compute_logits", compute_logits)
        other = [*LONG[:20], 9, 9]
        (failed,) = llm.generate(other, GREEDY, use_tqdm=False)
        assert failed.num_cached_tokens == 20
        assert failed.error is not None
        bad[0] = False
        found = llm.generate([LONG, other], GREEDY, use_tqdm=False)
    assert tokens_of(found) == [greedy(LONG, 12), greedy(other, 12)]
    assert found[0].num_cached_tokens == 0


def caches(llm: LLM) -> list[torch.Tensor]:
    """The KV of the mock backend."""
    executor = llm._built.executor
    assert isinstance(executor, InProcessExecutor)
    return [backend.cache for backend in executor.running().backends]  # type: ignore[attr-defined]
