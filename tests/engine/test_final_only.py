"""Requests that want one output, at the end: their text is decoded block by block, and what they get is the same."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from nanoengine import LLM, SamplingParams
from nanoengine.testing.checkpoints import write_byte_tokenizer
from nanoengine.text import IncrementalDetokenizer
from nanoengine.text_engine import TEXT_BLOCK
from tests.engine.support import greedy, mock_llm, prompts, tokens_of

ASKED = prompts(6, shortest=5, longest=20)
LENGTH = 3 * TEXT_BLOCK
LONG = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
overlaps = pytest.mark.parametrize("overlap", [False, True])


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of each call of the detokenizer."""
    seen: list[int] = []
    push = IncrementalDetokenizer.push

    def watched(self: IncrementalDetokenizer, token_ids: Iterable[int]) -> str | None:
        ids = list(token_ids)
        seen.append(len(ids))
        return push(self, ids)

    monkeypatch.setattr(IncrementalDetokenizer, "push", watched)
    return seen


def bytes_llm(folder: Path, **options: Any) -> LLM:
    """The mock model, with a tokenizer whose ids are bytes."""
    (folder / "mock").mkdir()
    write_byte_tokenizer(folder / "mock")
    return mock_llm(folder, max_model_len=256, **options)


def text_of(tokens: Iterable[int]) -> str:
    return bytes(tokens).decode()


@overlaps
def test_a_long_text_is_not_decoded_token_by_token(tmp_path: Path, pushed: list[int], overlap: bool) -> None:
    with bytes_llm(tmp_path, overlap=overlap) as llm:
        stop = greedy(ASKED[0], LENGTH)[-7]
        done = llm.generate(ASKED, LONG.replace(stop_token_ids=[stop]))
    expected = [greedy(prompt, LENGTH, stop=(stop,)) for prompt in ASKED]
    assert tokens_of(done) == expected
    ended = [output.outputs[0].finish_reason == "stop" for output in done]
    assert any(ended)
    assert [output.outputs[0].text for output in done] == [
        text_of(tokens[:-1] if stopped else tokens) for tokens, stopped in zip(expected, ended, strict=True)
    ]
    assert [output.metrics.num_generated for output in done] == [len(tokens) for tokens in expected]
    assert sum(pushed) == sum(map(len, expected)) - sum(ended)
    assert max(pushed) == TEXT_BLOCK
    assert len(pushed) < sum(map(len, expected)) / 10


def test_a_stop_string_ends_it_where_it_comes(tmp_path: Path, pushed: list[int]) -> None:
    """There the text of each token is looked at."""
    with bytes_llm(tmp_path) as llm:
        text = text_of(greedy(ASKED[0], LENGTH))
        stop = text[40:42]
        (done,) = llm.generate(ASKED[:1], LONG.replace(stop=[stop]))
        steps = llm.stats().steps
    at = text.index(stop)
    assert (done.outputs[0].finish_reason, done.outputs[0].stop_reason) == ("stop", stop)
    assert done.outputs[0].text == text[:at]
    assert set(pushed) == {1}
    assert steps <= at + len(stop) + 1


@overlaps
def test_its_metrics_know_the_first_token_when_it_comes(tmp_path: Path, pushed: list[int], overlap: bool) -> None:
    with bytes_llm(tmp_path, overlap=overlap) as llm:
        done = llm.generate(ASKED, LONG)
    assert pushed.count(1) == len(ASKED)
    for output in done:
        times = output.metrics
        assert times.first_token
        assert times.finished
        assert times.first_token < times.finished


@pytest.mark.parametrize("steps", [4, 5, 6, 7, TEXT_BLOCK, TEXT_BLOCK + 1, TEXT_BLOCK + 2, TEXT_BLOCK + 3])
def test_an_abort_keeps_the_tokens_that_came(tmp_path: Path, pushed: list[int], steps: int) -> None:
    """As many as a request with the same steps that gets an output for each, and their text."""
    with bytes_llm(tmp_path) as llm:
        llm.text_engine.add_request("final", ASKED[1], LONG, final_only=True)
        llm.text_engine.add_request("stream", ASKED[2], LONG)
        for _ in range(steps):
            assert all(output.request_id == "stream" for output in llm.text_engine.step())
        for name in ("final", "stream"):
            llm.engine.abort_request(name)
        final, stream = sorted(llm.text_engine.step(), key=lambda output: output.request_id)
    assert final.outputs[0].finish_reason == "abort"
    assert len(final.outputs[0].token_ids) == final.metrics.num_generated >= steps - 1
    for output, prompt in ((final, ASKED[1]), (stream, ASKED[2])):
        assert list(output.outputs[0].token_ids) == list(greedy(prompt, len(stream.outputs[0].token_ids)))
        assert output.outputs[0].text == text_of(output.outputs[0].token_ids)


def test_log_probs_are_kept_token_by_token(tmp_path: Path) -> None:
    with bytes_llm(tmp_path) as llm:
        (done,) = llm.generate(ASKED[:1], LONG.replace(logprobs=1))
    (sample,) = done.outputs
    assert sample.logprobs is not None
    assert len(sample.token_ids) == LENGTH
    assert all(token in entry for token, entry in zip(sample.token_ids, sample.logprobs, strict=True))
    assert sample.text == text_of(sample.token_ids)


def test_samples_of_one_request_end_one_by_one(tmp_path: Path) -> None:
    """The one output comes when the last sample ends, with the texts of all."""
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=LENGTH, stop_token_ids=list(range(20)))
    with bytes_llm(tmp_path) as llm:
        (done,) = llm.generate(ASKED[:1], params)
    lengths = [len(sample.token_ids) for sample in done.outputs]
    assert len(set(lengths)) > 1
    for sample in done.outputs:
        shown = sample.token_ids[:-1] if sample.finish_reason == "stop" else sample.token_ids
        assert sample.text == text_of(shown)


@pytest.mark.parametrize("at", [1, TEXT_BLOCK + 1])
def test_a_tokenizer_that_raises_fails_the_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """In whichever block its text is decoded."""
    push = IncrementalDetokenizer.push

    def broken(self: IncrementalDetokenizer, token_ids: Iterable[int]) -> str | None:
        if self.num_tokens >= at:
            raise ValueError("no text for this")
        return push(self, token_ids)

    monkeypatch.setattr(IncrementalDetokenizer, "push", broken)
    with bytes_llm(tmp_path) as llm:
        (done,) = llm.generate(ASKED[:1], LONG)
        assert done.error is not None
        assert done.error.code == "text_failed"
        assert llm.stats().running == 0
