"""Speculation as a user turns it on: with every drafter the tokens are those of the plain run, bit for bit on the mock
model. `test_drafts.py` has the rows themselves: here drafts come from plugins, through the options."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoengine import LLM, RequestOutput, SamplingParams
from nanoengine.api.stats import EngineStats
from nanoengine.observe.steps import StepRecord
from nanoengine.testing.checkpoints import tiny_llama

from . import replay_drafter
from .pair_text import stopped, text_llm, text_of
from .support import VOCAB, greedy, mock_llm, prompts, tokens_of
from .test_drafts import advance_by_drafted, off_by_one, stale_counts
from .test_same_tokens import COUNT, WAYS, seeded

GREEDY = SamplingParams(temperature=0, seed=1, max_tokens=COUNT)  # with a seed, for `replay` to know the sample by
FEW = [5, 9, 17]  # a sample that may say only these comes back to what it has said
ALWAYS = {"min_acceptance": 0.0, "step_tokens": 1000}


def replay(accuracy: float, tokens: int = 5) -> dict[str, Any]:
    return {"method": "replay", "accuracy": accuracy, "tokens": tokens, **ALWAYS}


DRAFTERS: Mapping[str, dict[str, Any]] = {
    "right": replay(1.0),
    "mixed": replay(0.7),
    "wrong": replay(0.0),
    "ngram": {"method": "ngram", "tokens": 3, **ALWAYS},
    "suffix": {"method": "suffix", "tokens": 6, "step_tokens": 1000},
    "on the device": {"method": "follow_on_device", "tokens": 2, **ALWAYS},
}


def speculating(tmp_path: Path, speculation: Mapping[str, Any] | None, **options: Any) -> LLM:
    return mock_llm(tmp_path, plugins=[replay_drafter], speculation=speculation, **options)


def run(llm: LLM, asked: Sequence[Sequence[int]], params: Any) -> list[RequestOutput]:
    return llm.generate(asked, params, use_tqdm=False)


def accepted_as_meant(name: str, stats: EngineStats) -> None:
    """Drafts were accepted and rejected as the drafter is meant to be right or wrong."""
    assert stats.drafted > 20
    assert len(stats.drafted_per_position) == len(stats.accepted_per_position) == DRAFTERS[name]["tokens"]
    for counts in (stats.drafted_per_position, stats.accepted_per_position):
        assert counts == sorted(counts, reverse=True)
    if name == "right":
        assert stats.accepted_per_position == stats.drafted_per_position
    elif name == "wrong":
        assert stats.accepted == 0
    else:
        assert 0 < stats.accepted < stats.drafted


OFTEN = ["plain", "no overlap", "mixed", "cached", "preempted, chunked, cached"]


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("way", OFTEN)
def test_tokens_are_those_of_the_plain_run(tmp_path: Path, way: str, drafter: str) -> None:
    """A recipe a request: greedy, random, truncated, with penalties, biased."""
    options, asked, happened = WAYS[way]
    params = [each.replace(allowed_token_ids=FEW) if i % 2 else each for i, each in enumerate(seeded(len(asked)))]
    with speculating(tmp_path, None, **options) as llm:
        want = tokens_of(run(llm, asked, params))
        assert llm.stats().drafted_per_position == []
    with speculating(tmp_path, DRAFTERS[drafter], **options) as llm:
        for _ in range(2):  # the first time `replay` and `suffix` know nothing
            assert tokens_of(run(llm, asked, params)) == want
        stats = llm.stats()
        speculation: Any = llm.engine.scheduler._speculation
    accepted_as_meant(drafter, stats)
    assert happened(stats), stats
    assert stats.free_blocks == stats.num_blocks
    assert not speculation._states
    assert not speculation._acceptance


@pytest.mark.parametrize("mutant", [off_by_one, stale_counts, advance_by_drafted])
def test_mutants_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: Callable[..., None]) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        test_tokens_are_those_of_the_plain_run(tmp_path, "plain", "mixed")


@pytest.mark.parametrize("tokens", range(9))
@pytest.mark.parametrize("overlap", [True, False])
def test_any_number_of_drafts(tmp_path: Path, tokens: int, overlap: bool) -> None:
    asked = prompts(3)
    params = GREEDY
    with speculating(tmp_path, replay(1.0, tokens), overlap=overlap) as llm:
        want = [greedy(p, COUNT) for p in asked]
        assert tokens_of(run(llm, asked, params)) == want
        before = llm.stats()
        assert tokens_of(run(llm, asked, params)) == want
        after = llm.stats()
    assert before.drafted == 0
    assert after.accepted_per_position == after.drafted_per_position
    assert len(after.drafted_per_position) == tokens
    rows = -(-(COUNT - 1) // (tokens + 1))  # after the prompt's own token
    assert after.steps - before.steps == 1 + rows


@given(data=st.data())
@settings(max_examples=8)
def test_any_engine_gives_the_same_tokens(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    draw = data.draw
    asked = prompts(
        draw(st.integers(1, 8)),
        seed=draw(st.integers(0, 99)),
        longest=draw(st.integers(1, 30)),
        shared=draw(st.integers(0, 12)),
    )
    params = [
        each.replace(
            allowed_token_ids=draw(st.sampled_from([FEW, list(range(VOCAB))])),
            n=draw(st.integers(1, 2)),
            stop_token_ids=draw(st.lists(st.integers(0, VOCAB - 1), max_size=4)),
            min_tokens=draw(st.integers(0, 6)),
            speculate=draw(st.integers(0, 4)) > 0,
        )
        for each in seeded(len(asked))
    ]
    options: dict[str, Any] = {
        "max_num_seqs": draw(st.integers(1, 6)),
        "max_num_batched_tokens": draw(st.integers(1, 40)),
        "block_size": draw(st.sampled_from([1, 2, 4, 8])),
        "num_gpu_blocks_override": draw(st.integers(66, 120)),
        "enable_prefix_caching": draw(st.booleans()),
        "overlap": draw(st.booleans()),
        "spare_slots": draw(st.integers(0, 2)),
    }
    chosen = DRAFTERS[draw(st.sampled_from(sorted(DRAFTERS)))]
    speculation = {**chosen, "tokens": draw(st.integers(1, 8)), "min_acceptance": draw(st.sampled_from([0.0, 0.3]))}
    folder = tmp_path_factory.mktemp("any")

    def said(llm: LLM) -> list[list[tuple[int, ...]]]:
        outputs = run(llm, asked, params)
        assert [output.error for output in outputs] == [None] * len(asked)
        return [[sample.token_ids for sample in output.outputs] for output in outputs]

    with speculating(folder, None, overlap=False, enable_prefix_caching=False) as llm:
        want = said(llm)
    with speculating(folder, speculation, **options) as llm:
        for _ in range(2):
            assert said(llm) == want
        stats = llm.stats()
    assert stats.free_blocks == stats.num_blocks


# -- ends -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("accuracy", [0.8, 1.0])
def test_stop_strings_inside_accepted_drafts(tmp_path: Path, overlap: bool, accuracy: float) -> None:
    """A stop string that is complete in the middle of a row: what the row brought behind it is not shown."""
    asked = prompts(8)
    texts = [text_of(greedy(p, 40)) for p in asked]
    stops = [[text[at : at + 3], text[17:20]] for at, text in enumerate(texts, start=4)]
    params = [SamplingParams(temperature=0, max_tokens=40, stop=stop) for stop in stops]
    ends = [stopped(greedy(p, 40), stop) for p, stop in zip(asked, stops, strict=True)]
    plain, records = GREEDY.replace(max_tokens=40), list[StepRecord]()
    with text_llm(tmp_path, plugins=[replay_drafter], speculation=replay(accuracy), overlap=overlap) as llm:
        run(llm, asked, plain)  # so that it drafts beyond the stop
        drafter_of(llm).said = Known({prompt: said for (prompt, _, _), said in drafter_of(llm).said.items()})
        assert len(drafter_of(llm).said) == 8
        with llm.observe(records.append):
            found = run(llm, asked, params)
    rows = [row for record in records for row in record.rows]
    said = [sum(row.new_tokens for row in rows if row.request == f"{output.request_id}/0") for output in found]
    shown = [len(output.outputs[0].token_ids) for output in found]
    assert all(drawn >= count for drawn, count in zip(said, shown, strict=True))
    assert said != shown  # a row brought more, behind the stop
    for output, end in zip(found, ends, strict=True):
        sample = output.outputs[0]
        assert end.stop is not None
        assert (sample.token_ids, sample.text, sample.stop_reason) == (end.token_ids, end.text, end.stop)
        assert sample.finish_reason == "stop"


class Known(dict[Any, Any]):
    """What `replay` knows of a prompt, for any sample and seed."""

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(key[0], default)


def drafter_of(llm: LLM) -> Any:
    found: Any = llm.engine.scheduler._speculation
    return found._drafter._drafter


@pytest.mark.parametrize("tokens", [1, 4, 8])
def test_stop_tokens_and_lengths_inside_accepted_drafts(tmp_path: Path, tokens: int) -> None:
    """Stop tokens, min_tokens, and lengths that are not what a row would bring."""
    asked = [[i, *prompt] for i, prompt in enumerate(prompts(10))]
    whole = [greedy(p, COUNT) for p in asked]
    params = [
        SamplingParams(temperature=0, max_tokens=3 + 2 * i, stop_token_ids=[tokens[7]], min_tokens=i % 3)
        for i, tokens in enumerate(whole)
    ]
    records: list[StepRecord] = []
    with speculating(tmp_path, None) as llm:
        want = run(llm, asked, params)
    with speculating(tmp_path, replay(1.0, tokens)) as llm:
        run(llm, asked, GREEDY)
        drafter_of(llm).said = Known({prompt: said for (prompt, _, _), said in drafter_of(llm).said.items()})
        with llm.observe(records.append):
            found = run(llm, asked, params)
    rows = [row for record in records for row in record.rows if row.drafted]
    assert any(0 < row.new_tokens < 1 + row.accepted for row in rows)  # an end inside of what was accepted
    for one, other in zip(want, found, strict=True):
        a, b = one.outputs[0], other.outputs[0]
        assert (a.token_ids, a.finish_reason, a.stop_reason) == (b.token_ids, b.finish_reason, b.stop_reason)
    assert {output.outputs[0].finish_reason for output in found} == {"stop", "length"}


def test_bad_words_see_the_drafts_before_them(tmp_path: Path) -> None:
    asked = prompts(6)
    words = [text_of(greedy(p, 12)[6:8]) for p in asked]
    params = [GREEDY.replace(bad_words=[word]) for word in words]
    with text_llm(tmp_path) as llm:
        want = tokens_of(run(llm, asked, params))
    assert all(tokens != greedy(p, COUNT) for p, tokens in zip(asked, want, strict=True))
    with text_llm(tmp_path, plugins=[replay_drafter], speculation=replay(0.8)) as llm:
        for _ in range(2):
            assert tokens_of(run(llm, asked, params)) == want
        assert 0 < llm.stats().accepted < llm.stats().drafted


# -- requests ---------------------------------------------------------------------------------------------------------


def test_samples_of_a_request_have_their_own_drafts(tmp_path: Path) -> None:
    asked, params = prompts(3, shared=9), SamplingParams(temperature=1.2, seed=3, n=4, max_tokens=COUNT)

    def said(llm: LLM) -> list[list[tuple[int, ...]]]:
        return [[sample.token_ids for sample in output.outputs] for output in run(llm, asked, params)]

    with speculating(tmp_path, None) as llm:
        want = said(llm)
    assert len({tokens for samples in want for tokens in samples}) == 12
    with speculating(tmp_path, replay(1.0)) as llm:
        assert said(llm) == want
        assert said(llm) == want
        stats = llm.stats()
    assert stats.accepted == stats.drafted > 100
    assert stats.prefix_hit_tokens > 0


def test_a_request_can_leave_speculation_out(tmp_path: Path) -> None:
    asked = prompts(4)
    want = [greedy(p, COUNT) for p in asked]
    params = [GREEDY.replace(speculate=i > 0) for i in range(4)]
    records: list[StepRecord] = []
    with speculating(tmp_path, replay(1.0)) as llm:
        assert tokens_of(run(llm, asked, params)) == want
        with llm.observe(records.append):
            assert tokens_of(run(llm, asked, params)) == want
    with_drafts = {row.request for record in records for row in record.rows if row.drafted}
    assert with_drafts == {"llm-5/0", "llm-6/0", "llm-7/0"}
    plain = [row for record in records for row in record.rows if row.request == "llm-4/0"]
    assert [row.new_tokens for row in plain if row.new_tokens] == [1] * COUNT


def test_logprobs_are_the_models_at_each_position(tmp_path: Path) -> None:
    asked = prompts(5, shortest=6)
    params = [
        SamplingParams(temperature=0.9, seed=i, max_tokens=COUNT, logprobs=3, prompt_logprobs=1 if i % 2 else None)
        for i in range(5)
    ]
    with speculating(tmp_path, None) as llm:
        want = run(llm, asked, params)
    with speculating(tmp_path, replay(0.8)) as llm:
        run(llm, asked, params)
        found = run(llm, asked, params)
        assert 0 < llm.stats().accepted < llm.stats().drafted
    for one, other in zip(want, found, strict=True):
        a, b = one.outputs[0], other.outputs[0]
        assert a.token_ids == b.token_ids
        assert a.logprobs is not None
        assert b.logprobs is not None
        for x, y in zip(a.logprobs, b.logprobs, strict=True):
            assert {t: e.rank for t, e in x.items()} == {t: e.rank for t, e in y.items()}
            assert [e.logprob for e in x.values()] == pytest.approx([e.logprob for e in y.values()], abs=1e-5)
        assert b.cumulative_logprob == pytest.approx(a.cumulative_logprob, abs=1e-4)
        assert (one.prompt_logprobs is None) == (other.prompt_logprobs is None)


def test_aborted_requests_leave_nothing(tmp_path: Path) -> None:
    asked = prompts(6)
    params = GREEDY
    with speculating(tmp_path, replay(1.0)) as llm:
        run(llm, asked, params)
        for i, prompt in enumerate(asked):
            llm.text_engine.add_request(str(i), prompt, params)
        done: dict[str, RequestOutput] = {}
        for step in itertools.count():
            for output in llm.text_engine.step():
                if output.finished:
                    done[output.request_id] = output
            if step < 3:
                llm.engine.abort_request(str(step))
            if not llm.text_engine.has_unfinished_requests():
                break
        speculation: Any = llm.engine.scheduler._speculation
        stats = llm.stats()
    for i, prompt in enumerate(asked):
        sample, want = done[str(i)].outputs[0], greedy(prompt, COUNT)
        assert sample.token_ids == (want[: len(sample.token_ids)] if i < 3 else want)
    assert not speculation._states
    assert not speculation._acceptance
    assert stats.free_blocks == stats.num_blocks


# -- drafters that fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [True, False])
def test_a_drafter_that_raises_ends_its_request_alone(tmp_path: Path, overlap: bool) -> None:
    asked = [[1, 2, 3], [13, 5], [4, 5, 6, 7]]
    params = GREEDY
    with speculating(tmp_path, {"method": "failing", "min_acceptance": 0.0}, overlap=overlap) as llm:
        one, bad, two = run(llm, asked, params)
        assert tokens_of([one, two]) == [greedy(asked[0], COUNT), greedy(asked[2], COUNT)]
        again = tokens_of(run(llm, [[13, 5, 1][1:]], params))  # it goes on with others
        stats = llm.stats()
    assert again == [greedy([5, 1], COUNT)]
    assert bad.error is not None
    assert bad.error.code == "drafter_failed"
    message = str(bad.error)
    assert "draft() of drafter 'failing' (Failing of object" in message
    assert "LookupError: its index is lost" in message
    assert "replay_drafter.py, line" in message
    assert stats.preemptions == 0
    assert stats.free_blocks == stats.num_blocks


def test_after_an_interrupt_there_is_a_new_drafter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, params = prompts(3), GREEDY
    want = [greedy(p, COUNT) for p in asked]
    with speculating(tmp_path, replay(1.0)) as llm:
        run(llm, asked, params)
        old = drafter_of(llm)

        def interrupted(*args: Any) -> Any:
            monkeypatch.undo()
            raise KeyboardInterrupt

        monkeypatch.setattr(llm.engine.scheduler, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(llm, asked, params)
        for _ in range(2):
            assert tokens_of(run(llm, asked, params)) == want
        assert drafter_of(llm) is not old
        assert llm.stats().accepted > 0


# -- adaptive ---------------------------------------------------------------------------------------------------------


def test_a_drafter_that_is_always_wrong_costs_little(tmp_path: Path) -> None:
    """It is left out after some rows, and the requests run ahead again."""
    asked, params = prompts(4), GREEDY.replace(max_tokens=200)
    with speculating(tmp_path, {**replay(0.0), "min_acceptance": 0.3}) as llm:
        run(llm, asked, params)
        run(llm, asked, params)
        stats = llm.stats()
    assert 0 < stats.drafted < 4 * 3 * 5 + 4 * 5
    assert stats.accepted == 0


def test_runs_can_be_repeated(tmp_path: Path) -> None:
    """The same requests, one after the other: the same drafts, as nothing depends on a clock."""
    asked = prompts(6)
    params = [each.replace(allowed_token_ids=FEW) for each in seeded(6)]

    def counts() -> EngineStats:
        with speculating(tmp_path, DRAFTERS["suffix"], overlap=False) as llm:
            run(llm, asked, params)
            run(llm, asked, params)
            return llm.stats()

    assert counts() == counts()


# -- what is reported -------------------------------------------------------------------------------------------------


def test_step_records_have_the_drafts_of_each_row(tmp_path: Path) -> None:
    asked = prompts(5)
    params = GREEDY
    records: list[StepRecord] = []
    with speculating(tmp_path, replay(0.7)) as llm:
        run(llm, asked, params)
        before = llm.stats()
        with llm.observe(records.append):
            run(llm, asked, params)
        stats = llm.stats()
    rows = [row for record in records for row in record.rows]
    for row in rows:
        assert 0 <= row.accepted <= row.drafted
        if row.drafted:
            assert row.num_tokens == 1 + row.drafted
    assert before.drafted == 0
    for position in range(5):
        assert sum(row.drafted > position for row in rows) == stats.drafted_per_position[position]
        assert sum(row.accepted > position for row in rows) == stats.accepted_per_position[position]
    assert sum(row.new_tokens for row in rows) == COUNT * len(asked)


# -- real models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafter", ["ngram", "suffix", "mixed", "on the device"])
def test_a_real_model_says_the_same(tmp_path: Path, drafter: str) -> None:
    """In float32: rows of several tokens round otherwise than one; no near tie lies in these tokens."""
    asked = prompts(5, shortest=4, longest=30)
    params = [
        SamplingParams(temperature=i % 2, seed=i, max_tokens=40, ignore_eos=True, allowed_token_ids=[*FEW, 40 + i])
        for i in range(5)
    ]
    options: dict[str, Any] = {"skip_tokenizer_init": True, "num_gpu_blocks_override": 128, "dtype": "float32"}
    folder = tiny_llama(tmp_path)

    def engine(speculation: Any) -> LLM:
        plugins = [replay_drafter]
        return LLM(folder, device="cpu", max_model_len=128, plugins=plugins, speculation=speculation, **options)

    with engine(None) as llm:
        want = tokens_of(run(llm, asked, params))
    with engine({**DRAFTERS[drafter], "min_acceptance": 0.0}) as llm:
        for _ in range(2):
            assert tokens_of(run(llm, asked, params)) == want
        stats = llm.stats()
    assert 0 < stats.accepted < stats.drafted
