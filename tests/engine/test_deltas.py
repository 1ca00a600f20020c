"""The engine reports tokens, and its caller makes outputs of them. How often it reports does not change an output, and
a stop string that the caller finds ends that sample alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanoengine import LLM, ParamsError, RequestError, RequestOutput, SamplingParams
from nanoengine.api.deltas import RequestDelta, SampleDelta
from nanoengine.api.outputs import RequestMetrics
from nanoengine.core.engine import Engine
from nanoengine.core.scheduling.scheduler import Scheduler
from nanoengine.observe.steps import StepRecord
from nanoengine.params.generated import Beginning
from nanoengine.params.input_processor import CheckedRequest
from nanoengine.params.resolver import ResolvedParams
from nanoengine.text import IncrementalDetokenizer, Tokenizer
from nanoengine.text.outputs import OutputAssembler, SampleOutput

from .pair_text import stopped, text_llm, text_of
from .support import greedy, mock_llm
from .test_output import rows_of

LENGTH = 100
PROMPT = [1, 2]
ENDLESS = SamplingParams(temperature=0, seed=4, max_tokens=LENGTH, ignore_eos=True)


def plain(output: RequestOutput) -> RequestOutput:
    """Without the times, which differ between two runs."""
    counted = {"num_generated": output.metrics.num_generated, "longest": output.metrics.longest}
    return dataclasses.replace(output, metrics=RequestMetrics(arrival=0.0, **counted))


# How tokens are split


def cut(ids: Sequence[int], sizes: Iterator[int]) -> list[list[int]]:
    found, at = [], 0
    while at < len(ids):
        size = next(sizes)
        found.append([*ids[at : at + size]])
        at += size
    return found


def assembled(
    tokenizer: Tokenizer | None, params: ResolvedParams, texts: Sequence[str], reason: Any, sizes: Iterator[int]
) -> RequestOutput:
    """The output of samples with these texts, of deltas with so many tokens of one sample each."""
    checked = CheckedRequest(request_id="r", prompt_token_ids=(1, 2), params=params)
    made, gone = OutputAssembler(checked, tokenizer), set[int]()
    parts = [cut([*text.encode()], sizes) for text in texts]
    for turn in range(max(map(len, parts))):
        for index, each in enumerate(parts):
            if turn < len(each) and index not in gone:
                last = reason if turn == len(each) - 1 else None
                rows = rows_of(each[turn]) if params.logprobs is not None else None
                gone |= {*made.take(RequestDelta("r", (SampleDelta(index, tuple(each[turn]), rows, last),), seed=3))}
    assert made.finished
    return plain(made.output())


TEXTS = st.lists(st.text("abcé", min_size=1, max_size=20), min_size=2, max_size=2)
PARAMS = st.builds(
    ResolvedParams,
    n=st.just(2),
    stop=st.sampled_from([(), ("ab",), ("cab", "bb"), ("éa",)]),
    include_stop_str_in_output=st.booleans(),
    min_tokens=st.sampled_from([0, 5]),
    logprobs=st.sampled_from([None, 0]),
    detokenize=st.booleans(),
)


@given(TEXTS, PARAMS, st.sampled_from(["length", "stop", "abort"]), st.lists(st.integers(1, 9), min_size=1, max_size=9))
@settings(max_examples=200, deadline=None)
def test_any_split_into_deltas_makes_the_same_output(
    tokenizer: Tokenizer, texts: list[str], params: ResolvedParams, reason: str, sizes: list[int]
) -> None:
    one_by_one = assembled(tokenizer, params, texts, reason, iter(lambda: 1, None))
    assert assembled(tokenizer, params, texts, reason, _over(sizes)) == one_by_one
    assert assembled(tokenizer, params, texts, reason, iter(lambda: 99, None)) == one_by_one


def _over(sizes: Sequence[int]) -> Iterator[int]:
    while True:
        yield from sizes


def test_a_split_that_keeps_what_follows_a_stop_string_is_seen(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mutant: the tokens behind a stop string stay."""
    decode = SampleOutput.decode

    def keeping(self: SampleOutput, new: Sequence[int]) -> None:
        before = [*self.token_ids]
        decode(self, new)
        self.token_ids[:] = before

    monkeypatch.setattr(SampleOutput, "decode", keeping)
    params, texts = ResolvedParams(n=2, stop=("ab",)), ["cabcc", "c"]
    whole = assembled(tokenizer, params, texts, "length", iter(lambda: 99, None))
    assert whole != assembled(tokenizer, params, texts, "length", iter(lambda: 1, None))


def test_beginnings_that_no_reader_has_read_are_read_by_the_assembler(tokenizer: Tokenizer) -> None:
    """As from another process, which sends token ids only."""
    params = ResolvedParams(n=2, stop=("cd",), logprobs=0)
    begun = (Beginning(tuple(b"abc")), Beginning(tuple(b"xcdy")))
    checked = CheckedRequest(request_id="r", prompt_token_ids=(1,), params=params, begun=begun)
    made = OutputAssembler(checked, tokenizer)
    assert made.take(RequestDelta("r", (SampleDelta(0, tuple(b"de"), rows_of([*b"de"])),))) == (0,)
    one, two = made.output().outputs
    assert made.finished
    assert (one.text, one.token_ids, one.num_given_tokens, one.num_given_chars) == ("ab", tuple(b"abcd"), 3, 2)
    assert (two.text, two.token_ids, two.num_given_tokens, two.stop_reason) == ("x", tuple(b"xcd"), 3, "cd")
    assert one.logprobs is not None
    assert [row is None for row in one.logprobs] == [True, True, True, False]


# News that come twice, or are lost


def test_a_delta_that_is_delivered_twice_counts_once(tokenizer: Tokenizer) -> None:
    checked = CheckedRequest(request_id="r", prompt_token_ids=(1,), params=ResolvedParams())
    made, delta = OutputAssembler(checked, tokenizer), RequestDelta("r", (SampleDelta(0, tuple(b"ab")),))
    made.take(delta)
    made.take(delta)
    assert made.output().outputs[0].text == "ab"


def test_an_interrupt_while_text_is_made_fails_that_request(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokenizer may have read a token or not: its text would be wrong."""
    checked = CheckedRequest(request_id="r", prompt_token_ids=(1,), params=ResolvedParams())
    made, delta = OutputAssembler(checked, tokenizer), RequestDelta("r", (SampleDelta(0, tuple(b"ab")),))

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(IncrementalDetokenizer, "push", interrupt)
    with pytest.raises(KeyboardInterrupt):
        made.take(delta)
    monkeypatch.undo()
    assert made.take(delta) == ()
    assert made.finished
    assert made.error is not None
    assert made.error.code == "interrupted"


# What the engine reports


class Deltas(list[RequestDelta]):
    """A sink."""

    def tokens(self, index: int = 0) -> list[tuple[int, ...]]:
        return [new.token_ids for delta in self for new in delta.samples if new.sample_index == index]

    @property
    def reasons(self) -> list[Any]:
        return [new.finish_reason for delta in self for new in delta.samples if new.finish_reason is not None]


def run(engine: Engine) -> None:
    while engine.has_unfinished_requests():
        engine.advance()


@pytest.mark.parametrize("every", [1, 7, 1000])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_delta_comes_with_the_first_token_then_with_each_so_many_and_with_the_end(
    tmp_path: Path, every: int, overlap: bool
) -> None:
    got = Deltas()
    with mock_llm(tmp_path, overlap=overlap) as llm:
        llm.engine.add_request("r", PROMPT, ENDLESS, every=every, sink=got.append)
        run(llm.engine)
    parts = got.tokens()
    assert sum(parts, ()) == greedy(PROMPT, LENGTH)
    assert [len(part) for part in parts[:-1]] == [1] + [every] * (len(parts) - 2)
    assert len(parts[-1]) <= every
    assert [delta.finished for delta in got] == [False] * (len(got) - 1) + [True]
    assert got.reasons == ["length"]
    assert {delta.seed for delta in got} == {got[0].seed}
    assert {delta.num_computed_tokens for delta in got} == {len(PROMPT)}


def test_an_abort_and_an_error_bring_the_tokens_that_were_not_reported_yet(tmp_path: Path) -> None:
    with mock_llm(tmp_path) as llm:
        got, failed = Deltas(), Deltas()
        llm.engine.add_request("r", PROMPT, ENDLESS, every=50, sink=got.append)
        llm.engine.add_request("f", PROMPT, ENDLESS, every=50, sink=failed.append)
        for _ in range(12):
            llm.engine.advance()
        assert (got.tokens(), got.reasons) == ([greedy(PROMPT, 1)], [])
        llm.engine.abort_request("r")
        llm.engine._end_request(llm.engine._requests.known["f"], RequestError("interrupted", "as a test"))
        run(llm.engine)
        assert llm.stats().free_blocks == llm.stats().num_blocks
    for deltas in (got, failed):
        found = sum(deltas.tokens(), ())
        assert found == greedy(PROMPT, len(found))
        assert len(found) > 8
    assert got.reasons == ["abort"]
    assert failed[-1].finished
    assert failed[-1].error is not None
    assert failed.reasons == []


def test_one_sample_is_aborted_before_and_after_its_request_starts(tmp_path: Path) -> None:
    with mock_llm(tmp_path) as llm:
        got = Deltas()
        llm.engine.add_request("r", PROMPT, ENDLESS.replace(n=3), sink=got.append)
        llm.engine.abort_request("r", 1)
        for _ in range(5):
            llm.engine.advance()
        llm.engine.abort_request("r", 2)
        llm.engine.abort_request("r", 2)
        llm.engine.advance()
        assert llm.stats().running == 1
        run(llm.engine)
        assert llm.stats().free_blocks == llm.stats().num_blocks
    assert sum(got.tokens(0), ()) == greedy(PROMPT, LENGTH)
    assert sum(got.tokens(1), ()) == ()
    assert 0 < len(sum(got.tokens(2), ())) < 8
    assert got.reasons == ["abort", "abort", "length"]
    assert [delta.finished for delta in got].index(True) == len(got) - 1


def test_a_sample_is_aborted_while_its_request_is_prepared(tmp_path: Path) -> None:
    got, start = Deltas(), list[Callable[[], Any]]()
    with mock_llm(tmp_path) as llm:
        state: Any = llm.engine._requests
        state.preparations.submit = lambda jobs, finish: start.append(finish)
        llm.engine._inputs.preparations = lambda given: [lambda: None]  # type: ignore[method-assign]
        llm.engine.add_request("r", PROMPT, ENDLESS.replace(n=2), sink=got.append)
        llm.engine.abort_request("r", 0)
        llm.engine.advance()
        assert got == []
        start[0]()
        run(llm.engine)
    assert sum(got.tokens(0), ()) == ()
    assert sum(got.tokens(1), ()) == greedy(PROMPT, LENGTH)
    assert got.reasons == ["abort", "length"]


def test_what_is_wrong_with_the_arguments_is_named(tmp_path: Path) -> None:
    with mock_llm(tmp_path) as llm:
        for every in (0, -1, 2.0, True, None):
            with pytest.raises(ParamsError, match="every must be a whole number of tokens from 1 up, not "):
                llm.engine.add_request("r", PROMPT, ENDLESS, every=every)  # type: ignore[arg-type]
        llm.engine.add_request("r", PROMPT, ENDLESS.replace(n=2))
        for index in (2, -1, -2):
            with pytest.raises(ParamsError, match=f"request 'r' has no sample {index}; n is 2"):
                llm.engine.abort_request("r", index)
        llm.engine.abort_request("unknown", 5)
        llm.engine.abort_request("r")
        assert [delta.finished for delta in llm.engine.step()] == [True]
        assert not llm.engine.has_unfinished_requests()


# Stop strings


def assemble(llm: LLM, params: SamplingParams, every: int) -> tuple[RequestOutput, int]:
    """The output of a client that wants news so often, and how many tokens the engine drew for it."""
    inputs, drawn = llm._built.inputs, 0
    checked = inputs.process("r", PROMPT, params, None)
    made = OutputAssembler(checked, llm._built.tokenizer)

    def sink(delta: RequestDelta) -> None:
        nonlocal drawn
        drawn += sum(len(new.token_ids) for new in delta.samples)
        for index in made.take(delta):
            llm.engine.abort_request("r", index)

    llm.engine.add_checked(checked, every, sink)
    run(llm.engine)
    assert made.finished
    return plain(made.output()), drawn


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_that_is_found_late_gives_the_same_output(tmp_path: Path, overlap: bool, include: bool) -> None:
    tokens = greedy(PROMPT, LENGTH)
    stop = text_of(tokens[40:42])
    params = ENDLESS.replace(stop=stop, include_stop_str_in_output=include)
    with text_llm(tmp_path, overlap=overlap) as llm:
        one, drawn_by_one = assemble(llm, params, 1)
        late, drawn_late = assemble(llm, params, 32)
        generated = llm.generate([PROMPT], params, use_tqdm=False)[0]
        assert llm.stats().free_blocks == llm.stats().num_blocks
    end = stopped(tokens, [stop], include=include)
    assert late == one
    assert late.outputs == generated.outputs
    assert (one.outputs[0].token_ids, one.outputs[0].text, one.outputs[0].stop_reason) == end
    assert one.metrics.num_generated == len(end.token_ids)
    assert drawn_by_one <= len(end.token_ids) + overlap
    assert drawn_late >= 65, "it was not found late"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stop_string_is_recorded_as_a_stop_and_a_client_that_leaves_as_an_abort(
    tmp_path: Path, streamed: bool
) -> None:
    """The client finds it, and its abort says so: records and traces have the reason that the client's output has."""
    stop = text_of(greedy(PROMPT, LENGTH)[20:22])
    params, records = ENDLESS.replace(n=2, stop=stop), list[StepRecord]()
    with text_llm(tmp_path) as llm, llm.observe(records.append):
        outputs = [*llm.stream(PROMPT, params)] if streamed else llm.generate([PROMPT], params, use_tqdm=False)
        with llm.stream(PROMPT, ENDLESS) as left:
            next(left)
        llm.generate([[5, 6]], params.replace(n=1, stop=None), use_tqdm=False)  # an ending is in the next step's record
    assert [sample.finish_reason for sample in outputs[-1].outputs] == ["stop", "stop"]
    assert [each.reason for record in records for each in record.ended] == ["stop", "stop", "abort", "length"]


def check_one_sample_stops(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(n=3, temperature=1.5, seed=11, max_tokens=40)
    aborted: list[str] = []
    with text_llm(folder) as llm:
        (free,) = llm.generate([PROMPT], params, use_tqdm=False)
        texts = [sample.text for sample in free.outputs]
        stop = next(
            texts[1][at : at + 3] for at in range(8, 60) if not any(texts[1][at : at + 3] in texts[i] for i in (0, 2))
        )
        abort = Scheduler.abort

        def watched(self: Scheduler, request: Any) -> None:
            aborted.append(request.id)
            abort(self, request)

        monkeypatch.setattr(Scheduler, "abort", watched)
        (found,) = llm.generate([PROMPT], params.replace(stop=stop), use_tqdm=False)
        stats = llm.stats()
    assert (found.outputs[0], found.outputs[2]) == (free.outputs[0], free.outputs[2])
    assert found.outputs[1].text == texts[1].split(stop)[0]
    assert (found.outputs[1].finish_reason, found.outputs[1].stop_reason) == ("stop", stop)
    assert found.metrics.num_generated == sum(len(sample.token_ids) for sample in found.outputs)
    assert len(found.outputs[1].token_ids) < 40
    assert aborted == [f"{found.request_id}/1"]
    assert stats.free_blocks == stats.num_blocks


def test_a_stop_string_of_one_sample_aborts_that_sample_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_one_sample_stops(tmp_path, monkeypatch)


@pytest.mark.parametrize("mutant", ["aborts nothing", "aborts all"])
def test_mutants_of_the_abort_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    abort = Engine.abort_request

    def broken(self: Engine, request_id: str, sample_index: int | None = None) -> None:
        if mutant == "aborts all":
            abort(self, request_id)

    monkeypatch.setattr(Engine, "abort_request", broken)
    with pytest.raises(AssertionError):
        check_one_sample_stops(tmp_path, monkeypatch)


def test_an_id_is_free_when_a_stop_string_has_ended_its_request(tmp_path: Path) -> None:
    """As the last output comes: a sink may add the next request of that id."""
    tokens, outputs = greedy(PROMPT, LENGTH), list[RequestOutput]()
    params = ENDLESS.replace(stop=text_of(tokens[5:7]))
    with text_llm(tmp_path) as llm:

        def again(output: RequestOutput) -> None:
            outputs.append(output)
            if len(outputs) < 3:
                llm.text_engine.add_request("r", PROMPT, params, final_only=True, sink=again)

        llm.text_engine.add_request("r", PROMPT, params, final_only=True, sink=again)
        run(llm.engine)
        assert llm.stats().free_blocks == llm.stats().num_blocks
    assert [output.outputs[0].finish_reason for output in outputs] == ["stop"] * 3


def test_the_engine_knows_no_text(tmp_path: Path) -> None:
    """A prompt that is text is refused as any that is no list of ids; a stop string changes none of its tokens."""
    got, wrong = Deltas(), Deltas()
    with text_llm(tmp_path) as llm:
        llm.engine.add_request("r", PROMPT, ENDLESS.replace(stop=text_of(greedy(PROMPT, 5))), sink=got.append)
        llm.engine.add_request("t", "A0", ENDLESS, sink=wrong.append)  # type: ignore[arg-type]
        run(llm.engine)
    assert sum(got.tokens(), ()) == greedy(PROMPT, LENGTH)
    assert wrong[0].error is not None
    assert wrong[0].error.code == "invalid_prompt"


# Log-probs


@pytest.mark.parametrize("every", [1, 7, 1000])
def test_a_delta_has_the_log_probs_of_its_tokens(tmp_path: Path, every: int) -> None:
    """Of several samples, too, and of one that is aborted before they are due."""
    got, aborted = Deltas(), Deltas()
    with mock_llm(tmp_path) as llm:
        llm.engine.add_request("r", PROMPT, ENDLESS.replace(n=2, logprobs=2), every=every, sink=got.append)
        llm.engine.add_request("a", PROMPT, ENDLESS.replace(logprobs=2), every=every, sink=aborted.append)
        for _ in range(12):
            llm.engine.advance()
        llm.engine.abort_request("a")
        run(llm.engine)
    for deltas, index in ((got, 0), (got, 1), (aborted, 0)):
        place = len(PROMPT)
        for new in (new for delta in deltas for new in delta.samples if new.sample_index == index and new.token_ids):
            assert new.logprobs is not None
            assert new.logprobs.token_ids.tolist() == list(new.token_ids)
            assert new.logprobs.positions.tolist() == list(range(place, place + len(new.token_ids)))
            assert len(new.logprobs.top_ids) == new.logprobs.top_offsets[-1] == 2 * len(new.token_ids)
            place += len(new.token_ids)
        assert place - len(PROMPT) == len(sum(deltas.tokens(index), ())) > 5
    assert all(delta.samples for delta in got), "a delta without news"
    assert got.reasons == ["length", "length"]
    assert aborted.reasons == ["abort"]
